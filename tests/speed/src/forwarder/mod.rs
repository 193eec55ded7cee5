//! What the machine itself can do: a tunnel without protocol and without cryptography.
//!
//! It moves packets between a TUN device and a UDP socket with the offloads that wgsep uses, and
//! with the 32 bytes that WireGuard adds to each packet; all that it leaves out is WireGuard. One
//! thread a direction, IPv4 only, one peer. It shares no line of the packet path with wgsep, so
//! that no change there moves the ceiling.

mod checksum;
mod join;
mod split;
mod tun;

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::net::{SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::thread;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg, setsockopt, sockopt,
};
use nix::sys::uio::writev;
use wgsep_dataplane::offload::{VNET_HDR_LEN, VnetHeader};

use join::Joiner;
use split::{Datagrams, HEADER_LEN, TAG_LEN};

/// Longest super-packet with its header, rounded up.
const ROOM: usize = 65_536 + 512;
/// Datagrams collected before they are sent.
const MAX_COLLECTED: usize = 192;
/// Reads of the socket before what came is written.
const MAX_READS: usize = 16;
/// Bytes that wait in the socket's buffers, at most.
const SOCKET_BUFFER: usize = 7 << 20;

/// One end of the tunnel.
#[derive(Debug)]
pub struct Forwarder {
    tun: File,
    socket: UdpSocket,
}

impl Forwarder {
    /// Makes the interface and the socket, both in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Which step failed, and what the kernel said.
    pub fn open(interface: &str, local: SocketAddrV4, peer: SocketAddrV4) -> Result<Self, String> {
        let step = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
        let tun = tun::open(interface).map_err(step("make the interface"))?;
        let socket = UdpSocket::bind(local).map_err(step("bind the socket"))?;
        socket.connect(peer).map_err(step("connect the socket"))?;
        let options = || {
            setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER)?;
            setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER)?;
            setsockopt(&socket, sockopt::UdpGroSegment, &true)
        };
        options().map_err(|errno| format!("set up the socket: {errno}"))?;
        Ok(Self { tun, socket })
    }

    /// Forwards until a descriptor fails, which is the interface's end.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn run(&self) -> io::Result<()> {
        thread::scope(|scope| {
            let outward = scope.spawn(|| self.outward());
            let inward = self.inward();
            outward.join().unwrap_or(Ok(())).and(inward)
        })
    }

    fn outward(&self) -> io::Result<()> {
        let mut room = vec![0; ROOM];
        let mut datagrams = Datagrams::default();
        loop {
            wait(&self.tun)?;
            while datagrams.count() < MAX_COLLECTED {
                let len = match (&self.tun).read(&mut room) {
                    Ok(len) => len,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                };
                if let Some((header, packet)) = room[..len].split_first_chunk::<VNET_HDR_LEN>()
                    && let Some(header) = VnetHeader::parse(header)
                {
                    datagrams.add(&header, packet);
                }
            }
            datagrams.send(|bytes, len| self.send(bytes, len));
            datagrams.clear();
        }
    }

    /// Sends datagrams of `len` bytes, of which the last may be shorter. What cannot be sent is
    /// lost, as on any network.
    fn send(&self, bytes: &[u8], len: usize) {
        let segment = len as u16;
        let several = [ControlMessage::UdpGsoSegments(&segment)];
        let control = if bytes.len() > len { &several[..] } else { &[] };
        let parts = [IoSlice::new(bytes)];
        let flags = MsgFlags::empty();
        let _lost = sendmsg::<()>(self.socket.as_raw_fd(), &parts, control, flags, None);
    }

    fn inward(&self) -> io::Result<()> {
        let mut buffer = vec![0; MAX_READS * ROOM];
        let mut joiner = Joiner::default();
        // Room for the length of the datagrams that came joined.
        let mut control = nix::cmsg_space!(i32);
        // What the device does not take is lost: before the interface is up, all of it.
        let mut write = |parts: &[IoSlice<'_>]| {
            let _lost = writev(&self.tun, parts);
        };
        loop {
            wait(&self.socket)?;
            for number in 0..MAX_READS {
                let start = number * ROOM;
                let Some((len, segment)) =
                    self.receive(&mut buffer[start..start + ROOM], &mut control)?
                else {
                    break;
                };
                for from in (0..len).step_by(segment) {
                    let to = len.min(from + segment);
                    let packet = start + from + HEADER_LEN..start + to.saturating_sub(TAG_LEN);
                    if packet.len() >= 20 {
                        joiner.push(&mut buffer, packet, &mut write);
                    }
                }
            }
            joiner.flush(&mut buffer, &mut write);
        }
    }

    /// What came, and the length of each datagram of it; `None` where nothing waits.
    fn receive(&self, room: &mut [u8], control: &mut [u8]) -> io::Result<Option<(usize, usize)>> {
        let mut parts = [IoSliceMut::new(room)];
        let descriptor = self.socket.as_raw_fd();
        let flags = MsgFlags::MSG_DONTWAIT;
        let message = match recvmsg::<()>(descriptor, &mut parts, Some(control), flags) {
            Ok(message) => message,
            // The other end is not there yet.
            Err(Errno::EAGAIN | Errno::ECONNREFUSED) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let mut segment = message.bytes;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::UdpGroSegments(len) = control {
                segment = usize::try_from(len).unwrap_or(segment);
            }
        }
        Ok(Some((message.bytes, segment.max(1))))
    }
}

/// Waits until there is something to read.
fn wait(descriptor: &impl AsFd) -> io::Result<()> {
    poll(&mut [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
    Ok(())
}
