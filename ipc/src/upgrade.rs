//! What two helpers say to each other while one replaces the other.
//!
//! The new helper sends [`HELLO`] to the socket of the running one, with two descriptors: the running helper's end of a
//! channel, and the old dataplane's end of the socket by which the state passes. All else passes through that channel:
//! [`Welcome`] with what the new pair is to use, [`FromSuccessor::HandOver`] once the new dataplane is verified. No key
//! passes, only descriptors and settings.
//!
//! The frames have a version of their own, because the two helpers are of different builds.

use crate::message::CODEC;
use crate::startup::Listen;
use crate::{Channel, Error, FromHelper, LogLevel, MAX_FRAME, Notice, Received, TunOffload};
use nix::fcntl::OFlag;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use nix::unistd::{dup3, write};
use serde::{Deserialize, Serialize};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, RawFd};
use std::os::fd::{BorrowedFd, OwnedFd};

/// Of the frames between two helpers.
pub const VERSION: u8 = 2;
/// The first message: what it is, and its version.
pub const HELLO: [u8; 8] = *b"wgsep  \x02";

/// Where the lines of the log go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogSink {
    /// A file, a pipe or a terminal.
    Stream,
    /// A stream of the journal.
    Journal,
    /// The system's log.
    Syslog,
}

/// Who waits for the end of the daemon that is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Waiter {
    /// Nobody, or the service manager, which learns the number of the new helper.
    None,
    /// Whoever started the running helper, which therefore stays, and ends with the new one.
    ThisHelper,
    /// Whoever started an earlier helper, to which the last descriptor leads.
    EarlierHelper,
}

/// What the running pair has and was started with. Comes with descriptors, in this order: the UAPI listener, the socket
/// that [`HELLO`] came to, the TUN queues, the listeners of the status socket and of the socket for preshared keys, if any,
/// the log, the service manager's socket, if any, and the channel to an earlier helper, if any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Index of the interface.
    pub ifindex: u32,
    /// As in [`crate::Reply::Granted`].
    pub netns: Option<i32>,
    /// How many TUN queues come with it.
    pub tun_queues: u8,
    /// A listener of the status socket comes with it.
    pub status: bool,
    /// A listener of the socket for preshared keys comes with it.
    pub psk: bool,
    /// What the queues do besides single packets.
    pub offload: TunOffload,
    /// The dataplane's uid and gid, if not those of the helper.
    pub ids: Option<(u32, u32)>,
    /// Worker threads.
    pub workers: u8,
    /// Refuse to run with a layer degraded.
    pub strict: bool,
    /// Where UDP sockets listen.
    pub listen: Listen,
    /// The only port that is permitted.
    pub port: Option<u16>,
    /// The permitted marks: value and mask.
    pub marks: Option<(u32, u32)>,
    /// Ports below the first unprivileged one are permitted.
    pub low_ports: bool,
    /// Buffers beyond the limits of the system.
    pub large_buffers: bool,
    /// The offloads not to use, a bit each in the order of [`crate::Offload::ALL`].
    pub without: u16,
    /// Of both processes' lines.
    pub log_level: LogLevel,
    /// Lines are JSON.
    pub log_json: bool,
    /// Where they go.
    pub log: LogSink,
    /// The service manager's socket comes with it; the interval of its watchdog in microseconds, 0 for none.
    pub manager: Option<u64>,
    /// The interface is that of a daemon that crashed.
    pub is_restored: bool,
    /// Who waits for the daemon's end.
    pub waiter: Waiter,
}

impl Welcome {
    /// How many descriptors come with it.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        let earlier = usize::from(self.waiter == Waiter::EarlierHelper);
        let beside = usize::from(self.status) + usize::from(self.psk);
        3 + usize::from(self.tun_queues) + beside + usize::from(self.manager.is_some()) + earlier
    }
}

/// What the running helper says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromPredecessor {
    /// What it has.
    Welcome(Welcome),
    /// It was sent this signal, which is meant for the new helper.
    Signal(i32),
    /// Its dataplane has given everything away. The UDP sockets come with it, if they are open: as they are after the
    /// last request of that dataplane.
    HandedOver(Option<OpenUdp>),
}

impl FromPredecessor {
    /// How many descriptors come with it.
    fn descriptors(&self) -> usize {
        match self {
            Self::Welcome(welcome) => welcome.descriptors(),
            Self::HandedOver(udp) => udp.map_or(0, |udp| usize::from(udp.sockets)),
            Self::Signal(_) => 0,
        }
    }
}

/// UDP sockets that are open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenUdp {
    /// Their port.
    pub port: u16,
    /// How many there are.
    pub sockets: u8,
    /// SO_MARK.
    pub mark: u32,
    /// They receive datagrams many at a time.
    pub joins: bool,
}

/// What the new helper says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromSuccessor {
    /// Its dataplane is verified and waits for the state.
    HandOver,
    /// The daemon has ended with this exit status.
    Ended(u8),
}

/// Encodes a frame: the version, and a body; returns its length.
fn encode(message: impl Serialize, frame: &mut [u8; MAX_FRAME]) -> Result<usize, Error> {
    let [version, body @ ..] = frame;
    *version = VERSION;
    let len = bincode::serde::encode_into_slice(message, body, CODEC);
    len.map(|len| 1 + len).map_err(|_| Error::TooLong)
}

fn decode<T: serde::de::DeserializeOwned>(frame: &[u8]) -> Result<T, Error> {
    let (version, body) = frame.split_first().ok_or(Error::Malformed)?;
    match bincode::serde::decode_from_slice(body, CODEC) {
        Ok((message, len)) if (*version, len) == (VERSION, body.len()) => Ok(message),
        _ => Err(Error::Malformed),
    }
}

impl Channel {
    /// Puts another socket in the place of its own, under the same number.
    ///
    /// # Errors
    /// As dup3(2).
    pub fn replace(&mut self, socket: OwnedFd) -> nix::Result<()> {
        dup3(socket, &mut self.0, OFlag::O_CLOEXEC)
    }

    /// Takes a datagram socket to which [`HELLO`] may come.
    #[must_use]
    pub const fn of_datagrams(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Receives [`HELLO`] with its two descriptors; `None` for anything else.
    #[must_use]
    pub fn receive_hello(&self) -> Option<[OwnedFd; 2]> {
        let mut bytes = [0; MAX_FRAME + 1];
        let (len, descriptors) = self.receive(&mut bytes).ok()??;
        let descriptors = descriptors.try_into().ok()?;
        (bytes.get(..len)? == HELLO).then_some(descriptors)
    }

    /// Has the dataplane hand everything over by a socket.
    ///
    /// # Errors
    /// If it is gone or reads nothing.
    pub fn send_hand_over(&self, state: BorrowedFd<'_>) -> Result<(), Error> {
        self.send(0, FromHelper::Notice(Notice::HandOver), &[state])
    }

    /// Sends something with descriptors to the new helper.
    ///
    /// # Errors
    /// If that is gone or reads nothing, or `descriptors` are not as many as `message` says.
    pub fn send_to_successor(
        &self,
        message: &FromPredecessor,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        if descriptors.len() != message.descriptors() {
            return Err(Error::Descriptors);
        }
        let mut frame = [0; MAX_FRAME];
        let len = encode(message, &mut frame)?;
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let bytes = [IoSlice::new(frame.get(..len).unwrap_or_default())];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let rights = [ControlMessage::ScmRights(&raw)];
        let sent = sendmsg::<UnixAddr>(self.0.as_raw_fd(), &bytes, &rights, flags, None);
        sent.map(drop).map_err(Error::Io)
    }

    /// Says something to the new helper.
    ///
    /// # Errors
    /// If that is gone or reads nothing.
    pub fn tell_successor(&self, message: &FromPredecessor) -> Result<(), Error> {
        self.write_frame(message)
    }

    /// Says something to the helper before this one.
    ///
    /// # Errors
    /// If that is gone or reads nothing.
    pub fn tell_predecessor(&self, message: &FromSuccessor) -> Result<(), Error> {
        self.write_frame(message)
    }

    /// By write(2), which the filter need not hold to one socket.
    fn write_frame(&self, message: impl Serialize) -> Result<(), Error> {
        let mut frame = [0; MAX_FRAME];
        let len = encode(message, &mut frame)?;
        write(&self.0, frame.get(..len).unwrap_or_default()).map(drop).map_err(Error::Io)
    }

    /// Receives from the helper before this one.
    ///
    /// # Errors
    /// If it is no frame of this version, or the number of descriptors is wrong.
    pub fn receive_from_predecessor(&self) -> Result<Received<FromPredecessor>, Error> {
        let mut bytes = [0; MAX_FRAME + 1];
        let Some((len, descriptors)) = self.receive(&mut bytes)? else {
            return Ok(Received::Nothing);
        };
        if len == 0 {
            return Ok(Received::Closed);
        }
        let message = decode(bytes.get(..len).unwrap_or_default())?;
        if descriptors.len() != FromPredecessor::descriptors(&message) {
            return Err(Error::Descriptors);
        }
        Ok(Received::Message(message, descriptors))
    }

    /// Receives from the new helper.
    ///
    /// # Errors
    /// If it is no frame of this version, or a descriptor came with it.
    pub fn receive_from_successor(&self) -> Result<Received<FromSuccessor>, Error> {
        let mut bytes = [0; MAX_FRAME + 1];
        let Some((len, descriptors)) = self.receive(&mut bytes)? else {
            return Ok(Received::Nothing);
        };
        if !descriptors.is_empty() {
            return Err(Error::Descriptors);
        }
        if len == 0 {
            return Ok(Received::Closed);
        }
        let message = decode(bytes.get(..len).unwrap_or_default())?;
        Ok(Received::Message(message, descriptors))
    }
}
