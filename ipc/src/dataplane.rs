//! The dataplane's end of the channel.

use crate::Error;
use crate::channel::{Channel, Received};
use crate::message::{MAX_FRAME, Request, decode};
use crate::reply::FromHelper;
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrStorage, getsockname, getsockopt, sockopt,
};
use std::os::fd::{AsRawFd, BorrowedFd};

impl Channel {
    /// Sends a request.
    ///
    /// # Errors
    /// If the other end is gone or reads nothing.
    pub fn send_request(&self, sequence: u32, request: &Request) -> Result<(), Error> {
        self.send(sequence, request, &[])
    }

    /// Receives a reply or a notice.
    ///
    /// # Errors
    /// If the frame is not one, or the number of descriptors is wrong.
    pub fn receive_from_helper(&self) -> Result<Received<FromHelper>, Error> {
        let mut bytes = [0; MAX_FRAME + 1];
        let Some((len, descriptors)) = self.receive(&mut bytes)? else {
            return Ok(Received::Nothing);
        };
        if len == 0 {
            return Ok(Received::Closed);
        }
        let (_, message): (_, FromHelper) = decode(bytes.get(..len).unwrap_or_default())?;
        if descriptors.len() != message.descriptors() {
            return Err(Error::Descriptors);
        }
        Ok(Received::Message(message, descriptors))
    }
}

/// True if a descriptor is a UDP socket of a family, bound to `port`.
#[must_use]
pub fn is_udp_socket(descriptor: BorrowedFd<'_>, v6: bool, port: u16) -> bool {
    let family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let bound = getsockname::<SockaddrStorage>(descriptor.as_raw_fd());
    let Ok(bound) = bound else { return false };
    let bound_port = match (bound.as_sockaddr_in(), bound.as_sockaddr_in6()) {
        (Some(v4), None) if family == AddressFamily::Inet => v4.port(),
        (None, Some(address)) if family == AddressFamily::Inet6 => address.port(),
        _ => return false,
    };
    bound_port == port && getsockopt(&descriptor, sockopt::SockType) == Ok(SockType::Datagram)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::tests::alone;
    use std::os::fd::AsFd;

    #[test]
    fn udp_sockets_are_told_by_family_type_and_port() {
        let _alone = alone();
        let v4 = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = v4.local_addr().unwrap().port();
        assert!(is_udp_socket(v4.as_fd(), false, port));
        assert!(!is_udp_socket(v4.as_fd(), true, port));
        assert!(!is_udp_socket(v4.as_fd(), false, port ^ 1));
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        assert!(!is_udp_socket(tcp.as_fd(), false, port));
    }
}
