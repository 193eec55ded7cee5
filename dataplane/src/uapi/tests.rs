//! The clients' side of it all: real sockets, a real device, and a loop as the control thread's.
#![allow(clippy::unwrap_used)]

use super::parse::tests::Eth0;
use super::server::MAX_CLIENTS;
use super::{Access, ClientId, Operation, Server};
use crate::drops::of_protocol;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use wgsep_proto::device::control_plane::ControlPlane;
use wgsep_proto::{Configuration, Random};
use wgsep_status::Counters;

const TOKEN: u64 = 100;
const OK: &str = "errno=0\n\n";

/// The same numbers in every run (SplitMix64).
struct Seeded(u64);

impl Seeded {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, odds: u64) -> bool {
        self.below(odds) == 0
    }

    fn key(&mut self) -> String {
        (0..4).fold(String::new(), |key, _| key + &format!("{:016x}", self.next()))
    }
}

impl Random for Seeded {
    fn fill(&mut self, bytes: &mut [u8]) {
        bytes.fill_with(|| self.next() as u8);
    }
}

/// A server with its device.
struct House {
    server: Server,
    epoll: Epoll,
    address: SocketAddr,
    device: ControlPlane,
    /// Sets are kept here instead of being carried out, while it is there.
    delayed: Option<Vec<(ClientId, Configuration)>>,
}

impl House {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("wgsep-uapi-{}-{count}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let mut server = Server::new(Access::Everything, TOKEN, MAX_CLIENTS);
        server.listen(listener.into(), &epoll).unwrap();
        let device = ControlPlane::new(Box::new(Seeded(0)));
        Self { server, epoll, address, device, delayed: None }
    }

    fn connect(&self) -> Guest {
        let socket = UnixStream::connect_addr(&self.address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Guest(socket)
    }

    /// One round of a control loop; how many events there were.
    fn round(&mut self, timeout: EpollTimeout) -> usize {
        let mut events = [EpollEvent::empty(); 16];
        let ready = self.epoll.wait(&mut events, timeout).unwrap();
        for event in &events[..ready] {
            self.server.handle(event, &self.device, &self.epoll);
        }
        self.server.handle_timeout(&self.epoll);
        self.carry_out_some(&mut usize::MAX.clone());
        ready
    }

    /// Carries out whole transactions until there are none, or no steps are left; how many there were.
    fn carry_out_some(&mut self, steps: &mut usize) -> usize {
        let mut count = 0;
        while let Some((client, operation)) = self.server.next_operation(&Eth0, &self.epoll, steps)
        {
            self.carry_out(client, operation);
            count += 1;
        }
        count
    }

    fn carry_out(&mut self, client: ClientId, operation: Operation) {
        let Self { server, epoll, device, delayed, .. } = self;
        match (operation, delayed) {
            (Operation::Get, _) => {
                let drops = of_protocol(&device.data_path().drops);
                server.reply_get(client, device, drops, epoll);
            }
            (Operation::Statistics, _) => {
                let drops = of_protocol(&device.data_path().drops).counts().collect();
                let counters = Counters { drops, ..Counters::default() };
                server.reply_statistics(client, &counters, epoll);
            }
            (Operation::Set(configuration), Some(delayed)) => delayed.push((client, configuration)),
            (Operation::Set(configuration), None) => {
                server.complete_answers(device);
                device.configure(configuration);
                server.reply_set(client, 0, epoll);
            }
        }
    }

    /// Rounds until nothing happens any more.
    fn run_until_idle(&mut self) {
        for _ in 0..10_000 {
            if self.round(EpollTimeout::ZERO) == 0 {
                return;
            }
        }
        panic!("the server is never done");
    }

    /// Serves a guest who has a thread of his own, until he leaves.
    fn host<T: Send + 'static>(&mut self, guest: impl FnOnce(Guest) -> T + Send + 'static) -> T {
        let socket = self.connect();
        let thread = std::thread::spawn(move || guest(socket));
        while !thread.is_finished() {
            self.round(EpollTimeout::from(10u8));
        }
        thread.join().unwrap()
    }

    /// A whole `get`, and a `set` that shall succeed, each on a connection of its own.
    fn configuration(&mut self) -> String {
        self.host(|mut guest| guest.transact("get=1\n\n"))
    }

    fn set(&mut self, lines: &str) {
        let request = format!("set=1\n{lines}\n");
        assert_eq!(self.host(move |mut guest| guest.transact(&request)), OK);
    }
}

/// A client.
struct Guest(UnixStream);

impl Guest {
    fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).unwrap();
    }

    /// Receives a reply, up to its blank line.
    fn receive(&mut self) -> String {
        let mut text = Vec::new();
        let mut part = [0; 65536];
        while !text.ends_with(b"\n\n") {
            let len = self.0.read(&mut part).unwrap();
            assert_ne!(len, 0, "closed after {:?}", String::from_utf8_lossy(&text));
            text.extend_from_slice(&part[..len]);
        }
        String::from_utf8(text).unwrap()
    }

    fn transact(&mut self, request: &str) -> String {
        self.send(request);
        self.receive()
    }

    /// What there is to read now: `None` if nothing, an empty text at the end.
    fn peek(&mut self) -> Option<String> {
        self.0.set_nonblocking(true).unwrap();
        let mut part = [0; 4096];
        let result = self.0.read(&mut part);
        self.0.set_nonblocking(false).unwrap();
        match result {
            Ok(len) => Some(String::from_utf8(part[..len].to_vec()).unwrap()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            // Closed with input unread.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Some(String::new()),
            Err(error) => panic!("{error}"),
        }
    }

    fn is_shut(&mut self) -> bool {
        self.peek().is_some_and(|text| text.is_empty())
    }
}

/// So many peers that the reply does not fit a socket's buffer.
fn many_peers(count: u32) -> String {
    (0..count).fold(String::new(), |mut text, number| {
        writeln!(
            text,
            "public_key={number:064x}\nallowed_ip={}/32",
            std::net::Ipv4Addr::from(number)
        )
        .unwrap();
        text
    })
}

#[test]
fn transactions_follow_each_other_on_a_connection_and_a_bad_one_changes_nothing() {
    let mut house = House::new();
    let mut guest = house.connect();
    let bad = "set=1\nfwmark=2\nreplace_peers=true\nlisten_port=x\n\n";
    guest.send(&format!("set=1\nfwmark=1\n\n{bad}get=1\n\nget=1\nx\n\nnonsense\n\nget=1\n\n"));
    house.run_until_idle();
    let expected = "errno=0\n\nerrno=-22\n\nfwmark=1\nerrno=0\n\nerrno=22\n\nerrno=-71\n\nfwmark=1\nerrno=0\n\n";
    assert_eq!(guest.peek().unwrap(), expected);
    guest.send("get=1\n\n");
    house.run_until_idle();
    assert_eq!(guest.peek().unwrap(), "fwmark=1\nerrno=0\n\n");
}

#[test]
fn a_probe_is_silent_and_leaves_nothing() {
    let mut house = House::new();
    for text in ["", "set=1\nfwmark=1\n", "get"] {
        let mut guest = house.connect();
        guest.send(text);
        house.run_until_idle();
        assert_eq!(guest.peek(), None);
        drop(guest);
        house.run_until_idle();
        assert!(house.server.is_empty());
    }
    assert_eq!(house.configuration(), OK);
}

#[test]
fn a_client_that_sends_no_more_still_gets_its_replies() {
    let mut house = House::new();
    let reply = house.host(|mut guest| {
        guest.send("set=1\nfwmark=7\n\nget=1\n\nset=1\nfwmark=8\n");
        guest.0.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        guest.0.read_to_string(&mut text).unwrap();
        text
    });
    assert_eq!(reply, "errno=0\n\nfwmark=7\nerrno=0\n\n");
    assert!(house.server.is_empty());
}

#[test]
fn a_client_that_does_not_wait_for_the_reply_is_served_all_the_same() {
    let mut house = House::new();
    house.connect().send("set=1\nfwmark=7\n\n");
    house.run_until_idle();
    assert!(house.server.is_empty());
    assert_eq!(house.configuration(), "fwmark=7\nerrno=0\n\n");
}

#[test]
fn while_a_set_is_carried_out_its_client_waits_and_the_others_do_not() {
    let mut house = House::new();
    house.delayed = Some(Vec::new());
    let (mut first, mut second) = (house.connect(), house.connect());
    first.send("set=1\nfwmark=1\n\nget=1\n\n");
    second.send("get=1\n\n");
    house.run_until_idle();
    assert_eq!((first.peek(), second.peek().as_deref()), (None, Some(OK)));
    first.send("get=1\n\n");
    house.run_until_idle();
    assert_eq!(first.peek(), None);

    let [(client, _)] = house.delayed.take().unwrap()[..] else { panic!("one set") };
    house.server.reply_set(client, -98, &house.epoll);
    house.run_until_idle();
    assert_eq!(first.peek().unwrap(), format!("errno=-98\n\n{OK}{OK}"));
}

#[test]
fn a_late_reply_reaches_no_other_client() {
    let mut house = House::new();
    house.delayed = Some(Vec::new());
    let mut leaver = house.connect();
    leaver.send("set=1\n\n");
    house.run_until_idle();
    drop(leaver);
    house.run_until_idle();
    assert!(house.server.is_empty());
    let mut successor = house.connect();
    successor.send("set=1\n\n");
    house.run_until_idle();

    let delayed = house.delayed.take().unwrap();
    house.server.reply_set(delayed[0].0, -1, &house.epoll);
    house.run_until_idle();
    assert_eq!(successor.peek(), None);
    house.server.reply_set(delayed[1].0, 0, &house.epoll);
    assert_eq!(successor.peek().as_deref(), Some(OK));
}

#[test]
fn who_reads_slowly_stalls_only_himself() {
    let mut house = House::new();
    house.set(&many_peers(10_000));
    let expected = house.configuration();
    assert!(expected.len() > 1 << 20);

    let mut slow = house.connect();
    slow.send("get=1\n\nset=1\nfwmark=9\n\nget=1\n\n");
    house.run_until_idle();
    // The reply fills the socket, and the next transaction has not been read.
    let mut quick = house.connect();
    quick.send("set=1\nlisten_port=0\n\n");
    house.run_until_idle();
    assert_eq!(quick.peek().as_deref(), Some(OK));
    assert_eq!(house.device.fwmark(), 0);

    let total = 2 * expected.len() + OK.len() + "fwmark=9\n".len();
    let mut received = String::new();
    while received.len() < total {
        house.run_until_idle();
        received += &slow.peek().unwrap();
    }
    assert_eq!(received, format!("{expected}{OK}fwmark=9\n{expected}"));
}

/// A `get` of many clients that do not read, as far as it fits into their sockets.
fn ask_without_reading(house: &mut House, count: usize) -> Vec<Guest> {
    let mut guests: Vec<_> = (0..count).map(|_| house.connect()).collect();
    for guest in &mut guests {
        guest.send("get=1\n\n");
    }
    house.run_until_idle();
    guests
}

/// What is left of the answer of a guest, up to its blank line.
fn receive_all(house: &mut House, mut guest: Guest) -> String {
    let mut text = String::new();
    while !text.ends_with("\n\n") {
        house.run_until_idle();
        text += &guest.peek().unwrap();
    }
    text
}

#[test]
fn an_answer_that_is_not_read_is_not_kept_whole() {
    let mut house = House::new();
    house.set(&many_peers(2_000));
    let expected = house.configuration();
    let guests = ask_without_reading(&mut house, MAX_CLIENTS - 1);
    assert!(house.server.parts() <= guests.len(), "{}", house.server.parts());
    assert!(house.configuration() == expected);
    for guest in guests {
        assert!(receive_all(&mut house, guest) == expected);
    }
    assert_eq!(house.server.parts(), 0);
}

#[test]
fn an_answer_shows_one_configuration_however_it_changes_meanwhile() {
    let mut house = House::new();
    let one_peer = (0..30_000u32).fold(format!("public_key={:064x}\n", 1), |mut text, number| {
        writeln!(text, "allowed_ip={}/32", std::net::Ipv4Addr::from(number)).unwrap();
        text
    });
    let changes = [
        "replace_peers=true\n".to_owned(),
        format!("replace_peers=true\n{}", many_peers(1_999)),
        format!("public_key={:064x}\nallowed_ip=0.0.7.207/32\n", 9),
        format!("public_key={:064x}\nremove=true\n", 1_999),
    ];
    for before in [many_peers(2_000), one_peer] {
        for change in &changes {
            house.set(&format!("replace_peers=true\n{before}"));
            let expected = house.configuration();
            let guests = ask_without_reading(&mut house, 3);
            house.set(change);
            for guest in guests {
                assert!(receive_all(&mut house, guest) == expected, "{change:.50}");
            }
        }
    }
}

/// A new configuration has each of them formatted to its end; that is bounded, too.
#[test]
fn answers_that_are_not_read_end_with_an_error_if_too_many_would_be_kept() {
    const MOST: usize = 200;
    let mut house = House::new();
    house.server.limit_parts(MOST);
    house.set(&many_peers(2_000));
    let expected = house.configuration();
    let guests = ask_without_reading(&mut house, MAX_CLIENTS - 1);
    for change in ["fwmark=1\n", "fwmark=2\n"] {
        house.set(change);
        let most = MOST + 2 * guests.len();
        assert!((MOST - 50..=most).contains(&house.server.parts()), "{}", house.server.parts());
    }
    // The one that asked last is the last to lose its answer,
    let answers: Vec<_> = guests.into_iter().map(|guest| receive_all(&mut house, guest)).collect();
    let whole = answers.iter().rev().take_while(|answer| **answer == expected).count();
    assert!((3..=8).contains(&whole), "{whole}");
    for answer in &answers[..answers.len() - whole] {
        let (begun, errno) = answer.rsplit_once("errno=").unwrap();
        assert!(expected.starts_with(begun) && errno == "4\n\n", "{errno}");
    }
    assert_eq!((house.server.parts(), house.configuration().len()), (0, expected.len() + 9));

    // and does not, however long it is.
    house.server.limit_parts(0);
    let expected = house.configuration();
    let mut guests = ask_without_reading(&mut house, 3);
    house.set("fwmark=3\n");
    assert!(receive_all(&mut house, guests.pop().unwrap()) == expected);
    for guest in guests {
        assert!(receive_all(&mut house, guest).ends_with("\nerrno=4\n\n"));
    }
}

#[test]
fn a_client_that_writes_slowly_delays_only_itself() {
    let mut house = House::new();
    let mut slow = house.connect();
    for byte in "set=1\nfwmark=5\n\n".chars() {
        assert_eq!(slow.peek(), None);
        assert_eq!(house.configuration(), OK);
        slow.send(&byte.to_string());
        house.run_until_idle();
    }
    assert_eq!(slow.peek().as_deref(), Some(OK));
}

/// A `set` of nearly so many bytes, up to its blank line.
fn long_set(len: usize) -> String {
    let line = format!("fwmark={:0>1016}\n", 7);
    format!("set=1\n{}", line.repeat(len / line.len() - 1))
}

#[test]
fn transactions_of_all_clients_together_are_bounded_and_short_ones_always_taken() {
    const TOGETHER: usize = 1 << 20;
    const BUSY: &str = "errno=-16\n\n";
    let mut house = House::new();
    house.server.limit_together(TOGETHER);
    let (mut first, mut second) = (house.connect(), house.connect());
    let send = |house: &mut House, guest: &mut Guest, text: &str| {
        for part in text.as_bytes().chunks(16 * 1024) {
            guest.0.write_all(part).unwrap();
            house.run_until_idle();
            assert!(house.server.held() <= TOGETHER + part.len(), "{}", house.server.held());
        }
        guest.peek()
    };
    let long = long_set(TOGETHER * 3 / 4);
    assert_eq!(send(&mut house, &mut first, &long), None);
    assert_eq!(send(&mut house, &mut second, &long), None);
    assert_eq!(send(&mut house, &mut second, "\n").as_deref(), Some(BUSY));
    // The first loses nothing by it, and what is short is taken.
    let short = long_set(63 * 1024) + "\n";
    assert_eq!(send(&mut house, &mut second, &short).as_deref(), Some(OK));

    // It counts until it is answered; then its memory is available to another.
    house.delayed = Some(Vec::new());
    assert_eq!(send(&mut house, &mut first, "\n"), None);
    assert_eq!(send(&mut house, &mut second, &format!("{long}\n")).as_deref(), Some(BUSY));
    let [(client, _)] = house.delayed.take().unwrap()[..] else { panic!("one set") };
    house.server.reply_set(client, 0, &house.epoll);
    house.run_until_idle();
    assert_eq!((first.peek().as_deref(), house.server.held()), (Some(OK), 0));
    assert_eq!(send(&mut house, &mut second, &format!("{long}\n")).as_deref(), Some(OK));
}

/// A configuration is kept until it is executed, even if its client has disconnected.
#[test]
fn what_clients_left_behind_is_bounded_too() {
    const TOGETHER: usize = 1 << 20;
    let mut house = House::new();
    house.server.limit_together(TOGETHER);
    house.delayed = Some(Vec::new());
    let text = long_set(60 * 1024) + "\n";
    for _ in 0..2 * TOGETHER / text.len() {
        house.connect().send(&text);
        house.run_until_idle();
        assert!(house.server.is_empty());
        assert!(house.server.held() <= TOGETHER + text.len(), "{}", house.server.held());
    }
    assert!(house.server.held() > TOGETHER);
    let mut guest = house.connect();
    guest.send("set=1\n\n");
    house.run_until_idle();
    assert_eq!(guest.peek().as_deref(), Some("errno=-16\n\n"));
    for (client, _) in house.delayed.take().unwrap() {
        house.server.reply_set(client, 0, &house.epoll);
    }
    assert_eq!(house.server.held(), 0);
    guest.send(&text);
    house.run_until_idle();
    assert_eq!(guest.peek().as_deref(), Some(OK));
}

#[test]
fn everybody_may_send_what_is_short_whatever_the_others_hold() {
    let mut house = House::new();
    house.server.limit_together(0);
    let mut crowd: Vec<_> = (0..MAX_CLIENTS).map(|_| house.connect()).collect();
    for text in [&long_set(63 * 1024), "\n"] {
        for guest in &mut crowd {
            guest.send(text);
            house.run_until_idle();
        }
    }
    assert!(crowd.iter_mut().all(|guest| guest.peek().as_deref() == Some(OK)));
}

#[test]
fn one_too_many_takes_the_place_of_the_client_that_is_silent_for_longest() {
    let mut house = House::new();
    let mut guests: Vec<_> = (0..MAX_CLIENTS).map(|_| house.connect()).collect();
    house.run_until_idle();
    // All have come, and all but the third have spoken since; the first has not finished.
    for (number, guest) in guests.iter_mut().enumerate().filter(|(number, _)| *number != 2) {
        guest.send(if number == 0 { "set=1\n" } else { "get=1\n\n" });
        house.run_until_idle();
    }
    let mut more: Vec<_> = (0..MAX_CLIENTS - 2).map(|_| house.connect()).collect();
    house.run_until_idle();
    assert!(guests[2].is_shut());
    assert_eq!(guests[1].peek().as_deref(), Some(OK));
    assert!(guests[1].is_shut() && guests[61].peek().is_some() && guests[61].is_shut());
    assert_eq!(guests[63].peek().as_deref(), Some(OK));
    assert_eq!((guests[0].peek(), guests[63].peek()), (None, None));
    for guest in &mut more {
        guest.send("get=1\n\n");
    }
    guests[0].send("\n");
    house.run_until_idle();
    assert!(more.iter_mut().all(|guest| guest.peek().as_deref() == Some(OK)));
    assert_eq!(guests[0].peek().as_deref(), Some(OK));
}

#[test]
fn a_crowd_that_comes_at_once_is_served_to_the_last() {
    let mut house = House::new();
    let mut crowd: Vec<_> = (0..5 * MAX_CLIENTS).map(|_| house.connect()).collect();
    for guest in &mut crowd {
        guest.send("get=1\n\n");
    }
    house.run_until_idle();
    assert!(crowd.iter_mut().all(|guest| guest.peek().as_deref() == Some(OK)));
}

#[test]
fn when_all_are_being_served_the_next_waits_and_nothing_spins() {
    let mut house = House::new();
    house.delayed = Some(Vec::new());
    let mut served: Vec<_> = (0..MAX_CLIENTS).map(|_| house.connect()).collect();
    for guest in &mut served {
        guest.send("set=1\n\n");
    }
    house.run_until_idle();
    let mut next = house.connect();
    next.send("get=1\n\n");
    house.run_until_idle();
    assert_eq!(house.round(EpollTimeout::from(20u8)), 0);
    assert_eq!(next.peek(), None);

    let delayed = house.delayed.take().unwrap();
    assert_eq!(delayed.len(), MAX_CLIENTS);
    house.server.reply_set(delayed[5].0, 0, &house.epoll);
    house.run_until_idle();
    assert_eq!(next.peek().as_deref(), Some(OK));
    assert_eq!(served[5].peek().as_deref(), Some(OK));
}

#[test]
fn clients_that_do_not_read_lock_no_other_out_for_good() {
    let mut house = House::new();
    house.set(&many_peers(2_000));
    let mut unread = ask_without_reading(&mut house, MAX_CLIENTS);
    let mut next = house.connect();
    next.send("get=statistics\n\n");
    house.run_until_idle();
    assert_eq!(house.round(EpollTimeout::from(20u8)), 0);
    assert_eq!(next.peek(), None);
    assert!(house.server.next_timeout().is_some());
    // One that goes on reading is not the one that is closed.
    while unread[0].peek().is_some() {}
    house.run_until_idle();

    house.server.lose_patience();
    house.round(EpollTimeout::ZERO);
    house.run_until_idle();
    assert!(next.peek().is_some_and(|text| text.ends_with(OK)));
    assert_eq!(house.server.next_timeout(), None);
    let is_cut = |mut guest: Guest| {
        let mut text = Vec::new();
        guest.0.set_nonblocking(true).unwrap();
        let _blocks_unless_it_is_closed = guest.0.read_to_end(&mut text);
        guest.0.set_nonblocking(false).unwrap();
        !text.ends_with(b"\n\n") && guest.is_shut()
    };
    let cut: Vec<_> = unread.into_iter().map(is_cut).collect();
    assert_eq!(cut.iter().filter(|cut| **cut).count(), 1);
    assert!(cut[1], "the one that has read nothing for longest");
}

#[test]
fn noise_is_answered_with_an_error_or_not_at_all() {
    let mut random = Seeded(7);
    let mut house = House::new();
    for _ in 0..200 {
        let mut guest = house.connect();
        let len = random.below(3000);
        let noise: Vec<u8> = (0..len).map(|_| b"\n=01seta\xff"[random.below(9) as usize]).collect();
        guest.0.write_all(&noise).unwrap();
        house.run_until_idle();
        let received = guest.peek().unwrap_or_default();
        assert!(!received.contains("errno=0\n"), "{:?}", String::from_utf8_lossy(&noise));
        // The connection is in step again after a blank line.
        guest.send("\n\n\n");
        house.run_until_idle();
        let _refusals = guest.peek();
        guest.send("get=1\n\n");
        house.run_until_idle();
        assert_eq!(guest.peek().as_deref(), Some(OK));
    }
}

/// A configuration of random keys and values, as a client would set it.
fn random_configuration(random: &mut Seeded) -> String {
    let mut text = format!("private_key={}\nlisten_port={}\n", random.key(), random.below(65536));
    writeln!(text, "fwmark={}", random.next() as u32).unwrap();
    for _ in 0..random.below(20) {
        writeln!(text, "public_key={}", random.key()).unwrap();
        if random.one_in(2) {
            writeln!(text, "preshared_key={}", random.key()).unwrap();
        }
        if !random.one_in(4) {
            writeln!(text, "endpoint={}", random_endpoint(random)).unwrap();
        }
        writeln!(text, "persistent_keepalive_interval={}", random.below(65536)).unwrap();
        for _ in 0..random.below(10) {
            writeln!(text, "allowed_ip={}", random_allowed_ip(random)).unwrap();
        }
    }
    text
}

fn random_endpoint(random: &mut Seeded) -> String {
    let port = random.below(65536);
    let v4 = std::net::Ipv4Addr::from(random.next() as u32);
    let v6 =
        std::net::Ipv6Addr::from((u128::from(random.next()) << 64) | u128::from(random.next()));
    match random.below(5) {
        0 => format!("{v4}:{port}"),
        1 => format!("[{v6}]:{port}"),
        2 => format!("[fe80::{:x}%eth0]:{port}", random.below(65536)),
        3 => format!("[fe80::{:x}%{}]:{port}", random.below(65536), 8 + random.below(99)),
        _ => format!("[::ffff:{v4}]:{port}"),
    }
}

fn random_allowed_ip(random: &mut Seeded) -> String {
    if random.one_in(2) {
        format!("{}/{}", std::net::Ipv4Addr::from(random.next() as u32), random.below(33))
    } else {
        let address = (u128::from(random.next()) << 64) | u128::from(random.next());
        format!("{}/{}", std::net::Ipv6Addr::from(address), random.below(129))
    }
}

/// What of a reply to `get` can be set.
fn settable(reply: &str) -> String {
    let get_only = ["errno=", "last_handshake_time_", "rx_bytes=", "tx_bytes="];
    let lines = reply.lines().filter(|line| !get_only.iter().any(|key| line.starts_with(key)));
    lines.filter(|line| !line.is_empty()).fold(String::new(), |text, line| text + line + "\n")
}

#[test]
fn what_is_got_sets_a_device_to_the_same() {
    let mut random = Seeded(1);
    for _ in 0..100 {
        let mut original = House::new();
        original.set(&random_configuration(&mut random));
        let got = original.configuration();
        // Onto another device, which has other peers, and once more onto itself.
        let mut copy = House::new();
        copy.set(&random_configuration(&mut random));
        for house in [&mut copy, &mut original] {
            house.set(&format!("listen_port=0\nfwmark=0\nreplace_peers=true\n{}", settable(&got)));
            assert_eq!(house.configuration(), got);
        }
    }
}

#[test]
fn a_large_network_is_taken_in_one_call() {
    let mut house = House::new();
    house.set(&many_peers(24_000));
    assert_eq!(house.configuration().matches("public_key=").count(), 24_000);
    let one_peer = (0..130_560u32).fold(format!("public_key={:064x}\n", 1), |mut text, number| {
        writeln!(text, "allowed_ip={}/32", std::net::Ipv4Addr::from(number)).unwrap();
        text
    });
    house.set(&format!("replace_peers=true\n{one_peer}"));
    assert_eq!(house.configuration().matches("allowed_ip=").count(), 130_560);
}

#[test]
fn what_a_client_sends_at_once_is_carried_out_in_bounded_steps() {
    for (transaction, is_refused) in [("get=statistics\n\n", false), ("\n", true)] {
        let mut house = House::new();
        let mut guest = house.connect();
        // So few that the answers fit into the socket's buffer.
        guest.send(&transaction.repeat(50));
        // It is accepted, and read.
        let mut events = [EpollEvent::empty(); 16];
        for _ in 0..2 {
            let ready = house.epoll.wait(&mut events, EpollTimeout::from(1000u16)).unwrap();
            for event in &events[..ready] {
                house.server.handle(event, &house.device, &house.epoll);
            }
        }
        let mut done = 0;
        for round in 1..=4 {
            let mut steps = 16;
            done += house.carry_out_some(&mut steps);
            assert!(done <= round * 16);
            assert_eq!(house.server.is_runnable(), round < 4, "{transaction:?}, round {round}");
        }
        assert_eq!(done, if is_refused { 0 } else { 50 });
    }
}
