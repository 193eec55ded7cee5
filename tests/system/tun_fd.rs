//! WG_TUN_FD: a TUN queue that the launcher opened.
#![allow(clippy::unwrap_used)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::Mode;
use wgsep_tests::daemon::{Daemon, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::output;
use wgsep_tests::{descriptors, require};

/// A queue of a new interface.
pub(crate) fn open_queue(netns: &Netns, name: &str, mode: OFlag, flags: libc::c_int) -> OwnedFd {
    netns.inside(|| {
        let queue = open("/dev/net/tun", mode | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
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

/// The one line of a start with this queue, which fails.
#[track_caller]
fn refusal(netns: &Arc<Netns>, interface: &str, queue: &OwnedFd) -> String {
    let command = Wgsep.command(netns, interface);
    // One that is not refused would serve for ever.
    let mut limited = netns.command("timeout");
    limited.arg("10").arg(command.get_program()).args(command.get_args());
    let number = descriptors::give(&mut limited, queue);
    limited.env("WG_TUN_FD", number.to_string());
    let refused = output(&mut limited);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!((refused.status.code(), error.lines().count()), (Some(1), 1), "{error}");
    error
}

/// Packets of a queue that is opened without IFF_NO_PI have four more bytes in front. The kernel does not
/// show which kind it is.
#[test]
fn a_queue_with_packet_information_is_refused_and_one_without_serves() {
    require!(Wgsep);
    let netns = Netns::new();
    for header in [0, libc::IFF_VNET_HDR] {
        let interface = unique_interface();
        let queue = open_queue(&netns, &interface, OFlag::O_RDWR, libc::IFF_TUN | header);
        let error = refusal(&netns, &interface, &queue);
        assert!(error.contains("IFF_NO_PI"), "{error}");
        drop(queue);

        let interface = unique_interface();
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | header;
        let queue = open_queue(&netns, &interface, OFlag::O_RDWR, flags);
        let daemon = Daemon::start_on(&interface, Wgsep, &netns, |command| {
            let number = descriptors::give(command, &queue);
            command.env("WG_TUN_FD", number.to_string());
        });
        daemon.wg("show", "listen-port");
    }
}

/// All that comes from peers would be dropped, or nothing sent.
#[test]
fn a_queue_that_cannot_be_read_or_not_be_written_is_refused() {
    require!(Wgsep);
    let netns = Netns::new();
    for mode in [OFlag::O_RDONLY, OFlag::O_WRONLY] {
        let interface = unique_interface();
        let queue = open_queue(&netns, &interface, mode, libc::IFF_TUN | libc::IFF_NO_PI);
        let error = refusal(&netns, &interface, &queue);
        assert!(error.contains("WG_TUN_FD") && error.contains("O_RDWR"), "{error}");
    }
}
