//! Attack 10: clients of the UAPI socket that forget, dawdle and never end, a thousand of them. That
//! nobody else may connect is in `uapi`.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::os::unix::net::UnixStream;

use wgsep_tests::daemon::socket_path;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::Family;
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
