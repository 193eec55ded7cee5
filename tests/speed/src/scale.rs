//! What a packet costs among 10,000 peers, and what each of them costs.
//!
//! Two tunnels, one with a single peer at each end and one with 10,000, turn by turn. In both the
//! same 256 addresses are one peer's, scattered among those of the others, and every datagram goes
//! to another of them.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use wgsep_proto::PublicKey;
use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::tunnel::End;
use wgsep_tests::wg::hex;

use crate::bed::{Bed, Place};
use crate::cpu::Meter;
use crate::handshakes::{configure, hex_of};
use crate::memory::resident;
use crate::quantity::Quantity::{PeerMemory, ScaleCost};
use crate::round::{Common, Measured, PAIR_SECONDS};
use crate::udp::{Offer, offer};

const PEERS: u16 = 10_000;
const PEERS_AT_ONCE: usize = 250;
/// Every so many addresses one is the live peer's.
const SPACING: u16 = 40;
/// Datagrams a second: less than the tunnel can take, so that none is lost unpaid.
const RATE: f64 = 30_000.0;
const LEN: usize = 64;

/// The address with this number.
fn address(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 64, high, low).into()
}

/// The addresses that the live peer has.
fn live() -> impl Iterator<Item = IpAddr> {
    (0..PEERS).step_by(SPACING.into()).map(address)
}

/// The cost of a packet among many over that among few, turn by turn; and memory by the peer.
#[track_caller]
pub(crate) fn measure(common: &Common) -> Vec<Measured> {
    let [few, many] = [(); 2].map(|()| {
        let bed = Bed::of_daemons(common.veth, &common.key, |netns| Daemon::start(Wgsep, netns));
        spread(&bed);
        bed
    });
    let before = many.places().map(|place| resident(place, "VmRSS"));
    add_peers(&many.left);
    add_peers(&many.right);
    let after = many.places().map(|place| resident(place, "VmRSS"));
    let growth = (after[0] - before[0]).max(after[1] - before[1]);
    let added = f64::from(PEERS - PEERS / SPACING);
    let mut measured = vec![Measured::new(PeerMemory, growth / added, 0.0)];
    for number in 0..common.pace.pairs {
        let ((few, first), (many, second)) = if number.is_multiple_of(2) {
            let few = cost(&few);
            (few, cost(&many))
        } else {
            let many = cost(&many);
            (cost(&few), many)
        };
        measured.push(Measured::new(ScaleCost, many / few, f64::max(first, second)));
    }
    measured
}

/// Gives the right end the live peer's addresses, and the left end routes to them.
#[track_caller]
fn spread(bed: &Bed) {
    let Some(End { key, .. }) = bed.right_end() else { return };
    let mut request = format!("set=1\npublic_key={}\n", hex(&key.public)).into_bytes();
    for address in live() {
        let _infallible = writeln!(request, "allowed_ip={address}/32");
    }
    request.push(b'\n');
    configure(&bed.left.interface, &request);
    bed.left.netns.run(format!("ip route add 10.64.0.0/16 dev {}", bed.left.interface));
    bed.right.netns.run("ip route add local 10.64.0.0/16 dev lo");
}

/// Adds all others, each with an address, none with a handshake. In many transactions: the text of one
/// takes memory, too, and is no part of what a peer costs.
#[track_caller]
fn add_peers(place: &Place) {
    let numbers: Vec<_> = (0..PEERS).filter(|number| number % SPACING != 0).collect();
    for some in numbers.chunks(PEERS_AT_ONCE) {
        let mut request = b"set=1\n".to_vec();
        for number in some {
            let mut key = [7; 32];
            key[..2].copy_from_slice(&number.to_le_bytes());
            let (key, address) = (hex_of(&PublicKey::from_bytes(key)), address(*number));
            let _infallible = writeln!(request, "public_key={key}\nallowed_ip={address}/32");
        }
        request.push(b'\n');
        configure(&place.interface, &request);
    }
}

/// Processor time of both ends for a packet, in seconds; and how disturbed it was.
#[track_caller]
fn cost(bed: &Bed) -> (f64, f64) {
    let destinations: Vec<_> = live().collect();
    let meter = Meter::start(bed);
    let duration = Duration::from_secs(PAIR_SECONDS);
    let rate = Some(RATE);
    let delivery = offer(bed, &Offer { len: LEN, rate, duration, destinations: &destinations });
    let usage = meter.stop();
    assert!(delivery.received > 0.0, "no datagram arrived");
    (usage.daemons / delivery.received, usage.disturbance)
}
