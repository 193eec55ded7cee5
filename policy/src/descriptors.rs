//! What a descriptor of another process is, as far as its link in /proc does not say it.

use crate::sys;
use nix::Error;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The protocol of a socket, such as `UNIX`, `UDP` or `NETLINK`, by its link in /proc/PID/fd, whatever
/// network namespace it is of (linux/net/socket.c, sockfs_xattr_get).
///
/// # Errors
/// ENOENT if it was closed meanwhile, EACCES if the process may not be looked at.
pub fn socket_protocol(link: &Path) -> nix::Result<String> {
    const NAME_LEN: usize = 64;
    let link = CString::new(link.as_os_str().as_bytes()).map_err(|_| Error::EINVAL)?;
    let mut name = [0; NAME_LEN];
    let len = sys::getxattr(&link, c"system.sockprotoname", &mut name)?;
    debug_assert!(len <= NAME_LEN, "getxattr(2) fills no more than the buffer");
    let name = name.get(..len).unwrap_or_default();
    Ok(String::from_utf8_lossy(name.strip_suffix(&[0]).unwrap_or(name)).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn sockets_are_recognised_by_their_protocol() {
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let protocol = |number: i32| socket_protocol(Path::new(&format!("/proc/self/fd/{number}")));
        assert_eq!(protocol(udp.as_raw_fd()).as_deref(), Ok("UDP"));
        assert!(protocol(unix.as_raw_fd()).unwrap().starts_with("UNIX"));
        assert_eq!(protocol(9999), Err(Error::ENOENT));
    }
}
