//! WG_TUN_FD: a TUN queue that the launcher opened.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
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
fn refusal(netns: &Arc<Netns>, interface: &str, queue: impl AsFd) -> String {
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

/// The kernel gives no packets to a detached queue, which can be written to all the same.
#[test]
fn a_detached_queue_is_refused_and_an_attached_one_of_the_same_kind_serves() {
    require!(Wgsep);
    let (netns, interface) = (Netns::new(), unique_interface());
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE;
    let queue = open_queue(&netns, &interface, OFlag::O_RDWR, flags);
    set_queue(&queue, libc::IFF_DETACH_QUEUE);
    let error = refusal(&netns, &interface, &queue);
    for named in ["WG_TUN_FD is a detached queue of", &interface, "; attach it (TUNSETQUEUE"] {
        assert!(error.contains(named), "{error}");
    }
    set_queue(&queue, libc::IFF_ATTACH_QUEUE);
    let daemon = Daemon::start_on(&interface, Wgsep, &netns, |command| {
        let number = descriptors::give(command, &queue);
        command.env("WG_TUN_FD", number.to_string());
    });
    daemon.wg("show", "listen-port");
}

/// TUNSETQUEUE, with IFF_ATTACH_QUEUE or IFF_DETACH_QUEUE.
fn set_queue(queue: &OwnedFd, flag: libc::c_int) {
    // SAFETY: plain integers and bytes, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    // SAFETY: the request is live and as TUNSETQUEUE reads it.
    let outcome = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
    nix::Error::result(outcome).unwrap();
}

#[test]
fn a_descriptor_without_an_interface_and_one_of_another_device_are_told_apart() {
    require!(Wgsep);
    let (netns, interface) = (Netns::new(), unique_interface());
    let unattached = open("/dev/net/tun", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
    let flags = libc::IFF_TUN | libc::IFF_NO_PI;
    let deleted = open_queue(&netns, &interface, OFlag::O_RDWR, flags);
    netns.run(format!("ip link del {interface}"));
    for queue in [unattached, deleted] {
        let error = refusal(&netns, &interface, &queue);
        assert!(error.contains("WG_TUN_FD is a queue of no interface: "), "{error}");
        assert!(error.contains("deleted") && error.contains("never attached"), "{error}");
    }
    let (pipe, _writer) = std::io::pipe().unwrap();
    let others = [File::open("/dev/null").unwrap().into(), OwnedFd::from(pipe)];
    for other in others {
        let error = refusal(&netns, &interface, &other);
        assert!(error.contains("WG_TUN_FD is not a TUN device; hand over"), "{error}");
    }
}
