//! Attack 10: clients of the UAPI socket that forget, dawdle and never end, a thousand of them. That
//! nobody else may connect is in `uapi`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use wgsep_tests::daemon::{Daemon, socket_path};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::Family;
use wgsep_tests::netns::Netns;
use wgsep_tests::traffic::{Pinging, until_ping};
use wgsep_tests::tunnel::{Plan, Tunnel};
use wgsep_tests::{procfs, require};

const CLIENTS: usize = 1000;
/// Descriptors that they may take together, and kilobytes.
const MOST_DESCRIPTORS: usize = 64;
const MOST_MEMORY: u64 = 16 * 1024;

/// Sends what a client of a number has to say now; one that was hung up on says nothing more.
fn speak(number: usize, client: &mut UnixStream, endless: &[u8]) {
    let said = match number % 3 {
        0 => return,
        1 => &b"a"[..],
        _ => endless,
    };
    let _hung_up = client.write(said);
}

/// Many, each with a transaction of this length, in bytes, which alone is allowed; together they have seven
/// times what is.
const LONG_CLIENTS: usize = 60;
const LONG: usize = 8 << 20;
/// What they may take together, in kilobytes: 64 MiB of text, in memory that doubles when it grows, and of
/// which each doubling leaves a block for the next of its size. Their text alone has 480 MiB.
const MOST_LONG_MEMORY: u64 = 400 << 10;

#[test]
fn attack_10_long_transactions_of_many_clients_are_bounded_together() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let dataplane = daemon.dataplane();
    let memory = || procfs::memory(dataplane, "VmRSS").unwrap();
    let used = memory();
    let connect = |_| UnixStream::connect(socket_path(&daemon.interface)).unwrap();
    let mut clients: Vec<_> = (0..LONG_CLIENTS).map(connect).collect();
    for client in &mut clients {
        client.write_all(b"set=1\n").unwrap();
    }
    let part = format!("fwmark={:0>1016}\n", 7).repeat(64);
    for _ in 0..LONG / part.len() {
        for client in &mut clients {
            client.write_all(part.as_bytes()).unwrap();
        }
        let more = memory().saturating_sub(used);
        assert!(more <= MOST_LONG_MEMORY, "{more} kB more");
    }
    // Whoever asks what is short is answered meanwhile.
    assert_eq!(daemon.listen_port(), 0);
    let mut outcomes = BTreeMap::<_, usize>::new();
    for client in &mut clients {
        client.write_all(b"\n").unwrap();
        let mut reply = [0; 64];
        let len = client.read(&mut reply).unwrap();
        *outcomes.entry(String::from_utf8_lossy(&reply[..len]).into_owned()).or_default() += 1;
    }
    let count = |errno: i32| outcomes.get(&format!("errno={errno}\n\n")).copied().unwrap_or(0);
    // EBUSY is 16. The others fill what there is, or nearly.
    assert_eq!(count(0) + count(-16), LONG_CLIENTS, "{outcomes:?}");
    assert!((4..=8).contains(&count(0)), "{outcomes:?}");
}

#[test]
fn attack_10_a_thousand_idle_slow_and_endless_clients_are_bounded_and_traffic_goes_on() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let dataplane = left.daemon.dataplane();
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    let pinging = Pinging::start(&left.daemon.netns, right.side.inner(Family::V4));
    let descriptors = || procfs::descriptors(dataplane).len();
    let memory = || procfs::memory(dataplane, "VmRSS").unwrap();
    let (before, used) = (descriptors(), memory());

    let endless = vec![b'a'; 32 * 1024];
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        let mut client = UnixStream::connect(socket_path(&left.daemon.interface)).unwrap();
        client.set_nonblocking(true).unwrap();
        speak(number, &mut client, &endless);
        clients.push(client);
        assert!(descriptors() <= before + MOST_DESCRIPTORS, "after {number} clients");
    }
    let begun = pinging.replies();
    while pinging.replies() < begun + 10 {
        for (number, client) in clients.iter_mut().enumerate() {
            speak(number, client, &endless);
        }
        assert!(descriptors() <= before + MOST_DESCRIPTORS);
        assert!(memory() <= used + MOST_MEMORY, "{} kB more", memory() - used);
    }
    // Whoever has something to ask is answered, all of them being there still.
    assert_eq!(left.daemon.listen_port(), left.port);
    let pings = pinging.stop();
    assert!(pings.received + 2 >= pings.sent, "{pings:?}");
}
