//! Traffic of every kind through one tunnel, alone and many flows at once, at the default MTU and at
//! one far above what any network carries in one piece.

use std::time::Duration;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::Family;
use wgsep_tests::traffic::{Load, flood, iperf, iperf_at_once};
use wgsep_tests::tunnel::{End, Tunnel, over_loopback};
use wgsep_tests::{require, wait};

/// The default, and one that makes outer packets of more than half of what IP can carry.
const MTUS: [u32; 2] = [1420, 34_736];

#[test]
fn all_traffic_passes_over_v4() {
    require!(Wgsep);
    all_traffic_passes(Family::V4);
}

#[test]
fn all_traffic_passes_over_v6() {
    require!(Wgsep);
    all_traffic_passes(Family::V6);
}

fn all_traffic_passes(outer: Family) {
    let (_middle, tunnel) = over_loopback(Wgsep);
    tunnel.know_each_other(outer);
    for mtu in MTUS {
        for (end, _other) in tunnel.directions() {
            end.daemon.netns.run(format!("ip link set {} mtu {mtu}", end.daemon.interface));
        }
        single_flows(&tunnel);
        for count in [4, 5, 50] {
            flows_at_once(&tunnel.left, &tunnel.right, count);
        }
    }
}

fn single_flows(tunnel: &Tunnel) {
    for (from, to) in tunnel.directions() {
        for inner in [Family::V4, Family::V6] {
            // ping(8) does not wait for what comes late, as behind a handshake on a busy machine; counters.rs has that none is
            // lost.
            wait::until(
                &format!("pings from the {:?}, {inner:?}", from.side),
                Duration::from_secs(10),
                || flood(&from.daemon.netns, to.side.inner(inner), 10).received >= 8,
            );
        }
    }
    let Tunnel { left, right } = tunnel;
    for (from, to, inner, load) in [
        (left, right, Family::V4, Load::Tcp),
        (right, left, Family::V6, Load::Tcp),
        (right, left, Family::V4, Load::UdpFlood),
        (left, right, Family::V6, Load::UdpFlood),
    ] {
        let (client, server) = (&from.daemon.netns, &to.daemon.netns);
        let received = iperf(client, server, to.side.inner(inner), load);
        assert!(received.bytes > 0, "{load:?} {inner:?} from the {:?}", from.side);
    }
}

fn flows_at_once(from: &End, to: &End, count: u16) {
    let address = to.side.inner(Family::V4);
    let flows = iperf_at_once(&from.daemon.netns, &to.daemon.netns, address, Load::Tcp, count);
    let starved = flows.iter().filter(|flow| flow.bytes == 0).count();
    assert_eq!(starved, 0, "of {count} flows at once, {starved} carried nothing");
}
