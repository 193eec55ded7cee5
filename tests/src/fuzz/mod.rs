//! What the fuzzers in `tests/fuzz` call with their bytes, and the replay of their corpora too. Each function asserts
//! what must hold whatever the bytes are.

mod contract;

use self::contract::Dataplane;
use wgsep_dataplane::FuzzSession;
use wgsep_ipc::{FromHelper, MAX_FRAME, Request, VERSION, decode};
use wgsep_proto::device::control_plane::ControlPlane;
use wgsep_proto::{Configuration, PeerConfiguration, PublicKey};
use wgsep_simulation::dice::Dice;
pub use wgsep_simulation::fuzz::{Input, Target};
use wgsep_status::{MAX_REQUEST, Requests};

/// All targets but those of the protocol, which are in its crate.
pub const TARGETS: [Target; 5] = [
    ("ipc", ipc),
    ("uapi", uapi),
    ("requests", requests),
    ("status", status),
    ("preshared_keys", preshared_keys),
];

/// Whatever decodes as a message between helper and dataplane came in a whole frame of this version
/// and announces no more descriptors than its counts can say.
///
/// # Panics
/// If not.
pub fn ipc(data: &[u8]) {
    let requested = decode::<Request>(data).is_ok();
    let said = decode::<FromHelper>(data);
    if requested || said.is_ok() {
        assert!(data.len() <= MAX_FRAME && data.first() == Some(&VERSION));
    }
    if let Ok((_, message)) = said {
        assert!(message.descriptors() <= 6 + usize::from(u8::MAX));
    }
}

/// Whatever a dataplane sends the helper, each request gets its one answer, ports and marks are what the
/// operator granted, and everything else is a violation, of which it would die.
///
/// # Panics
/// If not.
pub fn requests(data: &[u8]) {
    let mut input = Input(data);
    let (mut dataplane, mut requests) = Dataplane::start(&mut input);
    while !input.is_empty() {
        match input.byte() {
            0..8 => dataplane.close(),
            0xc0.. => dataplane.ping(&mut requests),
            kind => (0..=kind % 4).for_each(|_| dataplane.speak(&mut input)),
        }
        for _ in 0..=input.byte() % 4 {
            contract::check_delay(&mut requests);
            let served = requests.serve();
            if !dataplane.check(&mut requests, &served) {
                return;
            }
        }
    }
}

/// Any input of a UAPI client, in pieces of any length: each transaction is answered once, a refused one
/// changes nothing, and the answer to a `get`, used as a `set`, gives a device with the same answer.
///
/// # Panics
/// If not.
pub fn uapi(data: &[u8]) {
    let session = || FuzzSession::new(ControlPlane::new(Box::new(Dice::new(17))));
    let mut client = session();
    let mut input = Input(data);
    let piece = usize::from(input.byte()).max(1);
    let mut before = client.state();
    for bytes in input.0.chunks(piece) {
        let answers = client.receive(bytes);
        let after = client.state();
        for answer in &answers {
            assert!(answer.ends_with(b"\n\n"), "an answer without end");
        }
        let ends = bytes.iter().filter(|byte| **byte == b'\n').count();
        assert!(answers.len() <= ends, "more answers than transactions");
        let is_success = |answer: &Vec<u8>| answer == b"errno=0\n\n";
        if !answers.iter().any(is_success) {
            assert_eq!(before, after, "changed by what was refused, or not whole");
        }
        before = after;
    }
    let mut twin = session();
    let answers = twin.receive(&as_set(&before));
    assert_eq!(answers, [b"errno=0\n\n".to_vec()], "our own words refused");
    assert!(twin.state() == before, "a round trip changed the configuration");
}

/// Any input of a client of the socket for preshared keys, in pieces of any length: each transaction is answered once and
/// tells nothing, what is kept is bounded, and the configuration differs in preshared keys alone, if a transaction was
/// taken.
///
/// # Panics
/// If not.
pub fn preshared_keys(data: &[u8]) {
    const MOST: usize = (64 + 16) * 1024;
    let mut device = ControlPlane::new(Box::new(Dice::new(17)));
    // Those that the inputs name.
    let peers =
        [[0xaa; 32], [0xbb; 32]].map(|key| PeerConfiguration::new(PublicKey::from_bytes(key)));
    device.configure(Configuration { peers: peers.into(), ..Configuration::default() });
    let mut client = FuzzSession::of_preshared_keys(device);
    let mut input = Input(data);
    let piece = usize::from(input.byte()).max(1);
    let without_keys = |state: &[u8]| {
        let text = String::from_utf8_lossy(state).into_owned();
        let others = text.lines().filter(|line| !line.starts_with("preshared_key="));
        others.map(str::to_owned).collect::<Vec<_>>()
    };
    let mut before = client.state();
    for bytes in input.0.chunks(piece) {
        let answers = client.receive(bytes);
        let after = client.state();
        assert!(client.held() <= MOST, "{} bytes are kept", client.held());
        for answer in &answers {
            let answer = String::from_utf8_lossy(answer);
            let errno = answer.strip_prefix("errno=").and_then(|rest| rest.strip_suffix("\n\n"));
            assert!(errno.is_some_and(|errno| errno.parse::<i32>().is_ok()), "{answer}");
        }
        let ends = bytes.iter().filter(|byte| **byte == b'\n').count();
        assert!(answers.len() <= ends, "more answers than transactions");
        assert_eq!(without_keys(&before), without_keys(&after), "more than keys was changed");
        if !answers.iter().any(|answer| answer == b"errno=0\n\n") {
            assert!(before == after, "changed by what was refused, or not whole");
        }
        before = after;
    }
}

/// Any input of a client of the status socket, in pieces of any length: what is kept is bounded, the two requests are
/// taken however they arrive, and everything else is refused for good.
///
/// # Panics
/// If not.
pub fn status(data: &[u8]) {
    let mut input = Input(data);
    let piece = usize::from(input.byte()).max(1);
    let (mut requests, mut taken, mut is_refused) = (Requests::default(), Vec::new(), false);
    for mut bytes in input.0.chunks(piece) {
        while !bytes.is_empty() && !is_refused {
            let (some, rest) = bytes.split_at(bytes.len().min(requests.room()));
            requests.push(some);
            bytes = rest;
            while let Some(request) = requests.take() {
                let Ok(request) = request else {
                    is_refused = true;
                    break;
                };
                taken.extend_from_slice(match request {
                    wgsep_status::Request::Get => b"get=1\n\n",
                    wgsep_status::Request::Watch => b"watch=1\n\n",
                });
            }
            assert!(is_refused || requests.room() > 0, "a client could send nothing more");
            assert!(requests.room() <= MAX_REQUEST);
        }
    }
    // What was taken is what was sent, up to what was refused or is not whole.
    assert!(input.0.starts_with(&taken));
    let rest = &input.0[taken.len()..];
    let is_request = rest.starts_with(b"get=1\n\n") || rest.starts_with(b"watch=1\n\n");
    assert!(!is_request, "a request was not taken");
    assert!(is_refused || rest.len() < MAX_REQUEST);
}

/// Converts the answer to a `get` to the `set` that restores it, without the lines that only a `get` has.
fn as_set(answer: &[u8]) -> Vec<u8> {
    const GET_ONLY: [&[u8]; 4] = [b"last_handshake_time_", b"tx_bytes=", b"rx_bytes=", b"errno="];
    let mut set = b"set=1\n".to_vec();
    for line in answer.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        if !GET_ONLY.iter().any(|key| line.starts_with(key)) {
            set.extend_from_slice(line);
            set.push(b'\n');
        }
    }
    set.push(b'\n');
    set
}
