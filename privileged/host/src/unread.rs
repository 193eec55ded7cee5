//! Whether what was sent on a Unix socket has been received.

use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Whether the other end has yet to receive something that was sent on a Unix socket (SO_MEMINFO of socket(7)).
///
/// # Errors
/// As getsockopt(2).
pub fn is_unread(socket: BorrowedFd<'_>) -> nix::Result<bool> {
    // The numbers up to SK_MEMINFO_WMEM_ALLOC, and their length in bytes.
    let (mut memory, mut len) = ([0u32; 3], 12);
    let (fd, to) = (socket.as_raw_fd(), (&raw mut memory).cast());
    // SAFETY: both are live, and the kernel writes no more numbers than the length says.
    Errno::result(unsafe {
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_MEMINFO, to, &raw mut len)
    })?;
    Ok(memory[libc::SK_MEMINFO_WMEM_ALLOC as usize] > 0)
}

#[cfg(test)]
mod tests {
    use super::is_unread;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;
    use std::thread;
    use std::time::{Duration, Instant};

    #[test]
    fn what_was_sent_is_unread_until_it_is_received_or_the_receiver_is_gone() {
        let (one, other) = UnixDatagram::pair().unwrap();
        assert_eq!(is_unread(one.as_fd()), Ok(false));
        for message in [&b""[..], b"x"] {
            one.send(message).unwrap();
            assert_eq!(is_unread(one.as_fd()), Ok(true));
            other.recv(&mut [0; 9]).unwrap();
            assert_eq!(is_unread(one.as_fd()), Ok(false));
        }
        one.send(b"x").unwrap();
        drop(other);
        // A child of another test has a copy of the receiver until it has executed its program.
        let deadline = Instant::now() + Duration::from_secs(10);
        while is_unread(one.as_fd()) == Ok(true) && Instant::now() < deadline {
            thread::yield_now();
        }
        assert_eq!(is_unread(one.as_fd()), Ok(false));
    }
}
