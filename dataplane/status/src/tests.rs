//! The server with clients that behave, and with others.
#![allow(clippy::unwrap_used)]

use crate::client::{IDLE, MAX_QUEUED, PART_LEN, STALLED, STALLED_WHEN_FULL};
use crate::event::Event;
use crate::report::{Counters, Item, Peer};
use crate::server::{MAX_CLIENTS, Server, Source};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

const FIRST: u64 = 16;
const NOW: Duration = Duration::from_secs(1000);

/// A device of so many peers, each with one allowed IP.
struct Peers(u16);

impl Source<u16> for Peers {
    fn counters(&self) -> Counters {
        Counters { drops: vec![("no_peer", 3)], ..Counters::default() }
    }

    fn next(&self, position: &mut u16) -> Option<Item> {
        let number = *position / 2;
        let is_peer = position.is_multiple_of(2);
        *position += 1;
        (number < self.0).then(|| {
            if is_peer {
                Item::Peer(Box::new(Peer { rx_packets: number.into(), ..Peer::default() }))
            } else {
                Item::AllowedIp([10, 0, 0, 0].into(), 24)
            }
        })
    }

    fn accept(&self, listener: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
        let listener = UnixListener::from(listener.try_clone_to_owned().unwrap());
        match listener.accept() {
            Ok((client, _)) => {
                client.set_nonblocking(true).unwrap();
                Ok(client.into())
            }
            Err(error) => Err(nix::Error::from_raw(error.raw_os_error().unwrap())),
        }
    }
}

struct Bed {
    server: Server<u16>,
    epoll: Epoll,
    address: SocketAddr,
    source: Peers,
    now: Duration,
}

impl Bed {
    fn new(peers: u16) -> Self {
        let name = format!("wgsep-status-{}-{:?}", std::process::id(), std::thread::current().id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let mut server = Server::new(FIRST, 100);
        server.listen(listener.into(), &epoll).unwrap();
        Self { server, epoll, address, source: Peers(peers), now: NOW }
    }

    /// Handles events until there are none.
    fn run(&mut self) {
        let mut events = [EpollEvent::empty(); 64];
        for _ in 0..100_000 {
            let ready = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap();
            if ready == 0 {
                return;
            }
            for event in &events[..ready] {
                self.server.handle(event, &self.source, &self.epoll, self.now);
            }
        }
        panic!("events without end");
    }

    fn connect(&mut self) -> UnixStream {
        let client = UnixStream::connect_addr(&self.address).unwrap();
        client.set_nonblocking(true).unwrap();
        self.run();
        client
    }

    fn ask(&mut self, request: &[u8]) -> UnixStream {
        let mut client = self.connect();
        client.write_all(request).unwrap();
        self.run();
        client
    }

    /// What a client reads until there is no more; true if it is disconnected then.
    fn read(&mut self, client: &mut UnixStream) -> (String, bool) {
        let mut text = String::new();
        loop {
            let mut buffer = [0; 4096];
            match client.read(&mut buffer) {
                Ok(0) => return (text, true),
                Ok(len) => text.push_str(std::str::from_utf8(&buffer[..len]).unwrap()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return (text, false),
                Err(_) => return (text, true),
            }
            self.run();
        }
    }

    fn publish(&mut self, event: &Event) {
        self.server.publish(event, &self.epoll, self.now, Duration::from_secs(7));
        self.run();
    }

    fn handle_timeout(&mut self) {
        self.server.handle_timeout(&self.epoll, self.now);
    }
}

const GET: &[u8] = b"get=1\n\n";
const WATCH: &[u8] = b"watch=1\n\n";
const REKEYED: Event = Event::Rekeyed { public_key: [1; 32] };

#[test]
fn an_answer_has_the_counters_and_every_peer_however_long_it_is() {
    for peers in [0, 1, 5000] {
        let mut bed = Bed::new(peers);
        let mut client = bed.ask(GET);
        for _again in 0..2 {
            let (text, disconnected) = bed.read(&mut client);
            assert!(!disconnected && text.starts_with("drop_no_peer=3\nudp_port=0\n"));
            assert!(text.ends_with("\nerrno=0\n\n"), "{peers} peers");
            assert_eq!(text.matches("public_key=").count(), usize::from(peers));
            assert_eq!(text.matches("allowed_ip=").count(), usize::from(peers));
            client.write_all(GET).unwrap();
            bed.run();
        }
    }
}

#[test]
fn a_client_may_close_its_half_and_send_two_requests_at_once() {
    let mut bed = Bed::new(1);
    let mut client = bed.ask(b"get=1\n\nget=1\n\n");
    client.shutdown(Shutdown::Write).unwrap();
    bed.run();
    let (text, disconnected) = bed.read(&mut client);
    assert_eq!(text.matches("errno=0\n\n").count(), 2, "{text}");
    assert!(disconnected && bed.server.len() == 0);
}

#[test]
fn what_is_no_request_is_refused_and_disconnected() {
    let mut bed = Bed::new(1);
    for request in [&b"set=1\n\n"[..], b"\n", b"get=statistics\n\n", &[b'a'; 4096], b"get=1\0\n\n"]
    {
        let mut client = bed.ask(request);
        assert_eq!(bed.read(&mut client), ("errno=71\n\n".to_owned(), true));
        assert_eq!(bed.server.len(), 0);
    }
}

#[test]
fn a_thousand_silent_clients_are_bounded_and_one_that_asks_is_answered() {
    let mut bed = Bed::new(1);
    let mut silent = Vec::new();
    for number in 0..1000 {
        let mut client = bed.connect();
        if number % 2 == 0 {
            client.write_all(b"get").unwrap();
        }
        silent.push(client);
        assert!(bed.server.len() <= MAX_CLIENTS);
    }
    bed.run();
    let mut client = bed.ask(GET);
    assert!(bed.read(&mut client).0.ends_with("errno=0\n\n"));
    assert!(bed.server.held() <= MAX_CLIENTS * (2 * PART_LEN));
}

#[test]
fn a_client_that_sends_no_request_or_reads_nothing_is_closed_in_time() {
    let mut bed = Bed::new(20_000);
    let mut silent = bed.connect();
    let mut unreading = bed.ask(GET);
    assert_eq!(bed.server.next_timeout(), Some(NOW + STALLED));
    bed.now = NOW + STALLED;
    bed.handle_timeout();
    assert_eq!(bed.server.len(), 1);
    let (text, disconnected) = bed.read(&mut unreading);
    assert!(disconnected && !text.ends_with("errno=0\n\n"), "it is cut short");
    bed.now = NOW + IDLE;
    bed.handle_timeout();
    assert_eq!((bed.server.len(), bed.server.next_timeout()), (0, None));
    assert!(bed.read(&mut silent).1);
}

#[test]
fn clients_that_read_nothing_take_a_part_each_and_others_wait_for_their_place() {
    let mut bed = Bed::new(20_000);
    let unreading: Vec<_> = (0..MAX_CLIENTS).map(|_| bed.ask(GET)).collect();
    assert!(bed.server.held() <= MAX_CLIENTS * 2 * PART_LEN, "{}", bed.server.held());
    assert_eq!(bed.server.next_timeout(), Some(NOW + STALLED));
    let mut waiting = bed.ask(GET);
    assert_eq!(bed.read(&mut waiting), (String::new(), false));
    assert_eq!(bed.server.next_timeout(), Some(NOW + STALLED_WHEN_FULL));
    bed.now += STALLED_WHEN_FULL;
    bed.handle_timeout();
    bed.run();
    assert!(bed.read(&mut waiting).0.ends_with("errno=0\n\n"));
    drop(unreading);
}

#[test]
fn a_watching_client_is_greeted_once_and_receives_events_in_order() {
    let mut bed = Bed::new(1);
    let mut client = bed.ask(WATCH);
    assert!(bed.server.is_watched());
    for _ in 0..2 {
        let greeting = Event::Watching { connected: 2 };
        bed.server.greet(&greeting, &bed.epoll, NOW, Duration::ZERO);
    }
    bed.publish(&REKEYED);
    bed.publish(&Event::Configured { peers: 9 });
    let (text, disconnected) = bed.read(&mut client);
    let names: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("event=")).collect();
    assert_eq!(names, ["watching", "rekey", "configuration"]);
    assert!(!disconnected);
    drop(client);
    bed.run();
    assert!(!bed.server.is_watched());
}

#[test]
fn a_slow_reader_loses_events_and_is_told_how_many() {
    let mut bed = Bed::new(1);
    let mut slow = bed.ask(WATCH);
    let mut fast = bed.ask(WATCH);
    let (mut seen, total) = (0, 20_000);
    for _ in 0..total {
        bed.publish(&REKEYED);
        seen += bed.read(&mut fast).0.matches("event=rekey\n").count();
    }
    assert_eq!(seen, total, "one that reads loses none");
    assert!(bed.server.held() <= 2 * (2 * MAX_QUEUED), "{} bytes", bed.server.held());
    let (text, _) = bed.read(&mut slow);
    let received = text.matches("event=rekey\n").count();
    let lost: Vec<usize> =
        text.lines().filter_map(|line| line.strip_prefix("count=")?.parse().ok()).collect();
    assert_eq!(received + lost.iter().sum::<usize>(), total, "lost {lost:?}");
    assert!(received < total && lost.len() == 1);
    // And it goes on.
    bed.publish(&REKEYED);
    assert!(bed.read(&mut slow).0.starts_with("event=rekey\n"));
}

#[test]
fn so_many_may_watch_that_there_is_always_room_to_ask() {
    let mut bed = Bed::new(1);
    let mut watching: Vec<_> = (0..MAX_CLIENTS / 2).map(|_| bed.ask(WATCH)).collect();
    let mut refused = bed.ask(WATCH);
    assert_eq!(bed.read(&mut refused).0, "errno=16\n\n");
    for _ in 0..20 {
        let mut client = bed.ask(GET);
        assert!(bed.read(&mut client).0.ends_with("errno=0\n\n"));
    }
    // One that has read nothing for long makes room.
    for _ in 0..20_000 {
        bed.publish(&REKEYED);
        for client in &mut watching[1..] {
            bed.read(client);
        }
    }
    bed.now += STALLED;
    let mut admitted = bed.ask(WATCH);
    bed.publish(&REKEYED);
    assert!(bed.read(&mut admitted).0.starts_with("event=rekey\n"));
    let (_, disconnected) = bed.read(&mut watching[0]);
    assert!(disconnected);
}
