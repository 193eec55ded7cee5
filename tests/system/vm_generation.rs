//! A virtual machine that was cloned or restored: keys that its copy has are not used again.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use wgsep_tests::daemon::{Daemon, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::kernel::{self, KernelPeer};
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::nft::Counter;
use wgsep_tests::process::{self, Process};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::traffic::{ping, until_ping};
use wgsep_tests::tunnel::{End, PORT, Plan, Tunnel};
use wgsep_tests::uevent::{self, Sender};
use wgsep_tests::{require, uapi, wait};

/// What the dataplane logs.
const DROPPED: &str = "this virtual machine was cloned or restored";
/// What nft sees of an initiation: 148 bytes and the UDP header.
const INITIATION: &str = "udp length 156";
/// How long it may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(10);

fn drops(end: &End) -> usize {
    end.daemon.process.log().matches(DROPPED).count()
}

/// A tunnel that carries packets, and whose last handshake was not just now: a peer takes a second
/// initiation within 20 ms for part of a flood.
fn tunnel() -> Tunnel {
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    settle(&tunnel.left, &tunnel.right);
    tunnel
}

fn settle(left: &End, right: &End) {
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    let pings = ping(&left.daemon.netns, right.side.inner(Family::V4), 3);
    assert!(pings.were_answered(), "{pings:?}");
}

#[test]
fn a_new_generation_has_the_peer_handshake_anew_at_once() {
    require!(Wgsep);
    let Tunnel { left, right } = &tunnel();
    let (ours, theirs) = (&left.daemon.netns, &right.daemon.netns);
    let [from_left, from_right] = [(ours, "left"), (theirs, "right")]
        .map(|(netns, name)| Counter::new(netns, name, "output", INITIATION));
    for number in 1..=2 {
        uevent::send(ours, Sender::Kernel, &["NEW_VMGENID=1"]);
        wait::until("the keys are dropped", LIMIT, || drops(left) == number);
        // Without a packet from either side, and without the five seconds between two handshakes.
        wait::until("it initiates", LIMIT, || from_left.packets() == number as u64);
        let pings = ping(theirs, left.side.inner(Family::V4), 3);
        assert!(pings.were_answered(), "{pings:?}");
    }
    assert_eq!(from_right.packets(), 0, "the peer waited for nothing");
    assert_eq!(drops(right), 0, "namespaces apart");
}

#[test]
fn other_device_events_and_those_of_other_programs_change_nothing() {
    require!(Wgsep);
    let Tunnel { left, .. } = &tunnel();
    let netns = &left.daemon.netns;
    let initiations = Counter::new(netns, "initiations", "output", INITIATION);
    for _ in 0..100 {
        uevent::send(netns, Sender::Kernel, &["NEW_VMGENID=0"]);
    }
    uevent::send(netns, Sender::Process, &["NEW_VMGENID=1"]);
    // The helper reads events in their order.
    uevent::send(netns, Sender::Kernel, &["NEW_VMGENID=1"]);
    wait::until("the keys are dropped", LIMIT, || drops(left) >= 1);
    wait::until("it initiates", LIMIT, || initiations.packets() >= 1);
    assert_eq!((drops(left), initiations.packets()), (1, 1));
}

/// What was lost may have been the one.
#[test]
fn events_lost_while_the_helper_did_not_run_count_as_a_new_generation() {
    require!(Wgsep);
    let Tunnel { left, right } = &tunnel();
    let netns = &left.daemon.netns;
    process::stop(left.daemon.process.pid());
    for _ in 0..2000 {
        uevent::send(netns, Sender::Kernel, &["NEW_VMGENID=0"]);
    }
    left.daemon.process.signal(Signal::SIGCONT);
    wait::until("the keys are dropped", LIMIT, || drops(left) >= 1);
    until_ping(netns, right.side.inner(Family::V4));
}

/// A /dev with the page of a host that counts copies; the page is a file.
fn dev_with_vmclock(dev: &Path) -> File {
    fs::create_dir_all(dev.join("net")).unwrap();
    for (node, major, minor) in [("null", "1", "3"), ("net/tun", "10", "200")] {
        process::run(Command::new("mknod").arg(dev.join(node)).args(["c", major, minor]));
    }
    let mut options = File::options();
    let page = options.write(true).create_new(true).open(dev.join("vmclock0")).unwrap();
    page.set_len(4096).unwrap();
    // Magic number, size 112, version 1; flag 8, that there is a counter (linux/vmclock-abi.h).
    page.write_all_at(b"VCLK\x70\0\0\0\x01\0", 0).unwrap();
    page.write_all_at(&(1_u64 << 8).to_le_bytes(), 24).unwrap();
    page
}

fn count_copy(page: &File, number: u64) {
    page.write_all_at(&number.to_le_bytes(), 104).unwrap();
}

/// A daemon that sees another /dev.
fn daemon_with_dev(netns: &Arc<Netns>, dev: &Path) -> Daemon {
    let interface = unique_interface();
    let script = format!(
        "mount --bind {} /dev && exec {} -f {interface}",
        dev.display(),
        wgsep_program("wgsep").display()
    );
    let mut command = netns.command("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-ec", &script]);
    let process = Process::spawn(command, "wgsep with a vmclock");
    wait::until("it answers", LIMIT, || uapi::is_answering(&interface));
    Daemon { process, interface, netns: Arc::clone(netns) }
}

#[test]
fn the_first_packet_finds_that_the_host_has_counted_a_copy() {
    require!(Wgsep);
    let scratch = Scratch::new();
    let page = dev_with_vmclock(&scratch.join("dev"));
    let (left, right) = link::joined();
    let left = End::new(Side::Left, daemon_with_dev(&left, &scratch.join("dev")));
    let right = End::new(Side::Right, Daemon::start(Wgsep, &right));
    left.configure(&right.key.public, Some(right.endpoint(Family::V4)), None);
    right.configure(&left.key.public, None, None);
    let netns = &left.daemon.netns;
    settle(&left, &right);
    let initiations = Counter::new(netns, "initiations", "output", INITIATION);
    for number in 1..=3 {
        count_copy(&page, number * 5);
        let pings = ping(netns, right.side.inner(Family::V4), 3);
        assert!(pings.were_answered(), "{pings:?}");
        assert_eq!(initiations.packets(), number, "a new key before the packet");
        wait::until("it is logged", LIMIT, || drops(&left) as u64 == number);
    }
}

/// The whole way: a machine of its own is saved, and a copy of it continues, as a host restores a
/// snapshot.
#[test]
fn a_restored_virtual_machine_has_new_keys() {
    require!(Wgsep);
    if !kernel::learns_of_copies_or_skips() {
        return;
    }
    let programs = ["wgsep", "wgsep-dataplane"].map(wgsep_program);
    let mut machine = KernelPeer::boot_with(&programs);
    machine.run("mkdir -p /etc /var/run/wireguard; touch /etc/passwd /etc/group");
    machine.run("wgsep --log-file /tmp/log wg1");
    let end = End::new(Side::Left, Daemon::start(Wgsep, &machine.netns));
    end.configure(&machine.key.public, None, None);

    machine.run(format!("echo {} >/tmp/key", machine.key.private));
    let (key, allowed) = (&end.key.public, end.side.inner(Family::V4));
    let endpoint = end.endpoint(Family::V4);
    machine.run(format!(
        "wg set wg1 private-key /tmp/key listen-port {PORT} peer {key} endpoint {endpoint} allowed-ips {allowed}/32"
    ));
    let inner = Side::Right.inner(Family::V4);
    machine.run(format!("ip addr add {inner}/24 dev wg1; ip link set wg1 up"));
    machine.until_ping(allowed);
    let initiations = Counter::new(&machine.netns, "initiations", "input", INITIATION);

    machine.continue_in_a_copy();
    wait::until("the copy initiates", LIMIT * 6, || initiations.packets() > 0);
    wait::until("it is logged", LIMIT, || machine.run("cat /tmp/log").contains(DROPPED));
    until_ping(&machine.netns, inner);
}
