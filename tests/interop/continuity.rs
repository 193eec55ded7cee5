//! What an implementation keeps of a tunnel when its configuration is set again, and when its process is killed: the table
//! in wgsep(8), Beside other implementations.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;
use wgsep_tests::implementation::Implementation::{
    self, Boringtun, Gotatun, NewestWireguardGo, Wgsep, WireguardGo,
};
use wgsep_tests::link::{Family, Side};
use wgsep_tests::traffic::{ping, until_ping};
use wgsep_tests::tunnel::{Plan, Tunnel};
use wgsep_tests::wg::output_with_input;
use wgsep_tests::{require, wait};

const LIMIT: Duration = Duration::from_secs(10);

/// What `wg syncconf` with the configuration as it is does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Syncconf {
    KeepsSessions,
    DropsSessions,
    /// A thread of it panics, and it carries no traffic from then on.
    BreaksIt,
}

fn loses_all_when_it_is_killed(one: Implementation, syncconf: Syncconf) {
    let mut tunnel = Plan::new(one, Wgsep).build();
    let Tunnel { left, right } = &mut tunnel;
    let theirs = Side::Right.inner(Family::V4);
    until_ping(&left.daemon.netns, theirs);
    let handshake = || right.daemon.peer().latest_handshake;
    let before = handshake();
    // Its time has seconds.
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    wait::until("another second", LIMIT, || now() > before);
    let configuration = left.daemon.wg("showconf", "");
    let line = format!("wg syncconf {} /dev/stdin", left.daemon.interface);
    let set = output_with_input(&line, &configuration);
    assert_eq!(set.status.success(), syncconf != Syncconf::BreaksIt, "{set:?}");
    match syncconf {
        Syncconf::BreaksIt => assert_eq!(ping(&left.daemon.netns, theirs, 3).received, 0),
        _ => until_ping(&left.daemon.netns, theirs),
    }
    assert_eq!(handshake() == before, syncconf != Syncconf::DropsSessions);

    left.daemon.netns.run(format!("ip route add 198.51.100.0/24 dev {}", left.daemon.interface));
    left.daemon.process.signal(Signal::SIGKILL);
    wait::until("the interface is gone", LIMIT, || !left.daemon.has_interface());
    assert!(!left.daemon.netns.run("ip route").contains("198.51.100.0"));
}

#[test]
fn wgsep_keeps_sessions_at_syncconf_and_nothing_when_killed_without_a_descriptor_store() {
    require!(Wgsep);
    loses_all_when_it_is_killed(Wgsep, Syncconf::KeepsSessions);
}

#[test]
fn control_wireguard_go_keeps_sessions_at_syncconf_and_nothing_when_killed() {
    require!(Wgsep, WireguardGo, NewestWireguardGo);
    for one in [WireguardGo, NewestWireguardGo] {
        loses_all_when_it_is_killed(one, Syncconf::KeepsSessions);
    }
}

#[test]
fn control_boringtun_breaks_at_syncconf_and_keeps_nothing_when_killed() {
    require!(Wgsep, Boringtun);
    loses_all_when_it_is_killed(Boringtun, Syncconf::BreaksIt);
}

#[test]
fn control_gotatun_drops_sessions_at_syncconf_and_keeps_nothing_when_killed() {
    require!(Wgsep, Gotatun);
    loses_all_when_it_is_killed(Gotatun, Syncconf::DropsSessions);
}
