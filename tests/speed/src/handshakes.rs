//! Initiations answered a second, by clients of which each begins a handshake in turn, over and over.
//!
//! A few are under way at once, so that there is always one to answer and never so many that they
//! look like a flood; a client that is asked for a cookie all the same shows it from then on. All are
//! made before the clock starts.

use std::io::{self, Write as _};
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use wgsep_proto::Instant as BootTime;
use wgsep_proto::noise::cookie::CookieGenerator;
use wgsep_proto::noise::handshake::{Handshake, StaticIdentity};
use wgsep_proto::noise::tai64n::Tai64n;
use wgsep_proto::wire::messages::{INITIATION_LEN, Message};
use wgsep_proto::{PrivateKey, PublicKey};
use wgsep_tests::uapi::{Uapi, errno};
use wgsep_tests::wg::{KeyPair, hex};

use crate::bed::Bed;
use crate::cpu::Meter;
use crate::quantity::Quantity::{HandshakeRate, Handshakes};
use crate::round::{Context, Measured};

/// Each may begin 50 handshakes a second, which is 50,000 of all.
const CLIENTS: usize = 1000;
/// Under way at once.
const WINDOW: u32 = 32;
/// An answer that takes longer is given up, in ms.
const ANSWER_LIMIT: u16 = 200;

/// How long the first handshakes with all clients may take.
const FIRST_LIMIT: Duration = Duration::from_secs(2);
/// No cookie grows old here.
const START: BootTime = BootTime::from_nanos(0);

type Datagram = [u8; INITIATION_LEN];

/// Initiations to one responder, which lack only their macs.
pub(crate) struct Initiations {
    clients: Vec<PublicKey>,
    datagrams: Vec<Datagram>,
}

/// A public key in wg(8)'s base64.
///
/// # Panics
///
/// When it is none.
#[track_caller]
pub(crate) fn public_key(base64: &str) -> PublicKey {
    let hex = hex(base64);
    let mut bytes = [0; 32];
    for (place, byte) in bytes.iter_mut().enumerate() {
        let digits = hex.get(2 * place..2 * place + 2);
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(value) => *byte = value,
            None => panic!("{base64:?} is no key"),
        }
    }
    PublicKey::from_bytes(bytes)
}

/// 32 bytes that no other pair of numbers gives; fit for this purpose alone.
fn seed(kind: u8, number: u64) -> [u8; 32] {
    let mut bytes = [kind; 32];
    // Not at the ends, where a private key is clamped.
    bytes[8..16].copy_from_slice(&number.to_le_bytes());
    bytes
}

impl Initiations {
    /// As many rounds as make at least `count`, and one more, each with one initiation of every
    /// client.
    ///
    /// # Panics
    ///
    /// When the responder's key is of low order, which no generated one is.
    #[track_caller]
    pub(crate) fn to(responder: &KeyPair, count: usize) -> Self {
        let responder = public_key(&responder.public);
        let private =
            (0..CLIENTS as u64).filter_map(|client| PrivateKey::from_bytes(seed(1, client)));
        let identities: Vec<_> = private.map(|key| StaticIdentity::new(&key)).collect();
        let mut handshakes: Vec<_> = identities.iter().map(|_| Handshake::new(responder)).collect();
        let rounds = 1 + count.div_ceil(identities.len());
        let mut datagrams = Vec::with_capacity(rounds * identities.len());
        for round in 1..=rounds as u64 {
            let stamp = Tai64n::from_wall(Duration::from_secs(round));
            for (identity, handshake) in identities.iter().zip(&mut handshakes) {
                let number = datagrams.len() as u64;
                let created =
                    handshake.create_initiation(identity, &seed(2, number), stamp, number as u32);
                let Ok(initiation) = created else { panic!("the responder's key is of low order") };
                let datagram = initiation.to_bytes();
                datagrams.push(datagram);
            }
        }
        let clients = identities.iter().map(|identity| *identity.public_key()).collect();
        Self { clients, datagrams }
    }

    /// Makes every client a peer of the bed's right end.
    ///
    /// # Panics
    ///
    /// When the daemon refuses.
    #[track_caller]
    fn introduce(&self, bed: &Bed) {
        let mut request = b"set=1\n".to_vec();
        for client in &self.clients {
            let _infallible = writeln!(request, "public_key={}", hex_of(client));
        }
        request.push(b'\n');
        configure(&bed.right.interface, &request);
    }
}

/// Puts mac1 into a handshake message to this responder; mac2 stays zero.
pub(crate) fn macs(responder: &PublicKey, datagram: &mut [u8]) {
    CookieGenerator::new(responder).add_macs(datagram, START);
}

/// A key as the UAPI has it.
pub(crate) fn hex_of(key: &PublicKey) -> String {
    key.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Gives a daemon a request of the UAPI.
///
/// # Panics
///
/// When it refuses.
#[track_caller]
pub(crate) fn configure(interface: &str, request: &[u8]) {
    let answer = Uapi::connect(interface).and_then(|mut uapi| {
        uapi.send(request)?;
        uapi.receive()
    });
    match answer {
        Ok(answer) if errno(&answer) == Some(0) => {}
        answer => panic!("the daemon of {interface} refused its configuration: {answer:?}"),
    }
}

/// How many are answered in a second, and in a second of processor time. The first handshake with a
/// peer takes a Diffie-Hellman more than those that follow, and is not counted.
#[track_caller]
pub(crate) fn measure(context: &Context<'_>) -> Vec<Measured> {
    let Some(end) = context.bed.right_end() else { return Vec::new() };
    let bed = context.bed;
    context.initiations.introduce(bed);
    let mut clients = match Clients::new(bed, &public_key(&end.key.public)) {
        Ok(clients) => clients,
        Err(error) => panic!("the clients' sockets: {error}"),
    };
    let (first, others) = context.initiations.datagrams.split_at(CLIENTS);
    clients.answered(first, FIRST_LIMIT);
    let meter = Meter::start(bed);
    let start = Instant::now();
    let answered = clients.answered(others, context.pace.handshakes);
    let seconds = start.elapsed().as_secs_f64();
    let usage = meter.stop();
    vec![
        Measured::new(HandshakeRate, answered / seconds, usage.disturbance),
        Measured::new(Handshakes, answered / usage.daemons.max(0.01), usage.disturbance),
    ]
}

/// All clients, each with a port and thereby a cookie of its own.
struct Clients {
    readable: Epoll,
    clients: Vec<(UdpSocket, CookieGenerator)>,
}

impl Clients {
    fn new(bed: &Bed, responder: &PublicKey) -> io::Result<Self> {
        let readable = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut clients = Vec::new();
        for number in 0..CLIENTS as u64 {
            let socket = bed.left.netns.inside(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
            socket.connect(bed.right_endpoint())?;
            socket.set_nonblocking(true)?;
            readable.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
            clients.push((socket, CookieGenerator::new(responder)));
        }
        Ok(Self { readable, clients })
    }

    /// Sends for so long, or until there are no more; each is its client's in turn. How many were
    /// answered.
    fn answered(&mut self, datagrams: &[Datagram], duration: Duration) -> f64 {
        let start = Instant::now();
        let mut next = (0..CLIENTS).cycle().zip(datagrams);
        let (mut answered, mut under_way) = (0_u32, 0_u32);
        while start.elapsed() < duration {
            while under_way < WINDOW
                && let Some((client, datagram)) = next.next()
            {
                self.send(client, datagram);
                under_way += 1;
            }
            if under_way == 0 {
                break;
            }
            let mut events = [EpollEvent::empty(); WINDOW as usize];
            match self.readable.wait(&mut events, ANSWER_LIMIT) {
                // Those that are under way are lost.
                Ok(0) | Err(_) => under_way = 0,
                Ok(ready) => {
                    for event in &events[..ready] {
                        under_way = under_way.saturating_sub(1);
                        answered += u32::from(self.is_answer(event.data() as usize));
                    }
                }
            }
        }
        answered.into()
    }

    fn send(&mut self, client: usize, datagram: &Datagram) {
        let mut datagram = *datagram;
        if let Some((socket, macs)) = self.clients.get_mut(client) {
            macs.add_macs(&mut datagram, START);
            // What the kernel has no room for is not answered.
            let _full = socket.send(&datagram);
        }
    }

    /// Whether what came to a client is a response. A cookie is kept for its next initiation.
    fn is_answer(&mut self, client: usize) -> bool {
        let mut buffer = [0; 2048];
        let Some((socket, macs)) = self.clients.get_mut(client) else { return false };
        let Ok(len) = socket.recv(&mut buffer) else { return false };
        match Message::parse(&buffer[..len]) {
            Some(Message::Response(_)) => true,
            Some(Message::CookieReply(reply)) => {
                let _not_genuine = macs.consume_reply(&reply, START);
                false
            }
            _ => false,
        }
    }
}
