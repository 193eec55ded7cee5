//! The channel: a SOCK_SEQPACKET socket that carries frames, and descriptors beside them.
//!
//! Only the helper sends descriptors. A frame that comes with more or fewer than it says, or that
//! was cut short, ends the conversation; descriptors that came with it are closed first.

use crate::Error;
use crate::message::{Frame, MAX_FRAME, Request, decode};
use crate::reply::{FromHelper, Notice, Reply};
use core::mem::{size_of, zeroed};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use serde::Serialize;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Most descriptors that the kernel passes with one message (SCM_MAX_FD).
pub const MAX_DESCRIPTORS: usize = 253;

/// Room for the control message of [`MAX_DESCRIPTORS`], aligned as the kernel requires.
#[repr(C, align(8))]
struct ControlBuffer([u8; 1040]);

/// One end of the channel, never waiting.
pub struct Channel(pub(crate) OwnedFd);

/// What a receive gave.
#[derive(Debug)]
pub enum Received<T> {
    /// Nothing waits.
    Nothing,
    /// The other end is closed.
    Closed,
    /// A message, with exactly as many descriptors as it says.
    Message(T, Vec<OwnedFd>),
}

impl Channel {
    /// Takes one end.
    ///
    /// # Errors
    /// If it is not a SOCK_SEQPACKET socket, or the kernel does not say.
    pub fn new(socket: OwnedFd) -> Result<Self, Error> {
        match getsockopt(&socket, sockopt::SockType) {
            Ok(SockType::SeqPacket) => Ok(Self(socket)),
            Ok(_) | Err(nix::Error::ENOTSOCK) => Err(Error::NotAChannel),
            Err(errno) => Err(Error::Io(errno)),
        }
    }

    /// Sends the answer to a request.
    ///
    /// # Errors
    /// If the other end is gone or reads nothing, or `descriptors` are not as many as `reply` says.
    pub fn send_reply(
        &self,
        sequence: u32,
        reply: &Reply,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        if descriptors.len() != reply.descriptors() {
            return Err(Error::Descriptors);
        }
        self.send(0, FromHelper::Reply { sequence, reply: *reply }, descriptors)
    }

    /// Says something unasked.
    ///
    /// # Errors
    /// If the other end is gone or reads nothing.
    pub fn send_notice(&self, notice: &Notice) -> Result<(), Error> {
        self.send(0, FromHelper::Notice(*notice), &[])
    }

    /// Receives a request and its sequence number.
    ///
    /// # Errors
    /// If the frame is not one, or a descriptor came with it.
    pub fn receive_request(&self) -> Result<Received<(u32, Request)>, Error> {
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
        Ok(Received::Message(decode(bytes.get(..len).unwrap_or_default())?, descriptors))
    }

    pub(crate) fn send(
        &self,
        sequence: u32,
        body: impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
        let frame = Frame::encode(sequence, body)?;
        let iov = [io::IoSlice::new(frame.as_bytes())];
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[] } else { &rights[..] };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        sendmsg::<UnixAddr>(self.0.as_raw_fd(), &iov, control, flags, None).map_err(Error::Io)?;
        Ok(())
    }

    /// Receives a frame's bytes, 0 at the end of the conversation; `None` if nothing waits.
    ///
    /// nix's own recvmsg leaves descriptors open where the control message was cut short, so this
    /// one reads the control messages itself.
    pub(crate) fn receive(
        &self,
        bytes: &mut [u8; MAX_FRAME + 1],
    ) -> Result<Option<(usize, Vec<OwnedFd>)>, Error> {
        let mut control = ControlBuffer([0; 1040]);
        let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: an all-zero msghdr is a valid one with nothing in it.
        let mut message: libc::msghdr = unsafe { zeroed() };
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        // Of 32 bits with musl, of 64 with glibc.
        message.msg_controllen = control.0.len() as _;
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: iov and control are live and as long as `message` says.
        let received = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut message, flags) };
        let Ok(len) = usize::try_from(received) else {
            return match nix::Error::last() {
                nix::Error::EAGAIN | nix::Error::EINTR => Ok(None),
                // Reported once, before what the other end sent, where it closed without reading all.
                nix::Error::ECONNRESET => self.receive(bytes),
                error => Err(Error::Io(error)),
            };
        };
        let descriptors = take_descriptors(&message);
        if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            return Err(Error::Malformed);
        }
        Ok(Some((len, descriptors)))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Takes ownership of every descriptor that the kernel installed with a message.
fn take_descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: `message` describes a control buffer that the kernel filled and that is still live.
    let mut cursor = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give null or a header that lies within the buffer.
    while let Some(header) = unsafe { cursor.as_ref() } {
        if (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: CMSG_LEN only computes.
            let overhead = unsafe { libc::CMSG_LEN(0) };
            #[allow(clippy::unnecessary_cast, reason = "musl's lengths are of 32 bits")]
            let len = (header.cmsg_len as usize).saturating_sub(overhead as usize);
            let count = len / size_of::<RawFd>();
            for at in 0..count {
                // SAFETY: the data of a header follows it within the buffer.
                let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
                // SAFETY: `at` is below the number of descriptors that the header's length holds.
                let place = unsafe { data.add(at) };
                // SAFETY: the kernel wrote a descriptor there; the read need not be aligned.
                let raw = unsafe { place.read_unaligned() };
                // SAFETY: the kernel has just installed this descriptor for us alone.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
        // SAFETY: `header` is one that CMSG_FIRSTHDR or CMSG_NXTHDR gave for this message.
        cursor = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    descriptors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LogLevel;
    use crate::message::VERSION;
    use nix::sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, UnixAddr, sendmsg, socketpair,
    };
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// Held by every test that opens descriptors, because one of them counts.
    static DESCRIPTORS: Mutex<()> = Mutex::new(());

    fn alone() -> MutexGuard<'static, ()> {
        DESCRIPTORS.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pair() -> (Channel, Channel) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        (Channel::new(a).unwrap(), Channel::new(b).unwrap())
    }

    fn open_descriptors() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    fn send_raw(channel: &Channel, bytes: &[u8], descriptors: usize) {
        let raw = vec![channel.0.as_raw_fd(); descriptors];
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if descriptors == 0 { &[] } else { &rights[..] };
        let iov = [io::IoSlice::new(bytes)];
        sendmsg::<UnixAddr>(channel.0.as_raw_fd(), &iov, control, MsgFlags::empty(), None).unwrap();
    }

    #[test]
    fn requests_and_replies_cross_with_their_descriptors() {
        let _alone = alone();
        let (dataplane, helper) = pair();
        assert!(matches!(helper.receive_request().unwrap(), Received::Nothing));
        dataplane.send_request(9, &Request::CloseUdp).unwrap();
        let Received::Message((9, Request::CloseUdp), _) = helper.receive_request().unwrap() else {
            panic!()
        };
        let reply = Reply::UdpOpened { port: 7, sockets: 2 };
        assert_eq!(helper.send_reply(9, &reply, &[helper.as_fd()]), Err(Error::Descriptors));
        helper.send_reply(9, &reply, &[helper.as_fd(), helper.as_fd()]).unwrap();
        let Received::Message(said, descriptors) = dataplane.receive_from_helper().unwrap() else {
            panic!()
        };
        assert_eq!((said, descriptors.len()), (FromHelper::Reply { sequence: 9, reply }, 2));
        helper.send_notice(&Notice::LogLevel(LogLevel::Debug)).unwrap();
        assert!(matches!(
            dataplane.receive_from_helper().unwrap(),
            Received::Message(FromHelper::Notice(_), _)
        ));
        drop(helper);
        drop(descriptors);
        assert!(matches!(dataplane.receive_from_helper().unwrap(), Received::Closed));
    }

    /// As when the interface is deleted while the reply to CloseUdp is under way.
    #[test]
    fn what_was_sent_before_the_other_end_closed_is_received_though_that_did_not_read_all() {
        let _alone = alone();
        let (dataplane, helper) = pair();
        helper.send_reply(1, &Reply::Done, &[]).unwrap();
        dataplane.send_request(2, &Request::Bye).unwrap();
        drop(dataplane);
        let received = helper.receive_request().unwrap();
        assert!(matches!(received, Received::Message((2, Request::Bye), _)), "{received:?}");
        assert!(matches!(helper.receive_request().unwrap(), Received::Closed));
    }

    #[test]
    fn unwanted_descriptors_and_malformed_frames_are_refused_and_nothing_stays_open() {
        let _alone = alone();
        let (dataplane, helper) = pair();
        dataplane.send_request(1, &Request::Bye).unwrap();
        let _warm = helper.receive_request().unwrap();
        let before = open_descriptors();
        let bye = Frame::encode(1, Request::Bye).unwrap();
        for count in [1, 2, MAX_DESCRIPTORS] {
            send_raw(&dataplane, bye.as_bytes(), count);
            assert_eq!(helper.receive_request().unwrap_err(), Error::Descriptors);
        }
        for count in [0, 1, 3, MAX_DESCRIPTORS] {
            let reply = Reply::UdpOpened { port: 7, sockets: 2 };
            let said = Frame::encode(0, FromHelper::Reply { sequence: 1, reply }).unwrap();
            send_raw(&helper, said.as_bytes(), count);
            assert_eq!(dataplane.receive_from_helper().unwrap_err(), Error::Descriptors);
        }
        for bytes in
            [&[VERSION][..], &[VERSION; 5], &[0xff; 6], &[VERSION; MAX_FRAME + 1], &[1; 4096]]
        {
            send_raw(&dataplane, bytes, 0);
            assert_eq!(helper.receive_request().unwrap_err(), Error::Malformed);
        }
        assert_eq!(open_descriptors(), before);
    }

    #[test]
    fn only_a_seqpacket_socket_is_a_channel() {
        let _alone = alone();
        let (stream, _) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(matches!(Channel::new(stream.into()), Err(Error::NotAChannel)));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Channel::new(file.into()), Err(Error::NotAChannel)));
    }
}
