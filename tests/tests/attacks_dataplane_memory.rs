//! Root reads all of the dataplane's memory and looks for its keys (SECURITY.md, attack 6). The same
//! search finds them in wireguard-go, so that it is known to see what there is.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::IoSliceMut;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use wgsep_proto::cookie::CookieGenerator;
use wgsep_proto::handshake::{Handshake, StaticIdentity};
use wgsep_proto::keypair::{Keypair, KeypairParts};
use wgsep_proto::keys::{PresharedKey, PrivateKey, PublicKey};
use wgsep_proto::messages::Message;
use wgsep_proto::tai64n::Tai64n;
use wgsep_proto::time::Instant;
use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::netns::Netns;
use wgsep_tests::tunnel::PORT;
use wgsep_tests::wg::{KeyPair, hex, preshared_key};
use wgsep_tests::{require, wait};

const LIMIT: Duration = Duration::from_secs(10);
const PAGE: usize = 4096;

fn bytes(base64: &str) -> [u8; 32] {
    let hex = hex(base64);
    std::array::from_fn(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
}

/// What is looked for: a name, and bytes.
struct Secret(&'static str, Vec<u8>);

/// A key in every form it may have been left in. Of its bytes two inner halves, which clamping does
/// not change, so that a part is found too.
fn forms(name: &'static str, key: &[u8; 32]) -> Vec<Secret> {
    vec![Secret(name, key[1..17].to_vec()), Secret(name, key[15..31].to_vec())]
}

fn texts(name: &'static str, base64: &str) -> Vec<Secret> {
    let hex = hex(base64);
    let texts =
        [&hex[..32], &hex[32..], &hex.to_uppercase()[2..34], &base64[..20], &base64[20..40]];
    texts.into_iter().map(|text| Secret(name, text.as_bytes().to_vec())).collect()
}

/// A daemon with a peer that is this test, which therefore knows every key, in the middle of a
/// session.
struct Served {
    daemon: Daemon,
    secrets: Vec<Secret>,
}

impl Served {
    fn by(implementation: Implementation) -> Self {
        let netns = Netns::new();
        let daemon = Daemon::start(implementation, &netns);
        let (theirs, ours, psk) = (KeyPair::generate(), KeyPair::generate(), preshared_key());
        daemon.wg_conf(
            "setconf",
            &format!(
                "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\n[Peer]\nPublicKey = {}\n\
                 PresharedKey = {psk}\nAllowedIPs = 10.9.0.2/32\n",
                theirs.private, ours.public
            ),
        );
        netns.run(format!("ip link set {} up", daemon.interface));
        // Keys leave the daemon as text, too.
        assert!(daemon.wg("show", "dump").contains(&theirs.private));

        let session = handshake(&netns, &theirs, &ours, &psk);
        wait::until("the session is confirmed", LIMIT, || daemon.peer().latest_handshake != 0);
        let mut secrets = forms("private key", &bytes(&theirs.private));
        secrets.extend(texts("private key", &theirs.private));
        secrets.extend(forms("preshared key", &bytes(&psk)));
        secrets.extend(texts("preshared key", &psk));
        secrets.extend(forms("receiving key", &session.sending));
        secrets.extend(forms("sending key", &session.receiving));
        Self { daemon, secrets }
    }

    /// The names of the secrets that `pid`'s memory shows to root.
    fn found_in(&self, pid: Pid) -> BTreeSet<&'static str> {
        let mut found = BTreeSet::new();
        // Most of what is mapped was never used.
        for chunk in readable_memory(pid).filter(|chunk| *chunk != vec![0; chunk.len()]) {
            for Secret(name, needle) in &self.secrets {
                if contains(&chunk, needle) {
                    found.insert(*name);
                }
            }
        }
        found
    }
}

/// Shakes hands with the daemon as its peer, and sends what confirms the session.
fn handshake(netns: &Netns, theirs: &KeyPair, ours: &KeyPair, psk: &str) -> KeypairParts {
    let socket = netns.inside(|| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket.connect((Ipv4Addr::LOCALHOST, PORT)).unwrap();
    let identity = StaticIdentity::new(&PrivateKey::from_bytes(bytes(&ours.private)).unwrap());
    let remote = PublicKey::from_bytes(bytes(&theirs.public));
    let mut handshake = Handshake::new(remote);
    handshake.set_preshared_key(PresharedKey::from_bytes(bytes(psk)));

    let now = Instant::from_nanos(1);
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let ephemeral = bytes(&KeyPair::generate().private);
    let timestamp = Tai64n::from_wall(wall);
    let initiation = handshake.create_initiation(&identity, &ephemeral, timestamp, 7).unwrap();
    let mut datagram = initiation.to_bytes();
    CookieGenerator::new(&remote).add_macs(&mut datagram, now);
    socket.send(&datagram).unwrap();

    let mut answer = [0; 256];
    let len = socket.recv(&mut answer).unwrap();
    let Some(Message::Response(response)) = Message::parse(&answer[..len]) else {
        panic!("no response to the initiation");
    };
    handshake.consume_response(&identity, &response).unwrap();
    let parts = handshake.begin_session().unwrap();
    let keypair = Keypair::new(&parts, now);
    for counter in 0..3 {
        let mut keepalive = [0; 32];
        assert!(keypair.seal(counter, &mut keepalive));
        socket.send(&keepalive).unwrap();
    }
    parts
}

/// The mappings of a process that it can read itself: start, length and name.
fn mappings(pid: Pid) -> Vec<(usize, usize, String)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let readable = words.next()?.starts_with('r');
        let name = words.nth(3).unwrap_or_default().to_owned();
        let [start, end] = [start, end].map(|at| usize::from_str_radix(at, 16).unwrap());
        (readable && name != "[vvar]" && name != "[vsyscall]").then_some((start, end - start, name))
    };
    maps.lines().filter_map(parse).collect()
}

/// All that root can read of a process, in pieces that overlap by more than a key's length of text.
fn readable_memory(pid: Pid) -> impl Iterator<Item = Vec<u8>> {
    const PIECE: usize = 1 << 16;
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let pieces = mappings(pid).into_iter().flat_map(|(start, len, _)| {
        (0..len).step_by(PIECE).map(move |at| (start + at, (len - at).min(PIECE + PAGE)))
    });
    pieces.map(move |(start, len)| {
        let mut piece = vec![0; len];
        if memory.read_exact_at(&mut piece, start as u64).is_err() {
            // In part: page by page.
            for (number, page) in piece.chunks_mut(PAGE).enumerate() {
                let _unreadable_stays_zero =
                    memory.read_exact_at(page, (start + number * PAGE) as u64);
            }
        }
        piece
    })
}

fn contains(memory: &[u8], needle: &[u8]) -> bool {
    let first = needle[0];
    let mut rest = memory;
    while let Some(at) = rest.iter().position(|byte| *byte == first) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

#[test]
fn attack_06_root_finds_no_key_in_the_dataplanes_memory() {
    require!(Wgsep);
    let served = Served::by(Wgsep);
    let dataplane = served.daemon.dataplane();
    assert_eq!(served.found_in(dataplane), BTreeSet::new());
    assert_eq!(served.found_in(served.daemon.process.pid()), BTreeSet::new(), "in the helper");
    // The search does read this process.
    let known = served.daemon.interface.as_bytes();
    assert!(readable_memory(dataplane).any(|piece| contains(&piece, known)));
}

#[test]
fn attack_06_control_wireguard_go_shows_root_every_key() {
    require!(WireguardGo);
    let served = Served::by(WireguardGo);
    let all = ["preshared key", "private key", "receiving key", "sending key"];
    assert_eq!(served.found_in(served.daemon.process.pid()), BTreeSet::from(all));
}

#[test]
fn attack_06_secret_memory_is_refused_to_root_whichever_way() {
    require!(Wgsep);
    let served = Served::by(Wgsep);
    let dataplane = served.daemon.dataplane();
    let is_secret = |name: &str| name.starts_with("/secretmem");
    let secret: Vec<_> =
        mappings(dataplane).into_iter().filter(|(_, _, name)| is_secret(name)).collect();
    assert!(secret.iter().map(|(_, len, _)| len).sum::<usize>() > 1 << 20, "{secret:?}");
    let memory = File::open(format!("/proc/{dataplane}/mem")).unwrap();
    for (start, len, _) in secret {
        for at in [start, start + len - PAGE] {
            let mut byte = [0];
            let refused = memory.read_exact_at(&mut byte, at as u64).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(Errno::EIO as i32), "{refused}");
            let remote = [RemoteIoVec { base: at, len: 1 }];
            let read = process_vm_readv(dataplane, &mut [IoSliceMut::new(&mut byte)], &remote);
            assert_eq!(read, Err(Errno::EFAULT));
        }
    }
}
