//! The table of events: what happens to a node or to its host, and how soon the tunnel works again.
//!
//! To add one, write a function that changes the `World`, leaves it so that the tunnel can work, and
//! says what it did; and give it a line in [`EVENTS`]. It takes every choice from the dice and none
//! from what it finds, so that a seed replays it. What a failure of the event itself would be, it
//! asserts.

mod hostile;
mod interface;
mod network;
mod peers;
mod processes;

use std::thread;
use std::time::Duration;

use wgsep_simulation::dice::Dice;
use wgsep_tests::link::Side;

use crate::world::World;

/// Something that happens.
pub struct Event {
    /// What it is called in the log and on the command line.
    pub name: &'static str,
    /// How soon after its end the tunnel works again, in both directions and both families.
    pub recovery: Recovery,
    /// What the lines contain that it may cause at level error.
    pub errors: &'static [&'static str],
    /// Makes it happen.
    pub(crate) run: fn(&mut World, &mut Dice) -> Outcome,
}

/// What an event did, or why it cannot happen on this machine.
pub(crate) type Outcome = Result<String, String>;

/// A limit and where it comes from.
#[derive(Clone, Copy, Debug)]
pub struct Recovery {
    /// The limit, margin included.
    pub limit: Duration,
    /// What in the protocol sets it.
    pub reason: &'static str,
}

/// Added to each limit for a machine of two processors on which another test runs. Less than
/// REKEY_TIMEOUT, so that a packet that needs no handshake is distinguished from one that waited for a
/// repeated initiation.
pub(crate) const MARGIN: Duration = Duration::from_secs(3);
/// REKEY_TIMEOUT and the greatest jitter.
const RETRY: Duration = Duration::from_millis(5333);

/// Sessions and endpoints are as before, or are learnt from the next packet.
const NEXT_PACKET: Recovery =
    Recovery { limit: MARGIN, reason: "sessions survive: the next packet gets through" };

/// A handshake is needed, and an initiation of before may have been lost: the next one is sent
/// REKEY_TIMEOUT after it, plus jitter.
const HANDSHAKE: Recovery = Recovery {
    limit: RETRY.saturating_add(MARGIN),
    reason: "one initiation may be lost: the next comes after REKEY_TIMEOUT and jitter",
};

/// Both ends lose their keypairs at the same moment. If their initiations cross, each end becomes the
/// responder and neither keypair is confirmed. Jitter separates the retries, except on a busy machine
/// where processing takes longer than the jitter.
const CROSSING: Recovery = Recovery {
    limit: RETRY.saturating_add(RETRY).saturating_add(MARGIN),
    reason: "the initiations of both ends may cross, on a busy machine twice: two retries",
};

/// As a handshake, of a responder that may be under load: the first initiation is then answered with
/// a cookie, which only the next one shows.
const COOKIE: Recovery = Recovery {
    limit: RETRY.saturating_add(RETRY).saturating_add(MARGIN),
    reason: "an initiation may be lost and the next be answered with a cookie: two retries",
};

/// The port is tried again 1 s, 3 s and 7 s after the first refusal, and is free after 2.5 s at most;
/// the initiations of before could not be sent.
const PORT_RETRY: Recovery = Recovery {
    limit: Duration::from_secs(2).saturating_add(RETRY).saturating_add(MARGIN),
    reason: "the port is tried again within 2 s, then the initiation after REKEY_TIMEOUT and jitter",
};

/// A table's line of an event that may log no error.
const fn event(
    name: &'static str,
    recovery: Recovery,
    run: fn(&mut World, &mut Dice) -> Outcome,
) -> Event {
    Event { name, recovery, errors: &[], run }
}

impl Event {
    /// The same, allowed to cause lines at level error that contain one of these texts.
    const fn logging(self, errors: &'static [&'static str]) -> Self {
        Self { errors, ..self }
    }
}

/// All events.
pub const EVENTS: &[Event] = &[
    // The interface. Link down forgets the keypairs.
    event("link-down-up", CROSSING, interface::down_up),
    event("link-flaps", HANDSHAKE, interface::flaps),
    event("mtu", NEXT_PACKET, interface::mtu),
    event("listen-port", NEXT_PACKET, interface::listen_port),
    event("listen-port-any", NEXT_PACKET, interface::any_listen_port),
    event("listen-port-taken", NEXT_PACKET, interface::taken_listen_port)
        .logging(&["UAPI set refused, nothing changed"]),
    event("listen-port-taken-at-up", PORT_RETRY, interface::taken_at_up)
        .logging(&["interface up, but"]),
    event("listen-port-back-and-forth", NEXT_PACKET, interface::listen_port_back_and_forth),
    event("fwmark", NEXT_PACKET, interface::mark),
    event("keepalive", NEXT_PACKET, interface::keepalive),
    event("move-namespace", HANDSHAKE, interface::move_namespace),
    // Keys and peers.
    event("private-key", CROSSING, peers::private_key),
    event("preshared-key", HANDSHAKE, peers::preshared_key),
    event("preshared-key-removed", HANDSHAKE, peers::no_preshared_key),
    event("peers-added", NEXT_PACKET, peers::add),
    event("peers-removed", NEXT_PACKET, peers::remove),
    event("allowed-ips-moved", NEXT_PACKET, peers::move_allowed_ips),
    event("allowed-ips-churn", NEXT_PACKET, peers::churn_allowed_ips),
    event("syncconf", NEXT_PACKET, peers::syncconf),
    event("setconf", HANDSHAKE, peers::setconf),
    event("peer-removed-and-back", HANDSHAKE, peers::remove_and_add),
    event("endpoint-family", NEXT_PACKET, peers::endpoint_family),
    // The underlay.
    event("underlay-down-up", NEXT_PACKET, network::down_up),
    event("renumber", NEXT_PACKET, network::renumber),
    event("second-path", NEXT_PACKET, network::second_path),
    event("second-path-down", NEXT_PACKET, network::second_path_down),
    event("underlay-mtu", NEXT_PACKET, network::narrow),
    event("underlay-mtu-for-a-while", NEXT_PACKET, network::narrow_for_a_while),
    event("routes", NEXT_PACKET, network::routes),
    event("rules", NEXT_PACKET, network::rules),
    event("ipv6-off-and-on", NEXT_PACKET, network::ipv6_off_and_on),
    event("blackout", NEXT_PACKET, network::blackout),
    event("loss-and-duplicates", HANDSHAKE, network::loss_and_duplicates),
    event("netlink-overrun", HANDSHAKE, network::netlink_overrun),
    // The processes.
    event("stop-dataplane", NEXT_PACKET, processes::stop_dataplane),
    event("stop-helper", NEXT_PACKET, processes::stop_helper),
    event("stop-both", NEXT_PACKET, processes::stop_both),
    event("starve", NEXT_PACKET, processes::starve),
    event("kill-helper", HANDSHAKE, processes::kill_helper),
    event("kill-dataplane", HANDSHAKE, processes::kill_dataplane),
    event("restart", HANDSHAKE, processes::restart),
    event("restart-both", CROSSING, processes::restart_both),
    event("restart-after-uptime", HANDSHAKE, processes::restart_after_uptime),
    event("debug", NEXT_PACKET, processes::toggle_debug),
    // Those who mean no good.
    event("garbage", NEXT_PACKET, hostile::garbage),
    event("initiation-flood", COOKIE, hostile::initiation_flood),
    event("uapi-hang", NEXT_PACKET, hostile::hang),
    event("uapi-garbage", NEXT_PACKET, hostile::uapi_garbage),
    event("uapi-close", NEXT_PACKET, hostile::close_midway),
    event("wg-show-burst", NEXT_PACKET, hostile::show_burst),
];

/// One of the two ends.
fn side(dice: &mut Dice) -> Side {
    if dice.chance(500) { Side::Left } else { Side::Right }
}

/// Lets time pass with the host as it is now, and traffic go on.
fn hold(time: Duration) {
    thread::sleep(time);
}

/// Milliseconds from one to another.
fn milliseconds(dice: &mut Dice, from: u64, to: u64) -> Duration {
    Duration::from_millis(from + dice.below(to - from + 1))
}
