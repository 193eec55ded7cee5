//! WG_TUN_FD: a TUN queue that the launcher opened.
#![allow(clippy::unwrap_used)]

use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::Mode;
use wgsep_tests::daemon::{Daemon, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::output;
use wgsep_tests::{descriptors, require};

/// A queue of a new interface.
fn open_queue(netns: &Netns, name: &str, flags: libc::c_int) -> OwnedFd {
    netns.inside(|| {
        let queue = open("/dev/net/tun", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
        // SAFETY: plain integers and bytes, for which zero is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the request is live and as TUNSETIFF reads it.
        let outcome =
            unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
        nix::Error::result(outcome).unwrap();
        queue
    })
}

/// Packets of a queue that is opened without IFF_NO_PI have four more bytes in front. The kernel does not
/// show which kind it is.
#[test]
fn a_queue_with_packet_information_is_refused_and_one_without_serves() {
    require!(Wgsep);
    let netns = Netns::new();
    for header in [0, libc::IFF_VNET_HDR] {
        let interface = unique_interface();
        let queue = open_queue(&netns, &interface, libc::IFF_TUN | header);
        let mut command = Wgsep.command(&netns, &interface);
        let number = descriptors::give(&mut command, &queue);
        command.env("WG_TUN_FD", number.to_string());
        let refused = output(&mut command);
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && error.contains("IFF_NO_PI"), "{error}");
        drop((queue, command));

        let interface = unique_interface();
        let queue = open_queue(&netns, &interface, libc::IFF_TUN | libc::IFF_NO_PI | header);
        let daemon = Daemon::start_on(&interface, Wgsep, &netns, |command| {
            let number = descriptors::give(command, &queue);
            command.env("WG_TUN_FD", number.to_string());
        });
        daemon.wg("show", "listen-port");
    }
}
