//! `hostile-dataplane`: locks itself down as the real one does, and then attacks the helper with all that
//! the sandbox leaves it. Tests put it beside a copy of `wgsep` under the real one's name.

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, SockaddrIn, UnixAddr, accept4,
    recv, sendmsg, socketpair,
};
use std::io::IoSlice;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Instant;
use wgsep_hostile::{Attack, HOARDED_PORTS, HURRIED_REQUESTS};
use wgsep_ipc::startup::{self, CHANNEL};
use wgsep_ipc::{
    Channel, FromHelper, MAX_DESCRIPTORS, MAX_FRAME, REPORT_LAYERS, Received, Reply, Request,
    Startup,
};
use wgsep_policy::Sandbox;

/// Of a frame: the version comes first, the tag after the sequence number.
const VERSION_AT: usize = 0;
const TAG_AT: usize = 5;

type Outcome<T> = Result<T, String>;

fn main() {
    wgsep_policy::exit(match attack() {
        Ok(()) => 0,
        Err(line) => {
            eprintln!("ERROR hostile: {line}");
            1
        }
    })
}

fn attack() -> Outcome<()> {
    let version = std::env::args().nth(2).unwrap_or_default();
    let startup = Startup::parse(&version, std::env::args().skip(1))?;
    let (mark, workers) = (startup.fwmark, startup.workers);
    let attack = Attack::of_mark(mark).ok_or("start me with --fwmark and an attack's number")?;
    // SAFETY: the helper put the channel there, and nothing else in this process owns the number.
    let channel = unsafe { OwnedFd::from_raw_fd(CHANNEL) };
    let channel = Channel::new(channel).map_err(|error| error.to_string())?;
    let sandbox = Sandbox::enter(nix::unistd::getppid()).map_err(|error| error.to_string())?;
    let mut hostile = Hostile::new(channel, mark)?;

    // Beside this one, as many as the real one has.
    let others = startup::threads(workers) - 1;
    start_threads(others + usize::from(attack == Attack::OneThreadTooMany));
    let mut report = [[1, 0, 0]; REPORT_LAYERS];
    match attack {
        Attack::OpenUdpBeforeLockDown => {
            hostile.send(&Request::OpenUdp { port: 0, mark })?;
            idle();
        }
        Attack::SenselessReport => report = [[9; 3]; REPORT_LAYERS],
        _ => {}
    }
    if attack != Attack::UnconfinedLiar {
        let applied = sandbox.lock_down(&[]).map_err(|error| error.to_string())?;
        if attack != Attack::SenselessReport {
            report = applied.to_bytes();
        }
    }
    if attack == Attack::EndsOnceLockedDown {
        hostile.send(&Request::LockedDown(report))?;
        return Err("the end".to_owned());
    }
    let (reply, granted) = hostile.ask(&Request::LockedDown(report))?;
    if !matches!(reply, Reply::Granted { .. }) {
        return Err(format!("not granted: {reply:?}"));
    }
    hostile.run(attack, report, granted)
}

/// Starts threads that do nothing, and waits until all of them run.
fn start_threads(number: usize) {
    let all_run = Arc::new(Barrier::new(number + 1));
    for _ in 0..number {
        let runs = Arc::clone(&all_run);
        thread::spawn(move || {
            runs.wait();
            idle();
        });
    }
    all_run.wait();
}

/// Does nothing until it is killed.
fn idle() -> ! {
    loop {
        thread::park();
    }
}

struct Hostile {
    channel: Channel,
    /// Tells when the channel, or later the listener, has something to read.
    readable: Epoll,
    sequence: u32,
    mark: u32,
    /// How often it was too early for a port.
    put_off: u32,
    /// A frame as it should be, to be spoilt; made while a second channel can still be had.
    good: Vec<u8>,
}

impl Hostile {
    fn new(channel: Channel, mark: u32) -> Outcome<Self> {
        let readable = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(called("epoll"))?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        readable.add(&channel, event).map_err(called("watch the channel"))?;
        Ok(Self {
            channel,
            readable,
            sequence: 0,
            mark,
            put_off: 0,
            good: frame(&Request::CloseUdp)?,
        })
    }

    fn run(
        &mut self,
        attack: Attack,
        report: [[u8; 3]; REPORT_LAYERS],
        granted: Vec<OwnedFd>,
    ) -> Outcome<()> {
        match attack {
            Attack::SecondLockedDown => self.send(&Request::LockedDown(report))?,
            Attack::UnknownTag => self.spoilt(|frame| frame[TAG_AT] = 0x55)?,
            Attack::Short => self.spoilt(|frame| frame.truncate(TAG_AT - 1))?,
            Attack::Oversized => self.spoilt(|frame| frame.resize(MAX_FRAME + 1, 0))?,
            Attack::Trailing => self.spoilt(|frame| frame.push(0))?,
            Attack::WrongVersion => self.spoilt(|frame| frame[VERSION_AT] ^= 1)?,
            Attack::Empty => self.spoilt(Vec::clear)?,
            Attack::OneDescriptor => self.send_raw(&self.good, 1)?,
            Attack::TwoDescriptors => self.send_raw(&self.good, 2)?,
            Attack::ManyDescriptors => self.send_raw(&self.good, MAX_DESCRIPTORS)?,
            Attack::Flood => loop {
                // A full socket is no reason to stop.
                let _full = self.send_raw(&self.good, 0);
            },
            Attack::Hurry => {
                // New ports are slower than any rate of requests.
                let ports = [self.open(0)?.0, self.open(0)?.0];
                for port in ports.iter().cycle().take(HURRIED_REQUESTS as usize - ports.len()) {
                    self.open(*port)?;
                }
                return self.ask(&Request::Bye).map(drop);
            }
            Attack::Policy => return self.try_policy(),
            Attack::HoardPorts => self.hoard_ports()?,
            Attack::PongWithoutPing => self.send(&Request::Pong)?,
            Attack::OnConnect => self.violate_on_connect(granted)?,
            Attack::OpenUdpBeforeLockDown
            | Attack::UnconfinedLiar
            | Attack::OneThreadTooMany
            | Attack::EndsOnceLockedDown
            | Attack::SenselessReport => return Err(format!("{attack:?} got past the lock-down")),
        }
        idle()
    }

    fn try_policy(&mut self) -> Outcome<()> {
        let (mark, other) = (self.mark, self.mark + 1);
        for request in [
            Request::OpenUdp { port: 0, mark: other },
            Request::OpenUdp { port: 1023, mark },
            Request::OpenUdp { port: 0, mark },
            Request::SetMark { mark: other },
            Request::SetMark { mark },
        ] {
            let (reply, descriptors) = self.ask(&request)?;
            let reported = match reply {
                Reply::Refused { errno } => format!("errno {errno}"),
                _ => "granted".to_owned(),
            };
            eprintln!("INFO {request:?}: {reported}, {} descriptors", descriptors.len());
        }
        self.ask(&Request::Bye).map(drop)
    }

    /// Opens a port, and asks again without a pause while it is too early; which it is, and its sockets.
    fn open(&mut self, port: u16) -> Outcome<(u16, Vec<OwnedFd>)> {
        loop {
            match self.ask(&Request::OpenUdp { port, mark: self.mark })? {
                (Reply::UdpOpened { port, .. }, sockets) => return Ok((port, sockets)),
                (Reply::TOO_EARLY, _) => self.put_off += 1,
                (other, _) => return Err(format!("no port: {other:?}")),
            }
        }
    }

    fn hoard_ports(&mut self) -> Outcome<()> {
        let (began, mut held) = (Instant::now(), Vec::new());
        for _ in 0..HOARDED_PORTS {
            held.push(self.open(0)?);
        }
        eprintln!("INFO opened all after {} ms", began.elapsed().as_millis());
        eprintln!("INFO was put off {} times", self.put_off);
        let named = held.into_iter().map(|(port, sockets)| {
            let v4 = sockets.into_iter().next().map(UdpSocket::from);
            v4.map(|v4| (port, v4)).ok_or("no IPv4 socket came".to_owned())
        });
        let held = named.collect::<Outcome<Vec<_>>>()?;
        let [(first_port, first), .., (last_port, last)] = &held[..] else {
            return Err("no ports".to_owned());
        };
        // By sendmsg, as sendto is in no filter.
        let send = |from: &UdpSocket, bytes: &[u8], port: &u16| {
            let to = SockaddrIn::new(127, 0, 0, 1, *port);
            let (bytes, flags) = ([IoSlice::new(bytes)], MsgFlags::MSG_NOSIGNAL);
            sendmsg(from.as_raw_fd(), &bytes, &[], flags, Some(&to))
        };
        eprintln!("INFO first sends: {:?}", send(first, b"out", last_port));
        eprintln!("INFO last sends: {:?}", send(last, b"in", first_port));
        eprintln!("INFO first receives: {:?}", nix::unistd::read(first, &mut [0; 9]));
        eprintln!("INFO last sends: {:?}", send(last, b"in", last_port));
        eprintln!("INFO last receives: {:?}", nix::unistd::read(last, &mut [0; 9]));
        idle()
    }

    fn violate_on_connect(&self, granted: Vec<OwnedFd>) -> Outcome<()> {
        let listener = granted.into_iter().next().ok_or("no listener came")?;
        self.readable.delete(&self.channel).map_err(called("leave the channel"))?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        self.readable.add(&listener, event).map_err(called("watch the listener"))?;
        eprintln!("INFO waiting for a client");
        self.wait();
        // With the only flags that the filter allows.
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let client = accept4(listener.as_raw_fd(), flags).map_err(called("accept4"))?;
        // SAFETY: it was just made, and nothing else has it.
        let client = unsafe { OwnedFd::from_raw_fd(client) };
        self.spoilt(|frame| frame[VERSION_AT] ^= 1)?;
        drop(client);
        Ok(())
    }

    // ------------------------------------------------------------ the channel

    fn spoilt(&self, spoil: impl FnOnce(&mut Vec<u8>)) -> Outcome<()> {
        let mut frame = self.good.clone();
        spoil(&mut frame);
        self.send_raw(&frame, 0)
    }

    /// Sends bytes as they are, with that many descriptors.
    fn send_raw(&self, bytes: &[u8], descriptors: usize) -> Outcome<()> {
        let descriptors = vec![2; descriptors];
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let control = if descriptors.is_empty() { &[] } else { &rights[..] };
        let raw = self.channel.as_fd().as_raw_fd();
        let sent =
            sendmsg::<UnixAddr>(raw, &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None);
        sent.map(drop).map_err(called("sendmsg"))
    }

    fn send(&mut self, request: &Request) -> Outcome<()> {
        self.sequence += 1;
        self.channel.send_request(self.sequence, request).map_err(|error| error.to_string())
    }

    /// Sends a request and waits for the reply to it.
    fn ask(&mut self, request: &Request) -> Outcome<(Reply, Vec<OwnedFd>)> {
        self.send(request)?;
        loop {
            self.wait();
            match self.channel.receive_from_helper().map_err(|error| error.to_string())? {
                Received::Message(FromHelper::Reply { reply, .. }, with) => {
                    return Ok((reply, with));
                }
                Received::Closed => return Err("the helper hung up".to_owned()),
                Received::Nothing | Received::Message(FromHelper::Notice(_), _) => {}
            }
        }
    }

    fn wait(&self) {
        let mut events = [EpollEvent::empty()];
        let _interrupted = self.readable.wait(&mut events, EpollTimeout::NONE);
    }
}

/// The bytes of a request, as they go over the channel.
fn frame(request: &Request) -> Outcome<Vec<u8>> {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(called("socketpair"))?;
    let channel = Channel::new(ours).map_err(|error| error.to_string())?;
    channel.send_request(1, request).map_err(|error| error.to_string())?;
    let mut bytes = vec![0; MAX_FRAME];
    let len = recv(theirs.as_raw_fd(), &mut bytes, MsgFlags::empty()).map_err(called("recv"))?;
    bytes.truncate(len);
    Ok(bytes)
}

fn called(step: &'static str) -> impl Fn(nix::Error) -> String {
    move |errno| format!("{step}: {}", errno.desc())
}
