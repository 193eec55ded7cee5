//! The same sequence of UAPI transactions and packets to wgsep and to wireguard-go: the answers'
//! errnos and the states that `wg show dump` tells are compared after each. What is known to differ
//! is in one table, [`DIFFERENCES`], with its reason; anything else that differs fails.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::UdpSocket;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use wgsep_proto::PrivateKey;
use wgsep_simulation::dice::Dice;
use wgsep_simulation::oracle::{Oracle, Session};
use wgsep_simulation::packet;
use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::{Wgsep, WireguardGo};
use wgsep_tests::netns::Netns;
use wgsep_tests::uapi::{Uapi, errno};
use wgsep_tests::wg::{PeerState, hex};
use wgsep_tests::{require, wait};

/// The variable that repeats a failed sequence.
const SEED: &str = "WGSEP_DIFFERENTIAL_SEED";
/// How long the random sequence lasts, and the most steps it takes.
const TIME: Duration = Duration::from_secs(20);
const STEPS: usize = 1000;
/// Transactions before the interfaces are up.
const STEPS_DOWN: usize = 20;
/// How long two daemons may take to come to the same state, or to answer a datagram.
const LIMIT: Duration = Duration::from_secs(5);

/// Where the speaker sends from; its datagrams come to both daemons from the same address.
const SPEAKER: &str = "127.0.0.1:40000";
const SPEAKER_SEED: u64 = 40;
const SPEAKER_INNER: &str = "10.66.0.2";
const DAEMON_INNER: &str = "10.66.0.1";
/// A port that something else has in both namespaces.
const OCCUPIED: u16 = 41_000;
const PORTS: [u16; 3] = [50_001, 50_002, 50_003];
const MTU: usize = 1420;

// ------------------------------------------------------------ what differs

/// A transaction that the two take differently.
struct Difference {
    what: &'static str,
    why: &'static str,
    /// Taken by both, and the same, before.
    before: &'static [&'static str],
    transaction: &'static str,
    /// The errno of each; `None` for a connection closed without an answer.
    errnos: [Option<i32>; 2],
    /// What the state of each says, and what it does not say, afterwards.
    says: [Says; 2],
}

/// A line of a `get`, and whether it is there.
type Says = (&'static str, bool);

/// True of every state: the interface has this key throughout.
const ANYTHING: Says = ("private_key=", true);

macro_rules! private {
    ($byte:literal) => {
        concat!(
            $byte, $byte, $byte, $byte, $byte, $byte, $byte, $byte, $byte, $byte, $byte, $byte,
            $byte, $byte, $byte, $byte, $byte, $byte, $byte, $byte, $byte, $byte, $byte, $byte,
            $byte, $byte, $byte, $byte, $byte, $byte, $byte, $byte, "\n"
        )
    };
}

macro_rules! key {
    (own) => {
        "public_key=a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209\n"
    };
    (a) => {
        "public_key=abababababababababababababababababababababababababababababababab\n"
    };
    (b) => {
        "public_key=cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd\n"
    };
}

const DIFFERENCES: [Difference; 16] = [
    Difference {
        what: "a set with a bad line at its end",
        why: "a set is applied as a whole or not at all; a peer applies it line by line",
        before: &[],
        transaction: concat!("set=1\n", key!(a), "endpoint=192.0.2.1:5\nendpoint=nonsense\n\n"),
        errnos: [Some(-22), Some(-22)],
        says: [("endpoint=192.0.2.1:5", false), ("endpoint=192.0.2.1:5", true)],
    },
    Difference {
        what: "a port that another socket has",
        why: "the old sockets live on where the new fail; a peer is left with none",
        before: &["set=1\nlisten_port=50001\n\n"],
        transaction: "set=1\nlisten_port=41000\n\n",
        errnos: [Some(-98), Some(-98)],
        says: [("listen_port=50001", true), ("listen_port=50001", false)],
    },
    Difference {
        what: "a mark in hexadecimal",
        why: "wg(8) shows and takes marks so; nothing is lost by taking it here too",
        before: &[],
        transaction: "set=1\nfwmark=0xca6c\n\n",
        errnos: [Some(0), Some(-22)],
        says: [("fwmark=51820", true), ("fwmark=", false)],
    },
    Difference {
        what: "an allowed IP taken away",
        why: "the protocol has since got `allowed_ip=-`; this release of the peer is older",
        before: &[concat!("set=1\n", key!(a), "allowed_ip=10.0.0.0/8\n\n")],
        transaction: concat!("set=1\n", key!(a), "allowed_ip=-10.0.0.0/8\n\n"),
        errnos: [Some(0), Some(-22)],
        says: [("allowed_ip=10.0.0.0/8", false), ("allowed_ip=10.0.0.0/8", true)],
    },
    Difference {
        what: "a prefix length with a sign",
        why: "a number is decimal digits and nothing else",
        before: &[],
        transaction: concat!("set=1\n", key!(a), "allowed_ip=10.0.0.0/+8\n\n"),
        errnos: [Some(-22), Some(0)],
        says: [("allowed_ip=", false), ("allowed_ip=10.0.0.0/8", true)],
    },
    Difference {
        what: "replace_allowed_ips after an allowed_ip",
        why: "the kernel's order: a peer's flags are applied before its allowed IPs",
        before: &[],
        transaction: concat!(
            "set=1\n",
            key!(a),
            "allowed_ip=10.0.0.0/8\nreplace_allowed_ips=true\n\n"
        ),
        errnos: [Some(0), Some(0)],
        says: [("allowed_ip=10.0.0.0/8", true), ("allowed_ip=", false)],
    },
    Difference {
        what: "remove after an allowed_ip that another peer has",
        why: "the kernel's order: a peer that is removed takes nothing from another first",
        before: &[concat!("set=1\n", key!(a), "allowed_ip=10.0.0.0/8\n\n")],
        transaction: concat!("set=1\n", key!(b), "allowed_ip=10.0.0.0/8\nremove=true\n\n"),
        errnos: [Some(0), Some(0)],
        says: [("allowed_ip=10.0.0.0/8", true), ("allowed_ip=", false)],
    },
    Difference {
        what: "update_only after an allowed_ip that another peer has",
        why: "the kernel's order: a peer that does not exist takes nothing from another",
        before: &[concat!("set=1\n", key!(a), "allowed_ip=10.0.0.0/8\n\n")],
        transaction: concat!("set=1\n", key!(b), "allowed_ip=10.0.0.0/8\nupdate_only=true\n\n"),
        errnos: [Some(0), Some(0)],
        says: [("allowed_ip=10.0.0.0/8", true), ("allowed_ip=", false)],
    },
    Difference {
        what: "two private keys, the first of which is a peer's",
        why: "a set is one change: the key that is not kept removes no peer",
        before: &[concat!("set=1\n", key!(own), "\n")],
        transaction: concat!(
            "set=1\nprivate_key=",
            private!("01"),
            "private_key=",
            private!("07"),
            "\n"
        ),
        errnos: [Some(0), Some(0)],
        says: [(key!(own), true), (key!(own), false)],
    },
    Difference {
        what: "an IPv4 endpoint written as an IPv6 one",
        why: "one address has one form, or a peer roams without moving",
        before: &[],
        transaction: concat!("set=1\n", key!(a), "endpoint=[::ffff:192.0.2.1]:5\n\n"),
        errnos: [Some(0), Some(0)],
        says: [("endpoint=192.0.2.1:5", true), ("endpoint=[::ffff:192.0.2.1]:5", true)],
    },
    Difference {
        what: "an endpoint with a scope by name",
        why: "a link-local endpoint shown without its scope cannot be set again",
        before: &[],
        transaction: concat!("set=1\n", key!(a), "endpoint=[fe80::1%lo]:5\n\n"),
        errnos: [Some(0), Some(0)],
        says: [("endpoint=[fe80::1%1]:5", true), ("endpoint=[fe80::1]:5", true)],
    },
    Difference {
        what: "an endpoint with a scope by number",
        why: "a link-local endpoint shown without its scope cannot be set again",
        before: &[],
        transaction: concat!("set=1\n", key!(a), "endpoint=[fe80::1%1]:5\n\n"),
        errnos: [Some(0), Some(0)],
        says: [("endpoint=[fe80::1%1]:5", true), ("endpoint=[fe80::1]:5", true)],
    },
    Difference {
        what: "a get with another line",
        why: "wg(8) takes a positive errno in answer to a get",
        before: &[],
        transaction: "get=1\nset=1\n\n",
        errnos: [Some(22), Some(-22)],
        says: [ANYTHING, ANYTHING],
    },
    Difference {
        what: "a get of another version",
        why: "a bad transaction is answered, and the connection continues",
        before: &[],
        transaction: "get=2\n\n",
        errnos: [Some(71), None],
        says: [ANYTHING, ANYTHING],
    },
    Difference {
        what: "a set of another version",
        why: "a bad transaction is answered, and the connection continues",
        before: &[],
        transaction: "set=2\n\n",
        errnos: [Some(-71), None],
        says: [ANYTHING, ANYTHING],
    },
    Difference {
        what: "an empty transaction",
        why: "a bad transaction is answered, and the connection continues",
        before: &[],
        transaction: "\n",
        errnos: [Some(-71), None],
        says: [ANYTHING, ANYTHING],
    },
];

#[test]
fn what_is_known_to_differ_does_so_as_the_table_says() {
    require!(Wgsep, WireguardGo);
    let pair = Pair::start();
    pair.set_up();
    for difference in &DIFFERENCES {
        let Difference { what, why, before, transaction, errnos, says } = difference;
        pair.reset();
        for transaction in *before {
            assert_eq!(pair.both(transaction), [Some(0), Some(0)], "before {what}");
        }
        assert_eq!(pair.both(transaction), *errnos, "{what} ({why})");
        for (daemon, (line, is_there)) in pair.daemons().into_iter().zip(says) {
            let state = transact(daemon, "get=1\n\n").unwrap();
            let found = state.lines().any(|reported| reported.starts_with(line.trim_end()));
            assert_eq!(found, *is_there, "{line} of {}: {what} ({why})\n{state}", daemon.interface);
        }
    }
}

#[test]
fn what_a_peer_may_not_send_is_not_counted_as_received() {
    require!(Wgsep, WireguardGo);
    let pair = Pair::start();
    pair.set_up();
    let peer = format!("set=1\npublic_key={}\nallowed_ip={SPEAKER_INNER}/32\n\n", speaker_key());
    assert_eq!(pair.both(&peer), [Some(0), Some(0)]);
    let received = || pair.daemons().map(|daemon| daemon.peer().received);
    let mut speakers = pair.daemons().map(|daemon| {
        Speaker::shake_hands(&daemon.netns, &device_key(daemon), [0; 32], pair.port()).unwrap()
    });
    for packet in UNCOUNTED {
        let before = received();
        let lengths = speakers.each_mut().map(|speaker| {
            speaker.send(packet, pair.port(), &mut Dice::new(1));
            let refused = speaker.last.len() as u64;
            // Taken in order: once it is counted, so is what came before it.
            speaker.send(Packet::Keepalive, pair.port(), &mut Dice::new(1));
            [speaker.last.len() as u64, speaker.last.len() as u64 + refused]
        });
        let expected = [before[0] + lengths[0][0], before[1] + lengths[1][1]];
        wait::until(&format!("{expected:?} bytes after {packet:?}"), LIMIT, || {
            received() == expected
        });
    }
}

/// This release of wireguard-go does not notice that its interface goes down.
#[test]
fn a_link_taken_down_closes_the_sockets_of_wgsep_alone() {
    require!(Wgsep, WireguardGo);
    let pair = Pair::start();
    pair.set_up();
    let port = pair.port();
    for Daemon { netns, interface, .. } in pair.daemons() {
        netns.run(format!("ip link set {interface} down"));
    }
    wait::until("wgsep has closed its sockets", LIMIT, || !has_socket(&pair.wgsep.netns, port));
    assert!(has_socket(&pair.other.netns, port), "wireguard-go noticed: compare it then");
}

// ------------------------------------------------------------ both daemons

/// Both daemons, each alone in a namespace, with what is at the same addresses in both.
struct Pair {
    wgsep: Daemon,
    other: Daemon,
    /// Held for as long as the daemons run.
    _occupied: [UdpSocket; 2],
}

impl Pair {
    #[track_caller]
    fn start() -> Self {
        let [first, second] = [Netns::new(), Netns::new()];
        let occupied = [&first, &second].map(|netns| bind(netns, &format!("0.0.0.0:{OCCUPIED}")));
        let wgsep = Daemon::start(Wgsep, &first);
        let other = Daemon::start(WireguardGo, &second);
        let pair = Self { wgsep, other, _occupied: occupied };
        for Daemon { netns, interface, .. } in pair.daemons() {
            // Nothing is to be sent that the test does not send.
            netns.run(format!("sysctl -q net.ipv6.conf.{interface}.disable_ipv6=1"));
            netns.run(format!("ip link set {interface} mtu {MTU}"));
            netns.run(format!("ip addr add {DAEMON_INNER}/24 dev {interface}"));
        }
        pair.reset();
        pair
    }

    fn daemons(&self) -> [&Daemon; 2] {
        [&self.wgsep, &self.other]
    }

    /// The errnos of both to a transaction.
    fn both(&self, transaction: &str) -> [Option<i32>; 2] {
        self.daemons()
            .map(|daemon| transact(daemon, transaction).and_then(|reported| errno(&reported)))
    }

    /// Gives both the configuration that sequences begin with.
    #[track_caller]
    fn reset(&self) {
        let set = format!(
            "set=1\nprivate_key={}\nlisten_port={}\nfwmark=0\nreplace_peers=true\n\n",
            "07".repeat(32),
            PORTS[0]
        );
        assert_eq!(self.both(&set), [Some(0), Some(0)]);
    }

    /// Sets both interfaces up, and waits until both have a socket.
    #[track_caller]
    fn set_up(&self) {
        for Daemon { netns, interface, .. } in self.daemons() {
            netns.run(format!("ip link set {interface} up"));
            wait::until(&format!("{interface} has a socket"), LIMIT, || {
                has_socket(netns, self.port())
            });
        }
    }

    fn port(&self) -> u16 {
        self.wgsep.listen_port()
    }

    /// The states of both once they are the same, or as they stay different.
    fn states(&self) -> [BTreeSet<String>; 2] {
        let look = || self.daemons().map(|daemon| state(daemon));
        wait::poll(LIMIT, || Some(look()).filter(|[wgsep, other]| wgsep == other))
            .unwrap_or_else(look)
    }
}

fn has_socket(netns: &Netns, port: u16) -> bool {
    !netns.run(format!("ss -Hlun sport = {port}")).is_empty()
}

fn device_key(daemon: &Daemon) -> String {
    daemon.wg("show", "public-key").trim().to_owned()
}

#[track_caller]
fn bind(netns: &Arc<Netns>, address: &str) -> UdpSocket {
    netns.inside(|| UdpSocket::bind(address)).unwrap()
}

/// What a daemon answers on a connection of its own; `None` if it hangs up.
fn transact(daemon: &Daemon, transaction: &str) -> Option<String> {
    let mut uapi = Uapi::connect(&daemon.interface).unwrap();
    uapi.send(transaction.as_bytes()).unwrap();
    match uapi.receive() {
        Ok(answer) => Some(answer),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => None,
        Err(error) => panic!("{} to {transaction:?}: {error}", daemon.interface),
    }
}

/// What `wg show dump` tells of a daemon, with what may differ between equals taken out: the order
/// of peers and of their allowed IPs, and when exactly a handshake was.
#[track_caller]
fn state(daemon: &Daemon) -> BTreeSet<String> {
    let dump = daemon.wg("show", "dump");
    let lines = dump.lines().map(|line| {
        let mut columns: Vec<_> = line.split('\t').map(str::to_owned).collect();
        if let [_, _, _, allowed_ips, handshake, ..] = &mut columns[..] {
            let mut sorted: Vec<_> = allowed_ips.split(',').collect();
            sorted.sort_unstable();
            *allowed_ips = sorted.join(",");
            if handshake != "0" {
                let age = since_epoch().as_secs().abs_diff(handshake.parse().unwrap());
                *handshake = if age < 600 { "recently".into() } else { format!("{age} s ago") };
            }
        }
        columns.join(" ")
    });
    lines.collect()
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

// ------------------------------------------------------------ a sequence

#[test]
fn a_random_sequence_leaves_both_in_the_same_state() {
    require!(Wgsep, WireguardGo);
    let given = std::env::var(SEED).ok().map(|seed| seed.parse().unwrap());
    let seed = given.unwrap_or_else(|| u64::from(since_epoch().subsec_nanos()));
    let mut sequence = Sequence {
        pair: Pair::start(),
        dice: Dice::new(seed),
        speakers: None,
        history: format!("{SEED}={seed}\n"),
        counts: Counts::default(),
    };
    for _ in 0..STEPS_DOWN {
        sequence.configure();
    }
    sequence.history.push_str("up\n");
    sequence.pair.set_up();
    let end = Instant::now() + TIME;
    for _ in 0..STEPS {
        if Instant::now() > end {
            break;
        }
        sequence.step();
    }
    // A sequence in which nothing happened would show nothing.
    let Counts { taken, refused, handshakes, echoes } = sequence.counts;
    let text = &sequence.history;
    assert!(taken > 10 && refused > 10 && handshakes > 1 && echoes > 1, "{text}");
}

/// What happened in a sequence.
#[derive(Default)]
struct Counts {
    taken: usize,
    refused: usize,
    handshakes: usize,
    echoes: usize,
}

/// A sequence under way.
struct Sequence {
    pair: Pair,
    dice: Dice,
    /// A peer made of snow, once for each daemon, while it has a keypair with both.
    speakers: Option<[Speaker; 2]>,
    /// All that happened so far: how to read a failure.
    history: String,
    counts: Counts,
}

impl Sequence {
    fn step(&mut self) {
        if self.dice.below(16) < 10 { self.configure() } else { self.exchange() }
    }

    #[track_caller]
    fn compare(&self, what: &str) {
        let [wgsep, other] = self.pair.states();
        assert_eq!(wgsep, other, "(wgsep's, wireguard-go's) after {what}, of:\n{}", self.history);
    }

    /// A transaction of random lines. Refused, it changes nothing in wgsep and stays half applied in
    /// wireguard-go; what that half is comes to the same when wgsep is given it.
    fn configure(&mut self) {
        let lines = Lines::random(&mut self.dice);
        self.history.push_str(&lines.whole());
        let before = state(&self.pair.wgsep);
        let errnos = self.pair.both(&lines.whole());
        assert_eq!(errnos[0], errnos[1], "(wgsep's, wireguard-go's) errno, of:\n{}", self.history);
        assert_eq!(errnos[0] == Some(0), lines.bad.is_none(), "{errnos:?}, of:\n{}", self.history);
        if lines.bad.is_some() {
            self.counts.refused += 1;
            // Counters may move by themselves, but no packet is on its way.
            assert_eq!(state(&self.pair.wgsep), before, "changed by:\n{}", self.history);
            let reported = transact(&self.pair.wgsep, &lines.half());
            assert_eq!(reported.as_deref().and_then(errno), Some(0), "{}", self.history);
            // A peer that a refused set made is not started in wireguard-go before the next one.
            let start = format!("set=1\npublic_key={}\nupdate_only=true\n\n", speaker_key());
            assert_eq!(self.pair.both(&start), [Some(0), Some(0)], "{}", self.history);
        } else {
            self.counts.taken += 1;
        }
        self.compare("a transaction");
        self.forget_lost_keypairs();
    }

    /// A new private key and a peer removed end what the speaker has; what its keypairs might still
    /// do is not for this test.
    fn forget_lost_keypairs(&mut self) {
        let is_known = self.speaker_as_peer().is_some_and(|peer| peer.latest_handshake != 0);
        let device_key = device_key(&self.pair.wgsep);
        if !is_known
            || self.speakers.iter().flatten().any(|speaker| speaker.device_key != device_key)
        {
            self.speakers = None;
        }
    }

    fn speaker_as_peer(&self) -> Option<PeerState> {
        let key = speaker_key();
        self.pair.wgsep.peers().into_iter().find(|peer| hex(&peer.public_key) == key)
    }

    /// A handshake with both, or a datagram to both.
    fn exchange(&mut self) {
        match self.speakers.take() {
            None => self.shake_hands(),
            Some(mut speakers) => {
                let packet = self.random_packet();
                writeln!(self.history, "packet: {packet:?}").unwrap();
                let dice = Dice::new(self.dice.roll());
                for speaker in &mut speakers {
                    speaker.send(packet, self.pair.port(), &mut dice.clone());
                }
                self.speakers = Some(speakers);
                self.counts.echoes += usize::from(packet == Packet::Echo);
                self.compare("a packet");
            }
        }
    }

    fn random_packet(&mut self) -> Packet {
        let packet = PACKETS[usize::try_from(self.dice.below(PACKETS.len() as u64)).unwrap()];
        let allowed_ips = self.speaker_as_peer().map(|peer| peer.allowed_ips).unwrap_or_default();
        let may_echo =
            allowed_ips.split(',').any(|ip| ip.strip_suffix("/32") == Some(SPEAKER_INNER));
        // Otherwise its source is foreign; see UNCOUNTED.
        if packet == Packet::Echo && !may_echo { Packet::Keepalive } else { packet }
    }

    fn shake_hands(&mut self) {
        let device_key = device_key(&self.pair.wgsep);
        let Some(peer) = self.speaker_as_peer().filter(|_| device_key != "(none)") else { return };
        self.history.push_str("handshake\n");
        let psk = match &*peer.preshared_key {
            "(none)" => [0; 32],
            psk => bytes(&hex(psk)),
        };
        let speakers = self
            .pair
            .daemons()
            .map(|daemon| Speaker::shake_hands(&daemon.netns, &device_key, psk, self.pair.port()));
        let answered = speakers.each_ref().map(Option::is_some);
        let [Some(first), Some(second)] = speakers else {
            panic!("an initiation was answered: {answered:?}, of:\n{}", self.history);
        };
        self.speakers = Some([first, second]);
        self.counts.handshakes += 1;
        self.compare("a handshake");
    }
}

// ------------------------------------------------------------ transactions

/// A random transaction.
struct Lines {
    good: String,
    /// The first bad line, and what follows it.
    bad: Option<String>,
}

/// What both refuse, for the device.
const BAD_DEVICE: [&str; 18] = [
    "private_key=",
    "private_key=0",
    "listen_port=65536",
    "listen_port=-1",
    "listen_port=+1",
    "listen_port= 1",
    "listen_port=",
    "fwmark=4294967296",
    "fwmark=0x",
    "fwmark=",
    "replace_peers=false",
    "replace_peers=1",
    "nonsense=1",
    "=",
    "endpoint=192.0.2.1:1",
    "errno=0",
    "listen_port=1 ",
    "no pair",
];

/// What both refuse, for a peer.
const BAD_PEER: [&str; 28] = [
    "allowed_ip=10.0.0.0",
    "allowed_ip=fd00::1",
    "allowed_ip=10.0.0.0/33",
    "allowed_ip=fd00::/129",
    "allowed_ip=10.0.0.0/-8",
    "allowed_ip=--10.0.0.0/8",
    "allowed_ip=fe80::1%lo/64",
    "allowed_ip=",
    "remove=yes",
    "remove=false",
    "update_only=1",
    "replace_allowed_ips=false",
    "persistent_keepalive_interval=65536",
    "persistent_keepalive_interval=off",
    "persistent_keepalive_interval=-1",
    "protocol_version=2",
    "listen_port=1",
    "preshared_key=zz",
    "preshared_key=",
    "endpoint=192.0.2.1",
    "endpoint=192.0.2.1:+5",
    "endpoint=01.2.3.4:5",
    "endpoint=[192.0.2.1]:5",
    "endpoint=::1:5",
    "endpoint=[fe80::1%nope]:9",
    "endpoint=host:5",
    "public_key=zz",
    "public_key",
];

/// Where no host is: no route leads there.
const ENDPOINTS: [&str; 5] =
    ["192.0.2.1:5", "192.0.2.2:65535", "[2001:db8::1]:7", "[2001:DB8:0:0::2]:08", "192.0.2.1:0"];

/// Overlapping, moved about between peers, some with bits beyond their length.
const ALLOWED_IPS: [&str; 9] = [
    "10.66.0.2/32",
    "10.66.0.0/16",
    "0.0.0.0/0",
    "10.1.2.3/8",
    "10.0.0.0/08",
    "::/0",
    "fd00::1:2/64",
    "2001:db8::/128",
    "::ffff:10.0.0.0/104",
];

impl Lines {
    fn random(dice: &mut Dice) -> Self {
        let mut good = "set=1\n".to_owned();
        if dice.chance(100) {
            good.push_str(&keepalive_lines(dice));
            return Self { good, bad: None };
        }
        if dice.chance(100) {
            good.push_str(&private_key_line(dice));
        }
        for _ in 0..dice.below(3) {
            good.push_str(&device_line(dice));
        }
        let bad_device = dice.chance(100).then(|| pick(dice, &BAD_DEVICE));
        let mut bad_peer = None;
        if bad_device.is_none() {
            for _ in 0..dice.below(4) {
                good.push_str(&peer_lines(dice));
                bad_peer = dice.chance(150).then(|| pick(dice, &BAD_PEER));
                if bad_peer.is_some() {
                    break;
                }
            }
        }
        let bad = bad_device.or(bad_peer).map(|line| format!("{line}\n{}", peer_lines(dice)));
        Self { good, bad }
    }

    fn whole(&self) -> String {
        format!("{}{}\n", self.good, self.bad.as_deref().unwrap_or_default())
    }

    /// Without the bad line and what follows it.
    fn half(&self) -> String {
        format!("{}\n", self.good)
    }
}

fn pick<'a>(dice: &mut Dice, from: &[&'a str]) -> &'a str {
    from[usize::try_from(dice.below(from.len() as u64)).unwrap()]
}

/// The private keys an interface may get.
fn device_private(number: u64) -> [u8; 32] {
    [u8::try_from(number + 1).unwrap(); 32]
}

/// A public key: of the speaker, of one of our own private keys, of no peer, or of low order.
fn public_key(dice: &mut Dice) -> String {
    match dice.below(9) {
        0..4 => speaker_key(),
        4 => {
            let own = PrivateKey::from_bytes(device_private(dice.below(2))).unwrap();
            to_hex(own.public_key().as_bytes())
        }
        5 => format!("01{}", "0".repeat(62)),
        number => format!("{number}A").repeat(32),
    }
}

/// Once at most: that a peer goes through both of two is in the table.
fn private_key_line(dice: &mut Dice) -> String {
    let key = if dice.chance(200) { [0; 32] } else { device_private(dice.below(2)) };
    format!("private_key={}\n", to_hex(&key))
}

fn device_line(dice: &mut Dice) -> String {
    match dice.below(12) {
        0 => "replace_peers=true\n".to_owned(),
        1..6 => format!("fwmark={}\n", pick(dice, &["0", "1", "51820", "4294967295"])),
        _ => format!("listen_port={}\n", PORTS[usize::try_from(dice.below(3)).unwrap()]),
    }
}

/// A keepalive of a peer that is nowhere: one of the speaker's would be sent at a time of its own in
/// each daemon.
fn keepalive_lines(dice: &mut Dice) -> String {
    let interval = pick(dice, &["0", "25", "007", "65535"]);
    format!("public_key={}\npersistent_keepalive_interval={interval}\n", "8a".repeat(32))
}

/// Flags come first, as wg(8) writes them; that their order matters to a peer is in the table.
fn peer_lines(dice: &mut Dice) -> String {
    let key = public_key(dice);
    let is_speaker = key == speaker_key();
    let mut lines = format!("public_key={key}\n");
    for (per_mille, flag) in [(100, "remove"), (100, "update_only"), (150, "replace_allowed_ips")] {
        // The speaker stays longer than others.
        if dice.chance(if is_speaker { per_mille / 4 } else { per_mille }) {
            writeln!(lines, "{flag}=true").unwrap();
        }
    }
    if is_speaker && dice.chance(700) {
        writeln!(lines, "allowed_ip={SPEAKER_INNER}/32").unwrap();
    }
    for _ in 0..dice.below(4) {
        match dice.below(8) {
            0 => writeln!(lines, "endpoint={}", pick(dice, &ENDPOINTS)),
            1 => writeln!(lines, "protocol_version=1"),
            2 => writeln!(lines, "preshared_key={}", to_hex(&[dice.below(2) as u8; 32])),
            _ => writeln!(lines, "allowed_ip={}", pick(dice, &ALLOWED_IPS)),
        }
        .unwrap();
    }
    lines
}

// ------------------------------------------------------------ the speaker

/// What the speaker may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packet {
    /// An echo request, which is answered if its source is the speaker's.
    Echo,
    /// One whose source the speaker may not use.
    ForeignSource,
    /// Nothing within.
    Keepalive,
    /// The last datagram once more.
    Replay,
    /// With a bit changed.
    Corrupt,
    /// To an unallocated index.
    WrongIndex,
    /// No IP packet within.
    NotIp,
    /// Random bytes.
    Garbage,
}

/// What both take the same.
const PACKETS: [Packet; 7] = [
    Packet::Echo,
    Packet::Echo,
    Packet::Keepalive,
    Packet::Replay,
    Packet::Corrupt,
    Packet::WrongIndex,
    Packet::Garbage,
];

/// What wireguard-go counts as received and wgsep, like the kernel, does not: what is dropped for
/// what is inside is no traffic of the peer's, though it proves where the peer is.
const UNCOUNTED: [Packet; 2] = [Packet::ForeignSource, Packet::NotIp];

/// A peer made of snow, in the namespace of the daemon it speaks to.
struct Speaker {
    socket: UdpSocket,
    session: Session,
    /// The device's, as wg(8) shows it.
    device_key: String,
    last: Vec<u8>,
}

fn speaker_key() -> String {
    to_hex(Oracle::new(&mut Dice::new(SPEAKER_SEED), [9; 32], [0; 32]).public_key())
}

impl Speaker {
    /// Initiates until it is answered, and confirms; `None` if it is not.
    fn shake_hands(netns: &Arc<Netns>, device_key: &str, psk: [u8; 32], port: u16) -> Option<Self> {
        let oracle = Oracle::new(&mut Dice::new(SPEAKER_SEED), bytes(&hex(device_key)), psk);
        let socket = bind(netns, SPEAKER);
        // An initiation may fall victim to the flood guard: a daemon takes so many a second.
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        wait::poll(LIMIT, || {
            let pending = oracle.initiate(tai64n(), 77);
            socket.send_to(&pending.datagram, ("127.0.0.1", port)).unwrap();
            let mut buffer = [0; 2048];
            let length = socket.recv(&mut buffer).ok()?;
            (length == 92).then(|| oracle.finish(pending, &buffer[..length]))
        })
        .map(|session| {
            let mut speaker =
                Self { socket, session, device_key: device_key.to_owned(), last: Vec::new() };
            speaker.send(Packet::Keepalive, port, &mut Dice::new(0));
            speaker
        })
    }

    fn send(&mut self, what: Packet, port: u16, dice: &mut Dice) {
        let echo = |source: &str| {
            let (source, destination) = (source.parse().unwrap(), DAEMON_INNER.parse().unwrap());
            let mut packet = packet::request(source, destination, packet::PING_LEN, 0, 1);
            let sum = echo_checksum(&packet[20..]);
            packet[22..24].copy_from_slice(&sum.to_be_bytes());
            packet
        };
        let datagram = match what {
            Packet::Echo => self.session.seal(&echo(SPEAKER_INNER)),
            Packet::ForeignSource => self.session.seal(&echo("172.16.0.1")),
            Packet::Keepalive => self.session.seal(&[]),
            Packet::NotIp => self.session.seal(&dice.bytes::<40>().map(|byte| byte & 0x0f)),
            Packet::Replay => self.last.clone(),
            Packet::Corrupt => {
                let mut datagram = self.session.seal(&echo(SPEAKER_INNER));
                datagram[20] ^= 1;
                datagram
            }
            Packet::WrongIndex => {
                let mut datagram = self.session.seal(&echo(SPEAKER_INNER));
                datagram[4] ^= 1;
                datagram
            }
            Packet::Garbage => dice.bytes::<148>().to_vec(),
        };
        self.socket.send_to(&datagram, ("127.0.0.1", port)).unwrap();
        self.last = datagram;
    }
}

/// Internet checksum of an ICMP message whose own is still zero.
fn echo_checksum(message: &[u8]) -> u16 {
    let words = message.chunks_exact(2);
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap()
}

/// The time of day, unwhitened: the speaker hides nothing.
fn tai64n() -> [u8; 12] {
    let now = since_epoch();
    let mut stamp = [0; 12];
    stamp[..8].copy_from_slice(&((1 << 62) + 10 + now.as_secs()).to_be_bytes());
    stamp[8..].copy_from_slice(&now.subsec_nanos().to_be_bytes());
    stamp
}

// ------------------------------------------------------------ keys

fn to_hex(key: &[u8; 32]) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A key from its hexadecimal.
fn bytes(hex: &str) -> [u8; 32] {
    std::array::from_fn(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap())
}
