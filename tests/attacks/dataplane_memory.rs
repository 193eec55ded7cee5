//! Root reads all of the dataplane's memory and looks for its keys (SECURITY.md, attack 6). The same
//! search finds them in wireguard-go, and in wgsep where the kernel has no secret memory, so that it is
//! known to see what there is.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::IoSliceMut;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use wgsep_proto::noise::cookie::CookieGenerator;
use wgsep_proto::noise::handshake::{Handshake, StaticIdentity};
use wgsep_proto::noise::tai64n::Tai64n;
use wgsep_proto::session::keypair::{Keypair, KeypairParts, SealJob, seal_batch};
use wgsep_proto::wire::messages::Message;
use wgsep_proto::{Instant, PresharedKey, PrivateKey, PublicKey};
use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::launched_as::LaunchedAs;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{Process, output, stop};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::tunnel::PORT;
use wgsep_tests::wg::{KeyPair, hex, preshared_key};
use wgsep_tests::{procfs, require, wait};

const LIMIT: Duration = Duration::from_secs(20);
const PAGE: usize = 4096;
/// All that [`Served`] looks for.
const ALL: [&str; 4] = ["preshared key", "private key", "receiving key", "sending key"];
/// Of the peer's clock, which stands still.
const NOW: Instant = Instant::from_nanos(1);

fn bytes(base64: &str) -> [u8; 32] {
    let hex = hex(base64);
    std::array::from_fn(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
}

/// What is looked for: a name, and bytes.
struct Secret(&'static str, Vec<u8>);

/// Inner parts of a key, which clamping does not change, so that half of one is found too.
fn raw(name: &'static str, key: &[u8; 32]) -> Vec<Secret> {
    [8, 16].map(|at| Secret(name, key[at..at + 8].to_vec())).into()
}

/// The same of its forms as text.
fn texts(name: &'static str, base64: &str) -> Vec<Secret> {
    let lower = hex(base64);
    let upper = lower.to_uppercase();
    let texts = [&lower[16..32], &lower[32..48], &upper[16..32], &base64[4..16], &base64[24..36]];
    texts.into_iter().map(|text| Secret(name, text.as_bytes().to_vec())).collect()
}

/// A daemon with a peer that is this test, which therefore knows every key, in the middle of a
/// session.
struct Served {
    daemon: Daemon,
    netns: Arc<Netns>,
    theirs: KeyPair,
    ours: KeyPair,
    psk: String,
    secrets: Vec<Secret>,
    socket: UdpSocket,
    session: Arc<Keypair>,
}

impl Served {
    fn by(implementation: Implementation) -> Self {
        Self::with(implementation, &[])
    }

    fn with(implementation: Implementation, options: &[&str]) -> Self {
        let netns = Netns::new();
        let daemon = Daemon::start_with(implementation, &netns, |command| {
            command.args(options);
        });
        let (theirs, ours, psk) = (KeyPair::generate(), KeyPair::generate(), preshared_key());
        daemon.wg_conf(
            "setconf",
            &format!(
                "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\n[Peer]\nPublicKey = {}\n\
                 PresharedKey = {psk}\nAllowedIPs = 10.9.0.2/32\n",
                theirs.private, ours.public
            ),
        );
        netns.run(format!("ip address add 10.9.0.1/24 dev {}", daemon.interface));
        netns.run(format!("ip link set {} up", daemon.interface));
        // Keys leave the daemon as text, too.
        assert!(daemon.wg("show", "dump").contains(&theirs.private));

        let (socket, parts) = handshake(&netns, &theirs, &ours, &psk);
        let session = Arc::new(Keypair::new(&parts, NOW));
        // The first confirms the session.
        for counter in 0..3 {
            send_keepalive(&socket, &session, counter);
        }
        wait::until("the session is confirmed", LIMIT, || daemon.peer().latest_handshake != 0);
        let mut secrets = raw("private key", &bytes(&theirs.private));
        secrets.extend(texts("private key", &theirs.private));
        secrets.extend(raw("preshared key", &bytes(&psk)));
        secrets.extend(texts("preshared key", &psk));
        secrets.extend(raw("receiving key", &parts.sending));
        secrets.extend(raw("sending key", &parts.receiving));
        Self { daemon, netns, theirs, ours, psk, secrets, socket, session }
    }

    /// The names of the secrets that `pid`'s memory shows to root.
    fn found_in(&self, pid: Pid) -> BTreeSet<&'static str> {
        self.found_among(readable_memory(pid))
    }

    /// The same of the stacks of the dataplane's threads of a name.
    fn found_on_stacks(&self, name: &str) -> BTreeSet<&'static str> {
        let stacks = stacks(self.daemon.dataplane(), name);
        self.found_among(stacks.into_iter().map(|stack| stack.memory))
    }

    /// Whether any memory of the dataplane shows one of these secrets.
    fn shows(&self, names: &[&str]) -> bool {
        self.found_in(self.daemon.dataplane()).iter().any(|found| names.contains(found))
    }

    fn found_among(&self, memory: impl Iterator<Item = Vec<u8>>) -> BTreeSet<&'static str> {
        let mut found = BTreeSet::new();
        // Most of what is mapped was never used.
        for chunk in memory.filter(|chunk| *chunk != vec![0; chunk.len()]) {
            for Secret(name, needle) in &self.secrets {
                if contains(&chunk, needle) {
                    found.insert(*name);
                }
            }
        }
        found
    }
}

/// Traffic both ways, for as long as this lives: keepalives from the peer, and echo requests to it that
/// remain unanswered.
struct Traffic {
    ended: Arc<AtomicBool>,
    keepalives: Option<JoinHandle<()>>,
    _pings: Process,
}

impl Traffic {
    fn through(served: &Served) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let (reported, session) = (Arc::clone(&ended), Arc::clone(&served.session));
        let socket = served.socket.try_clone().unwrap();
        let keepalives = thread::spawn(move || {
            let counters = (3..).take_while(|_| !reported.load(Ordering::Relaxed));
            counters.for_each(|counter| send_keepalive(&socket, &session, counter));
        });
        let pings = served.netns.spawn("ping -f -q 10.9.0.2");
        Self { ended, keepalives: Some(keepalives), _pings: pings }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        let _panicked = self.keepalives.take().map(JoinHandle::join);
    }
}

/// Has packets go both ways through the session, so that the workers have used both of its keys.
fn exchange_packets(served: &Served) {
    let _traffic = Traffic::through(served);
    let before = served.daemon.peer();
    wait::until("traffic flows both ways", LIMIT, || {
        let now = served.daemon.peer();
        now.received > before.received && now.sent > before.sent
    });
}

/// Shakes hands with the daemon as its peer.
fn handshake(
    netns: &Netns,
    theirs: &KeyPair,
    ours: &KeyPair,
    psk: &str,
) -> (UdpSocket, KeypairParts) {
    let socket = netns.inside(|| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    socket.connect((Ipv4Addr::LOCALHOST, PORT)).unwrap();
    // One that comes too soon after the last is not answered.
    let parts = wait::poll(LIMIT, || try_handshake(&socket, theirs, ours, psk));
    (socket, parts.expect("a response to an initiation"))
}

fn try_handshake(
    socket: &UdpSocket,
    theirs: &KeyPair,
    ours: &KeyPair,
    psk: &str,
) -> Option<KeypairParts> {
    let identity = StaticIdentity::new(&PrivateKey::from_bytes(bytes(&ours.private)).unwrap());
    let remote = PublicKey::from_bytes(bytes(&theirs.public));
    let mut handshake = Handshake::new(remote);
    handshake.set_preshared_key(PresharedKey::from_bytes(bytes(psk)));

    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let ephemeral = bytes(&KeyPair::generate().private);
    let timestamp = Tai64n::from_wall(wall);
    let initiation = handshake.create_initiation(&identity, &ephemeral, timestamp, 7).unwrap();
    let mut datagram = initiation.to_bytes();
    CookieGenerator::new(&remote).add_macs(&mut datagram, NOW);
    socket.send(&datagram).unwrap();

    let mut answer = [0; 256];
    let len = socket.recv(&mut answer).ok()?;
    let Some(Message::Response(response)) = Message::parse(&answer[..len]) else {
        panic!("no response to the initiation");
    };
    handshake.consume_response(&identity, &response).unwrap();
    handshake.begin_session()
}

fn send_keepalive(socket: &UdpSocket, session: &Keypair, counter: u64) {
    let mut keepalive = [0; 32];
    let mut is_sealed = false;
    let datagram = &mut keepalive;
    seal_batch(None, [SealJob { keypair: session, counter, datagram, is_sealed: &mut is_sealed }]);
    assert!(is_sealed);
    // Refused where the daemon has ended.
    let _lost = socket.send(&keepalive);
}

/// Runs `body` in a thread whose children get `errno` from a system call.
fn refusing<T: Send>(call: libc::c_long, errno: Errno, body: impl FnOnce() -> T + Send) -> T {
    let rules = [(call, Vec::new())].into();
    let refuse = SeccompAction::Errno(errno as u32);
    let target = TargetArch::try_from(std::env::consts::ARCH).unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, target).unwrap();
    let filter = BpfProgram::try_from(filter).unwrap();
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            seccompiler::apply_filter(&filter).unwrap();
            body()
        });
        thread.join().unwrap()
    })
}

/// The mappings of a process that it can write, and has used: start, length and name.
fn mappings(pid: Pid) -> Vec<(usize, usize, String)> {
    let mut mappings = Vec::new();
    let mut last = None;
    for line in fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap().lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        if let [range, access, _, _, _, name @ ..] = &words[..]
            && let Some((start, end)) = range.split_once('-')
        {
            let [start, end] = [start, end].map(|at| usize::from_str_radix(at, 16).unwrap());
            let name = name.first().map_or("", |name| name).to_owned();
            last = access.starts_with("rw").then_some((start, end - start, name));
        } else if let ["Rss:" | "Swap:", used, _] = words[..]
            && used != "0"
        {
            mappings.extend(last.take());
        }
    }
    mappings
}

/// All that root can read of what a process has written, in pieces that overlap by more than a key's length of text.
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

/// The stack of a thread that waits.
struct Stack {
    /// From its lowest address up to the functions that are in progress.
    memory: Vec<u8>,
    /// How many bytes of it are below the pointer, where functions that have returned were.
    below: usize,
}

impl Stack {
    /// How far below the pointer something was left.
    fn depth(&self) -> usize {
        let untouched = self.memory.iter().take(self.below).take_while(|byte| **byte == 0);
        self.below - untouched.count()
    }
}

/// The stacks of a process's threads of a name.
fn stacks(pid: Pid, name: &str) -> Vec<Stack> {
    /// What the functions have that wait, and no more than that: above the last stack is the heap.
    const ABOVE: usize = PAGE;
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut stacks = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let file = |file: &str| fs::read_to_string(task.path().join(file)).unwrap();
        if file("comm").trim() != name {
            continue;
        }
        // Number, arguments, stack pointer and program counter of the call that it waits in.
        let pointer = wait::poll(LIMIT, || {
            let call = file("syscall");
            let pointer = call.split_whitespace().rev().nth(1)?.strip_prefix("0x")?.to_owned();
            usize::from_str_radix(&pointer, 16).ok()
        });
        let pointer = pointer.unwrap();
        let within = |(start, len, _): &(usize, usize, _)| (*start..start + len).contains(&pointer);
        let (start, len, _) = mappings(pid).into_iter().find(within).unwrap();
        let mut stack = vec![0; len.min(pointer + ABOVE - start)];
        memory.read_exact_at(&mut stack, start as u64).unwrap();
        stacks.push(Stack { memory: stack, below: pointer - start });
    }
    assert!(!stacks.is_empty(), "no thread {name}");
    stacks
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
    assert_eq!(served.found_in(served.daemon.process.pid()), BTreeSet::from(ALL));
}

#[test]
fn attack_06_control_without_secret_memory_root_finds_every_key_and_the_audit_says_so() {
    require!(Wgsep);
    for (errno, state) in [(Errno::ENOSYS, "unsupported"), (Errno::EPERM, "degraded(EPERM)")] {
        refusing(libc::SYS_memfd_secret, errno, || serves_from_locked_memory(state));
    }
}

/// Where root can read it all, what is left of keys can be looked for.
#[test]
fn attack_06_no_key_of_a_session_is_left_once_it_has_ended() {
    require!(Wgsep);
    const SESSION: [&str; 2] = ["receiving key", "sending key"];
    refusing(libc::SYS_memfd_secret, Errno::ENOSYS, || {
        let served = Served::by(Wgsep);
        exchange_packets(&served);
        assert!(served.shows(&SESSION), "of a session that lives");
        served.netns.run(format!("ip link set {} down", served.daemon.interface));
        wait::until("link down has erased the session", LIMIT, || !served.shows(&SESSION));

        let served = Served::by(Wgsep);
        exchange_packets(&served);
        // The one before the last is kept, for packets that are under way.
        for _ in 0..2 {
            let (socket, parts) =
                handshake(&served.netns, &served.theirs, &served.ours, &served.psk);
            let before = served.daemon.peer().received;
            send_keepalive(&socket, &Keypair::new(&parts, NOW), 0);
            wait::until("the new session is confirmed", LIMIT, || {
                served.daemon.peer().received > before
            });
        }
        wait::until("two new ones have erased the session", LIMIT, || !served.shows(&SESSION));

        let served = Served::by(Wgsep);
        exchange_packets(&served);
        let (interface, peer) = (&served.daemon.interface, &served.ours.public);
        served.netns.run(format!("wg set {interface} peer {peer} remove"));
        let of_peer = [SESSION[0], SESSION[1], "preshared key"];
        wait::until("removing the peer has erased its keys", LIMIT, || !served.shows(&of_peer));
    });
}

#[test]
fn attack_06_no_key_is_left_on_a_stack_once_a_handshake_is_done() {
    require!(Wgsep);
    refusing(libc::SYS_memfd_secret, Errno::ENOSYS, || {
        let served = Served::by(Wgsep);
        // Diffie-Hellmans and ciphers were many pages deep; looking at a few events is not.
        wait::until("the control thread's stack is wiped", LIMIT, || {
            stacks(served.daemon.dataplane(), "control").iter().all(|stack| stack.depth() < PAGE)
        });
        assert_eq!(served.found_on_stacks("control"), BTreeSet::new());
        // A worker opened the first packets with one of the session's own.
        let left = served.found_on_stacks("worker");
        assert!(left.is_subset(&BTreeSet::from(["receiving key"])), "{left:?}");
        // The search sees what is on them: keys that the workers use now. The vector code erases its own.
        let served = Served::with(Wgsep, &["--without", "avx512"]);
        exchange_packets(&served);
        let left = served.found_on_stacks("worker");
        assert!(!left.is_empty(), "nothing is found of a session that lives");
    });
}

fn serves_from_locked_memory(state: &str) {
    let served = Served::by(Wgsep);
    assert_eq!(served.found_in(served.daemon.dataplane()), BTreeSet::from(ALL));

    let log = served.daemon.process.log();
    assert!(log.contains(&format!("dataplane's secret-memory {state}")), "{log}");
    assert!(log.contains("keys are in locked memory, which root can read"), "{log}");
    assert!(!log.contains("secret memory is full"), "{log}");
    let mut audit = served.netns.command(wgsep_program("wgsep"));
    let audit = output(audit.args(["audit", &served.daemon.interface]));
    let table = String::from_utf8_lossy(&audit.stdout).into_owned();
    assert_eq!(audit.status.code(), Some(1), "{table}");
    assert!(table.contains("dataplane secret-memory: boot with secretmem.enable=1"), "{table}");
}

/// What a debugger does for a core file: the process is stopped wherever it happens to be, and all of
/// its memory is read.
#[test]
fn attack_06_no_key_shows_whenever_the_dataplane_is_stopped_under_traffic() {
    require!(Wgsep);
    let served = Served::by(Wgsep);
    let dataplane = served.daemon.dataplane();
    let _traffic = Traffic::through(&served);
    for _ in 0..4 {
        let before = served.daemon.peer();
        wait::until("traffic flows both ways", LIMIT, || {
            let now = served.daemon.peer();
            now.received > before.received && now.sent > before.sent
        });
        stop(dataplane);
        assert_eq!(served.found_in(dataplane), BTreeSet::new());
        kill(dataplane, Signal::SIGCONT).unwrap();
    }
}

/// A duplicate of a descriptor of another process.
fn duplicate(pid: Pid, number: i32) -> Option<OwnedFd> {
    let owned = |returned: libc::c_long| {
        let number = i32::try_from(returned).ok().filter(|number| *number >= 0)?;
        // SAFETY: the kernel has just returned this descriptor, which nothing else owns.
        Some(unsafe { OwnedFd::from_raw_fd(number) })
    };
    // SAFETY: the call takes plain integers.
    let process = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    // SAFETY: as above.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

/// Lets each look at a socket's messages begin behind the one before, or at the first of them again. False for a kind of
/// socket that cannot do that.
fn look_further(socket: &OwnedFd, further: bool) -> bool {
    let offset: libc::c_int = if further { 0 } else { -1 };
    let len = u32::try_from(size_of_val(&offset)).unwrap();
    let value = (&raw const offset).cast();
    let socket = socket.as_raw_fd();
    // SAFETY: the value is an integer of that length, which the call only reads.
    unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, value, len) == 0 }
}

/// What a process has in its sockets and has not read: the name of each socket that has something, and its messages.
fn unread(pid: Pid) -> Vec<(String, Vec<Vec<u8>>)> {
    let descriptors = procfs::descriptors(pid).into_iter();
    let sockets = descriptors.filter(|(_, name)| name.starts_with("socket:"));
    let peeked = sockets.filter_map(|(number, name)| {
        let socket = duplicate(pid, number)?;
        let most = if look_further(&socket, true) { usize::MAX } else { 1 };
        let mut messages = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        while messages.len() < most
            && let Ok(len @ 1..) = recv(socket.as_raw_fd(), &mut buffer, flags)
        {
            messages.push(buffer[..len].to_vec());
        }
        look_further(&socket, false);
        Some((name, messages))
    });
    peeked.filter(|(_, messages)| !messages.is_empty()).collect()
}

/// The processes that serve an interface, or are about to: helpers, and dataplanes.
fn pairs(interface: &str) -> (Vec<Pid>, Vec<Pid>) {
    procfs::with_argument(interface).into_iter().partition(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim() == "wgsep"
    })
}

/// The new dataplane is stopped while the state waits in its socket: the keys are in the memory of the kernel, on the way
/// between the two dataplanes.
#[test]
fn attack_06_while_a_pair_is_replaced_neither_helper_has_a_key() {
    require!(Wgsep);
    let served = Served::by(Wgsep);
    let interface = &served.daemon.interface;
    let old = served.daemon.dataplane();
    let has_keys = |messages: &[Vec<u8>]| served.found_among(messages.iter().cloned()).len() > 1;

    // So that the new one waits for it.
    stop(old);
    // As the user whose daemon it is.
    let prefix = LaunchedAs::this_run().prefix();
    let mut upgrade = served.netns.command(&prefix[0]);
    upgrade.args(&prefix[1..]).arg(wgsep_program("wgsep")).args(["upgrade", interface]);
    let mut upgrade = Process::spawn(upgrade, "wgsep upgrade");
    let new = wait::poll(LIMIT, || {
        let (_, dataplanes) = pairs(interface);
        dataplanes.into_iter().find(|pid| *pid != old && procfs::is_reading(*pid))
    });
    let new = new.expect("a dataplane of the new pair that waits for the state");
    stop(new);
    kill(old, Signal::SIGCONT).unwrap();
    let state = wait::poll(LIMIT, || {
        unread(new).into_iter().find(|(_, messages)| has_keys(messages)).map(|(socket, _)| socket)
    });
    let state = state.expect("the state on its way");

    let (helpers, dataplanes) = pairs(interface);
    assert!(helpers.len() >= 2, "{helpers:?}");
    for pid in helpers.iter().chain(&dataplanes) {
        let found = served.found_in(*pid);
        assert_eq!(found, BTreeSet::new(), "in {pid} of {helpers:?}, {dataplanes:?}");
    }
    for helper in helpers {
        for (socket, messages) in unread(helper) {
            let found = served.found_among(messages.into_iter());
            assert_eq!(found, BTreeSet::new(), "in {socket} of the helper {helper}");
        }
        let has = procfs::descriptors(helper);
        assert!(!has.values().any(|name| *name == state), "the helper {helper}: {has:?}");
    }
    kill(new, Signal::SIGCONT).unwrap();
    // If it was stopped for too long, the old one goes on.
    upgrade.exit_within(LIMIT);
    wait::until("one dataplane is left", LIMIT, || pairs(interface).1.len() == 1);
}

/// Kills a process whose parent is stopped, so that it stays a zombie; its exit status as the kernel
/// shows it, in which the bit 128 says that a core was dumped.
fn status_of_a_crash(pid: Pid, parent: Pid) -> i32 {
    // Root may try to have one; without CAP_SYS_RESOURCE even that fails.
    output(Command::new("prlimit").args(["--core=unlimited", "--pid", &pid.to_string()]));
    stop(parent);
    let status = wait::poll(LIMIT, || {
        // The standard library's handler lets the first pass, as it would the fault of a guard page.
        kill(pid, Signal::SIGSEGV).unwrap();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next()?.split_whitespace().collect();
        (fields.first() == Some(&"Z")).then(|| fields.last()?.parse().ok()).flatten()
    });
    kill(parent, Signal::SIGCONT).unwrap();
    status.unwrap()
}

#[test]
fn attack_06_a_crash_of_the_dataplane_leaves_no_core() {
    require!(Wgsep);
    const DUMPED: i32 = 128;
    let scratch = Scratch::new();
    let mut ordinary = Command::new("sh");
    ordinary.current_dir(&*scratch).args(["-c", "ulimit -c unlimited; sleep 1000 & wait"]);
    let ordinary = Process::spawn(ordinary, "a process that may dump its core");
    let sleep = wait::poll(LIMIT, || procfs::children(ordinary.pid()).into_iter().next()).unwrap();
    assert_eq!(status_of_a_crash(sleep, ordinary.pid()), libc::SIGSEGV | DUMPED);

    let served = Served::by(Wgsep);
    let (dataplane, helper) = (served.daemon.dataplane(), served.daemon.process.pid());
    assert_eq!(status_of_a_crash(dataplane, helper), libc::SIGSEGV);
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
