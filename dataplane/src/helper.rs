//! The dataplane's client of the helper: sends requests, receives replies and notices, never blocks.

use nix::sys::socket::{SockType, SockaddrStorage, getsockname, getsockopt, sockopt};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use wgsep_ipc::{Channel, FromHelper, Notice, Received, Reply, Request};

/// The typed client of the helper. At most one request awaits its reply.
pub(crate) struct Helper {
    channel: Channel,
    sequence: u32,
    awaiting: bool,
    sent_bye: bool,
}

/// A message from the helper.
pub(crate) enum HelperMessage {
    /// The reply to the pending request, with its descriptors.
    Reply(Reply, Vec<OwnedFd>),
    /// A message that is not a reply, with its descriptors.
    Notice(Notice, Vec<OwnedFd>),
    /// The helper has closed the channel.
    Closed,
}

impl Helper {
    /// Creates a client on the channel that the helper passed at the start.
    pub(crate) const fn new(channel: Channel) -> Self {
        Self { channel, sequence: 0, awaiting: false, sent_bye: false }
    }

    /// Sends a request; [`Self::receive`] returns its reply.
    ///
    /// # Errors
    /// If the channel is broken.
    pub(crate) fn request(&mut self, request: &Request) -> Result<(), wgsep_ipc::Error> {
        self.sequence = self.sequence.wrapping_add(1);
        self.channel.send_request(self.sequence, request)?;
        self.awaiting = true;
        Ok(())
    }

    /// Reports that this process serves, which the helper does not reply to.
    ///
    /// # Errors
    /// If the channel is broken.
    pub(crate) fn pong(&self) -> Result<(), wgsep_ipc::Error> {
        self.channel.send_request(0, &Request::Pong)
    }

    /// Sends the last request. Nothing is received after it, because the reply to an earlier request may
    /// cross it.
    pub(crate) fn bye(&mut self) {
        let _gone = self.request(&Request::Bye);
        self.sent_bye = true;
    }

    /// Receives the next message from the helper, if there is one.
    ///
    /// # Errors
    /// If the message violates the protocol.
    pub(crate) fn receive(&mut self) -> Result<Option<HelperMessage>, wgsep_ipc::Error> {
        if self.sent_bye {
            return Ok(None);
        }
        Ok(match self.channel.receive_from_helper()? {
            Received::Nothing => None,
            Received::Closed => Some(HelperMessage::Closed),
            Received::Message(FromHelper::Notice(notice), descriptors) => {
                Some(HelperMessage::Notice(notice, descriptors))
            }
            Received::Message(FromHelper::Reply { sequence, reply }, descriptors) => {
                if !self.awaiting || sequence != self.sequence {
                    return Err(wgsep_ipc::Error::Unexpected);
                }
                self.awaiting = false;
                Some(HelperMessage::Reply(reply, descriptors))
            }
        })
    }
}

impl AsFd for Helper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

/// The address that a UDP socket is bound to; `None` for anything but a UDP socket on `port`.
pub(crate) fn bound_address(descriptor: BorrowedFd<'_>, port: u16) -> Option<IpAddr> {
    let bound = getsockname::<SockaddrStorage>(descriptor.as_raw_fd()).ok()?;
    let bound: SocketAddr = match (bound.as_sockaddr_in(), bound.as_sockaddr_in6()) {
        (Some(v4), _) => (v4.ip(), v4.port()).into(),
        (_, Some(v6)) => (v6.ip(), v6.port()).into(),
        _ => return None,
    };
    let is_udp = getsockopt(&descriptor, sockopt::SockType) == Ok(SockType::Datagram);
    (is_udp && bound.port() == port).then(|| bound.ip())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    fn pair() -> (Helper, Channel) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        (Helper::new(Channel::new(ours).unwrap()), Channel::new(theirs).unwrap())
    }

    #[test]
    fn an_answer_that_crosses_with_goodbye_is_no_breach() {
        let (mut helper, other) = pair();
        helper.request(&Request::CloseUdp).unwrap();
        other.send_reply(1, &Reply::Done, &[]).unwrap();
        helper.bye();
        assert!(matches!(helper.receive(), Ok(None)));
    }

    #[test]
    fn a_pong_is_sent_while_a_request_is_under_way() {
        let (mut helper, other) = pair();
        helper.request(&Request::CloseUdp).unwrap();
        helper.pong().unwrap();
        other.send_reply(1, &Reply::Done, &[]).unwrap();
        assert!(matches!(helper.receive(), Ok(Some(HelperMessage::Reply(Reply::Done, _)))));
    }

    #[test]
    fn an_answer_to_nothing_is_a_breach() {
        let (mut helper, other) = pair();
        other.send_reply(1, &Reply::Done, &[]).unwrap();
        assert_eq!(helper.receive().err(), Some(wgsep_ipc::Error::Unexpected));
    }

    #[test]
    fn only_udp_sockets_on_the_port_have_a_bound_address() {
        for address in ["127.0.0.1", "::1"] {
            let udp = std::net::UdpSocket::bind((address, 0)).unwrap();
            let port = udp.local_addr().unwrap().port();
            assert_eq!(bound_address(udp.as_fd(), port), Some(address.parse().unwrap()));
            assert_eq!(bound_address(udp.as_fd(), port ^ 1), None);
        }
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        assert_eq!(bound_address(tcp.as_fd(), port), None);
        let (unix, _) = std::os::unix::net::UnixDatagram::pair().unwrap();
        assert_eq!(bound_address(unix.as_fd(), 0), None);
    }
}
