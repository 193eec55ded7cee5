//! The two nodes with their daemons, and the configuration that they should have: what the events
//! change.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use wgsep_simulation::dice::Dice;
use wgsep_tests::daemon::{Daemon, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::{Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{output, run};
use wgsep_tests::procfs::is_running;
use wgsep_tests::uapi::Uapi;
use wgsep_tests::wait;
use wgsep_tests::wg::{KeyPair, with_input};

use crate::patience;
use crate::underlay::{self, FAMILIES, Site, nodad, opposite, option};
use crate::usage::{Growth, Usage};
use crate::witness::errors;

/// The first port of each node; its side is added.
const FIRST_PORT: u16 = 20_600;
/// The MTU of both interfaces at the start.
const MTU: u16 = 1420;
/// Within this time of its cause, both processes, the interface and the socket are gone: a second, and
/// more on a machine that is busy elsewhere, where a killed process waits for its threads to run once
/// more, of which one is the nicest there is.
const END_LIMIT: Duration = Duration::from_secs(1).saturating_add(crate::events::MARGIN);
/// Hung clients that stay for the events that follow.
const MOST_HUNG: usize = 8;
/// How long clean-up inside a daemon may take: the sockets of a port given up, a client that hung up.
const REST_LIMIT: Duration = Duration::from_secs(10);

/// What memory a daemon may have gained. Resident: the pools for packets grow to what a burst in all
/// queues needs, and stay; a daemon that was flooded is at 8 MiB (tests/speed/README.md), and one that has
/// begun at half of that. Secret: none, for what is mapped at the start has room for 4,000 peers.
const DATAPLANE_GROWTH: Growth = Growth { resident: 6 * 1024, secret: 0 };
/// The helper has no queues; it reads `/proc` into buffers of some KiB.
const HELPER_GROWTH: Growth = Growth { resident: 1024, secret: 0 };

/// A peer that is configured and does not exist.
#[derive(Clone, Debug)]
pub(crate) struct AbsentPeer {
    pub(crate) public: String,
    pub(crate) allowed_ips: Vec<String>,
}

/// One end of the tunnel: its place on the underlay, its daemon, and what that is configured to.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) site: Site,
    pub(crate) interface: String,
    pub(crate) key: KeyPair,
    pub(crate) port: u16,
    pub(crate) mark: u32,
    pub(crate) mtu: u16,
    pub(crate) keepalive: u16,
    pub(crate) absent_peers: Vec<AbsentPeer>,
    running: Option<Running>,
    /// The end of the log of the daemon before this one.
    previous_log: String,
}

/// A daemon and what it was when it was last looked at.
#[derive(Debug)]
struct Running {
    daemon: Daemon,
    dataplane: Pid,
    /// Bytes of its log that were looked at.
    log_read: u64,
    /// The helper's and the dataplane's, when the tunnel first worked.
    before: Option<[Usage; 2]>,
}

/// All that an event may change.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) router: Arc<Netns>,
    pub(crate) nodes: [Node; 2],
    /// The family of the endpoints.
    pub(crate) outer: Family,
    pub(crate) preshared: Option<String>,
    /// Clients that neither read nor write nor close.
    pub(crate) hung: Vec<Uapi>,
    tables: BTreeSet<String>,
}

impl World {
    /// The underlay and two daemons with keys and each other as a peer.
    pub(crate) fn new() -> Self {
        let (router, sites) = underlay::joined();
        let nodes = sites.map(Node::new);
        let mut world = Self {
            router,
            nodes,
            outer: Family::V4,
            preshared: None,
            hung: Vec::new(),
            tables: BTreeSet::new(),
        };
        for side in [Side::Left, Side::Right] {
            world.start(side);
        }
        world.tables = world.read_tables();
        world
    }

    pub(crate) fn node(&self, side: Side) -> &Node {
        &self.nodes[side as usize - 1]
    }

    pub(crate) fn node_mut(&mut self, side: Side) -> &mut Node {
        &mut self.nodes[side as usize - 1]
    }

    /// Where the other node finds this one.
    pub(crate) fn endpoint(&self, side: Side) -> SocketAddr {
        let node = self.node(side);
        SocketAddr::new(node.site.address(self.outer), node.port)
    }

    /// Starts the daemon of a node and configures it.
    #[track_caller]
    pub(crate) fn start(&mut self, side: Side) {
        self.start_with(side, |_command| {});
    }

    /// As [`World::start`], with a command that `adjust` may change.
    #[track_caller]
    pub(crate) fn start_with(&mut self, side: Side, adjust: impl FnOnce(&mut Command)) {
        self.node_mut(side).start(adjust);
        self.configure(side, "setconf");
        self.node(side).take_up();
    }

    /// Gives wg(8) the whole configuration of a node for `setconf` or `syncconf`.
    #[track_caller]
    pub(crate) fn configure(&self, side: Side, command: &str) {
        self.node(side).daemon().wg_conf(command, &self.text(side));
    }

    /// The configuration of a node as wg(8) reads it.
    fn text(&self, side: Side) -> String {
        let (node, other) = (self.node(side), self.node(opposite(side)));
        let mut text = format!(
            "[Interface]\nPrivateKey = {}\nListenPort = {}\nFwMark = {}\n",
            node.key.private, node.port, node.mark
        );
        text.push_str(&format!(
            "[Peer]\nPublicKey = {}\nEndpoint = {}\nAllowedIPs = {}\nPersistentKeepalive = {}\n",
            other.key.public,
            self.endpoint(other.site.side),
            inner_prefixes(other.site.side),
            node.keepalive,
        ));
        if let Some(preshared) = &self.preshared {
            text.push_str(&format!("PresharedKey = {preshared}\n"));
        }
        for absent_peer in &node.absent_peers {
            text.push_str(&absent_peer.text());
        }
        text
    }

    /// `wg set INTERFACE peer THE-OTHER ARGUMENTS`, with text on its stdin.
    #[track_caller]
    pub(crate) fn set_peer(&self, side: Side, arguments: &str, stdin: &str) {
        let (interface, peer) = (&self.node(side).interface, &self.node(opposite(side)).key.public);
        with_input(&format!("wg set {interface} peer {peer} {arguments}"), stdin);
    }

    /// What is wrong with the daemons: exits, errors in the log, degraded layers.
    pub(crate) fn check(&mut self, declared: &[&str]) -> Vec<String> {
        let nodes = self.nodes.iter_mut();
        nodes.flat_map(|node| node.check(declared)).collect()
    }

    /// Closes the oldest of the hung clients when there are many.
    pub(crate) fn end_of_event(&mut self) {
        let surplus = self.hung.len().saturating_sub(MOST_HUNG);
        self.hung.drain(..surplus);
    }

    /// The helpers and dataplanes that run now.
    pub(crate) fn processes(&self) -> Vec<Pid> {
        let running = self.nodes.iter().filter_map(|node| node.running.as_ref());
        running.flat_map(|running| [running.daemon.process.pid(), running.dataplane]).collect()
    }

    /// Remembers what the daemons hold that have started since the last time.
    pub(crate) fn note_usage(&mut self) {
        for node in &mut self.nodes {
            if let Some(running) = &mut node.running
                && running.before.is_none()
            {
                running.before = Some(running.usage(Usage::at_rest));
            }
        }
    }

    /// Compares what the daemons hold, and the rules and routes, with what was there at the start.
    pub(crate) fn compare_with_start(&mut self) -> Vec<String> {
        self.hung.clear();
        for node in &mut self.nodes {
            node.remove_absent_peers();
            node.site.renumber(underlay::FIRST_HOST);
        }
        let mut wrong: Vec<_> =
            self.nodes.iter().filter_map(|node| node.compare_with_start().err()).collect();
        let after = self.read_tables();
        let gone = self.tables.difference(&after).map(|line| format!("is gone: {line}"));
        wrong.extend(gone);
        wrong.extend(after.difference(&self.tables).map(|line| format!("is left: {line}")));
        wrong
    }

    /// The rules and routes of all namespaces, without what the kernel adds by itself: what expires, and
    /// link-local addresses that are random.
    fn read_tables(&self) -> BTreeSet<String> {
        let nodes = self.nodes.iter().map(|node| &node.site.netns);
        let mut tables = BTreeSet::new();
        for netns in nodes.chain([&self.router]) {
            for family in FAMILIES {
                let ip = option(family);
                for what in ["rule show", "route show table all"] {
                    let text = netns.run(format!("ip {ip} {what}"));
                    let is_kept = |line: &&str| {
                        !["expires", "fe80::", "ff00::"].iter().any(|word| line.contains(word))
                    };
                    let lines = text.lines().filter(is_kept);
                    tables.extend(lines.map(|line| format!("{}: {}", netns.name(), line.trim())));
                }
            }
        }
        tables
    }

    /// What a reader of a failure wants to see of the daemons.
    pub(crate) fn describe(&self) -> String {
        self.nodes.iter().map(Node::describe).collect()
    }
}

/// The addresses of a node within the tunnel, as allowed IPs.
pub(crate) fn inner_prefixes(side: Side) -> String {
    format!("{}/32, {}/128", side.inner(Family::V4), side.inner(Family::V6))
}

impl Node {
    fn new(site: Site) -> Self {
        // If the interface is gone, its packets must not leave by another (wgsep(8), PREVENTING LEAKS).
        for prefix in
            ["-4 route add unreachable 192.168.77.0/24", "-6 route add unreachable fd77::/64"]
        {
            site.netns.run(format!("ip {prefix} metric 4294967295"));
        }
        Self {
            interface: unique_interface(),
            key: KeyPair::generate(),
            port: FIRST_PORT + site.side as u16,
            mark: 0,
            mtu: MTU,
            keepalive: 0,
            absent_peers: Vec::new(),
            running: None,
            previous_log: String::new(),
            site,
        }
    }

    pub(crate) fn netns(&self) -> &Arc<Netns> {
        &self.site.netns
    }

    #[track_caller]
    pub(crate) fn daemon(&self) -> &Daemon {
        &self.running().daemon
    }

    #[track_caller]
    pub(crate) fn daemon_mut(&mut self) -> &mut Daemon {
        match &mut self.running {
            Some(running) => &mut running.daemon,
            None => panic!("{} has no daemon", self.interface),
        }
    }

    #[track_caller]
    fn running(&self) -> &Running {
        match &self.running {
            Some(running) => running,
            None => panic!("{} has no daemon", self.interface),
        }
    }

    /// The process id of the helper.
    #[track_caller]
    pub(crate) fn helper(&self) -> Pid {
        self.daemon().process.pid()
    }

    /// The process id of the dataplane.
    #[track_caller]
    pub(crate) fn dataplane(&self) -> Pid {
        self.running().dataplane
    }

    #[track_caller]
    fn start(&mut self, adjust: impl FnOnce(&mut Command)) {
        let daemon = Daemon::start_on(&self.interface, Wgsep, &self.site.netns, adjust);
        let dataplane = daemon.dataplane();
        self.running = Some(Running { daemon, dataplane, log_read: 0, before: None });
    }

    /// Gives the interface MTU and addresses, whatever it has left of them, and takes it up.
    #[track_caller]
    pub(crate) fn take_up(&self) {
        self.take_up_in(self.netns());
    }

    /// As [`Node::take_up`], in another namespace than its own.
    #[track_caller]
    pub(crate) fn take_up_in(&self, netns: &Netns) {
        let (interface, side) = (&self.interface, self.site.side);
        netns.run(format!("ip link set {interface} mtu {} up", self.mtu));
        for (family, length) in [(Family::V4, 24), (Family::V6, 64)] {
            let (address, nodad) = (side.inner(family), nodad(family));
            netns.run(format!("ip addr replace {address}/{length} dev {interface} {nodad}"));
        }
    }

    /// `ip link set INTERFACE ARGUMENTS`.
    #[track_caller]
    pub(crate) fn link(&self, arguments: &str) {
        self.netns().run(format!("ip link set {} {arguments}", self.interface));
    }

    /// Waits until nothing is left of a daemon that was ended in some way, and forgets it. Gives its exit
    /// code, and how long that took.
    #[track_caller]
    pub(crate) fn complete_end(&mut self, way: &str) -> (Option<i32>, Duration) {
        let begin = Instant::now();
        let Some(mut running) = self.running.take() else {
            panic!("{} has no daemon", self.interface)
        };
        let daemon = &mut running.daemon;
        let (helper, dataplane) = (daemon.process.pid(), running.dataplane);
        let mut status = None;
        let gone = format!("both processes are gone by {way}");
        patience::expect(&gone, &[helper, dataplane], END_LIMIT, || {
            status = status.or_else(|| daemon.process.try_exit());
            status.is_some() && !is_running(dataplane)
        });
        wait::until("the interface is gone", END_LIMIT, || !daemon.has_interface());
        self.previous_log = daemon.process.log();
        (status.and_then(|status| status.code()), begin.elapsed())
    }

    /// Adds peers that do not exist by one `wg addconf`.
    #[track_caller]
    pub(crate) fn add_absent_peers(&mut self, absent_peers: Vec<AbsentPeer>) {
        let text: String = absent_peers.iter().map(AbsentPeer::text).collect();
        self.daemon().wg_conf("addconf", &text);
        self.absent_peers.extend(absent_peers);
    }

    /// Removes all peers that do not exist by one transaction.
    #[track_caller]
    pub(crate) fn remove_absent_peers(&mut self) {
        let mut request = "set=1\n".to_owned();
        for absent_peer in self.absent_peers.drain(..) {
            let key = wgsep_tests::wg::hex(&absent_peer.public);
            request.push_str(&format!("public_key={key}\nremove=true\n"));
        }
        request.push('\n');
        let answer = Uapi::connect(&self.interface).and_then(|mut uapi| uapi.transact(&request));
        assert_eq!(answer.ok().as_deref(), Some("errno=0\n"), "peers are removed");
    }

    fn check(&mut self, declared: &[&str]) -> Vec<String> {
        let interface = &self.interface;
        let Some(running) = &mut self.running else {
            return vec![format!("{interface} has no daemon")];
        };
        let mut wrong = Vec::new();
        if let Some(status) = running.daemon.process.try_exit() {
            return vec![format!("the helper of {interface} exited: {status}")];
        }
        if !is_running(running.dataplane) {
            wrong.push(format!("the dataplane of {interface} exited"));
        }
        let new = running.daemon.process.log_from(running.log_read);
        running.log_read += new.len() as u64;
        let new = String::from_utf8_lossy(&new);
        for line in errors(&new).filter(|line| !declared.iter().any(|one| line.contains(one))) {
            wrong.push(format!("an error that the event does not declare: {line}"));
        }
        let mut audit = running.daemon.netns.command(wgsep_program("wgsep"));
        let audit = output(audit.args(["audit", interface]));
        if !audit.status.success() {
            let table = String::from_utf8_lossy(&audit.stdout).into_owned();
            let error = String::from_utf8_lossy(&audit.stderr).into_owned();
            wrong.push(format!("wgsep audit {interface}: {}\n{table}{error}", audit.status));
        }
        wrong
    }

    /// Compares what the daemon holds with what it held when the tunnel first worked.
    pub(crate) fn compare_with_start(&self) -> Result<(), String> {
        let running = self.running();
        let Some(before) = &running.before else { return Ok(()) };
        let compare = || {
            let after = running.usage(Usage::of);
            let [helper, dataplane] = [0, 1].map(|index| {
                let allowed = [HELPER_GROWTH, DATAPLANE_GROWTH][index];
                after[index].compare(&before[index], allowed)
            });
            helper.map_err(|error| format!("helper of {}: {error}", self.interface))?;
            dataplane.map_err(|error| format!("dataplane of {}: {error}", self.interface))
        };
        let rested = wait::poll(REST_LIMIT, || compare().ok());
        if rested.is_some() { Ok(()) } else { compare() }
    }

    /// What each process holds.
    pub(crate) fn usage(&self) -> String {
        let [helper, dataplane] = self.running().usage(Usage::of);
        format!("{}: helper {helper}; dataplane {dataplane}", self.interface)
    }

    fn describe(&self) -> String {
        /// Lines of a log that are shown.
        const LINES: usize = 30;
        let tail = |log: &str| {
            let lines: Vec<_> = log.lines().collect();
            lines[lines.len().saturating_sub(LINES)..].join("\n")
        };
        let (side, interface) = (self.site.side, &self.interface);
        let mut text = String::new();
        if !self.previous_log.is_empty() {
            let log = tail(&self.previous_log);
            text.push_str(&format!("--- {side:?} {interface}, the daemon before ---\n{log}\n"));
        }
        // The log of the one that runs is printed when it is dropped.
        if self.running.is_some() {
            let mut show = self.netns().command("timeout");
            show.args(["5", "wg", "show", interface]);
            let show = output(&mut show).stdout;
            let show = String::from_utf8_lossy(&show);
            // The other node comes before the peers that do not exist, or is shown by its absence.
            let first: Vec<_> = show.lines().take(LINES).collect();
            text.push_str(&format!("{}\n", first.join("\n")));
            let mut stats = self.netns().command("timeout");
            stats.arg("5").arg(wgsep_program("wgsep")).args(["stats", interface]);
            text.push_str(&String::from_utf8_lossy(&output(&mut stats).stdout));
        }
        let ip = ["link", "addr", "rule", "-4 route", "-6 route"];
        let commands = ip.map(|what| format!("ip -br {what}"));
        for command in commands.into_iter().chain(["ss -Hntuie".to_owned()]) {
            let shown = self.netns().output(&command).stdout;
            let shown = String::from_utf8_lossy(&shown).into_owned();
            let lines: Vec<_> = shown.lines().take(LINES).collect();
            text.push_str(&format!("{command}\n{}\n", lines.join("\n")));
        }
        text
    }
}

impl Running {
    /// The helper's and the dataplane's.
    fn usage(&self, read: fn(Pid, Pid) -> Usage) -> [Usage; 2] {
        let helper = self.daemon.process.pid();
        [helper, self.dataplane].map(|process| read(process, helper))
    }
}

impl AbsentPeer {
    /// The one of a number, with a key from the dice.
    pub(crate) fn new(number: u64, dice: &mut Dice) -> Self {
        let [.., high, low] = number.to_be_bytes();
        let v4 = format!("10.200.{high}.{low}/32");
        let v6 = format!("fdcc::{number:x}/128");
        Self { public: base64(&dice.bytes()), allowed_ips: vec![v4, v6] }
    }

    fn text(&self) -> String {
        let allowed = self.allowed_ips.join(", ");
        format!("[Peer]\nPublicKey = {}\nAllowedIPs = {allowed}\n", self.public)
    }
}

/// A key as wg(8) writes it.
fn base64(key: &[u8; 32]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |bits: u32| char::from(DIGITS[bits as usize & 63]);
    let mut text = String::new();
    for group in key.chunks(3) {
        let bits = group.iter().fold(0, |bits, byte| bits << 8 | u32::from(*byte));
        let bits = bits << (8 * (3 - group.len()));
        text.extend([18, 12, 6, 0].map(|shift| digit(bits >> shift)).iter().take(group.len() + 1));
    }
    text + "="
}

/// Runs ip(8) on lines of commands.
#[track_caller]
pub(crate) fn ip_batch(netns: &Netns, family: Family, lines: &str) {
    let mut command = netns.command("ip");
    command.args([option(family), "-batch", "-"]).stdin(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => panic!("cannot start ip: {error}"),
    };
    let written = child.stdin.take().map(|mut stdin| stdin.write_all(lines.as_bytes()));
    assert!(matches!(written, Some(Ok(()))), "ip -batch does not read: {written:?}");
    let status = child.wait();
    assert!(status.as_ref().is_ok_and(ExitStatus::success), "ip -batch: {status:?}");
}

/// Runs a command line of several words, one of which may have spaces.
#[track_caller]
pub(crate) fn run_words(netns: &Netns, words: &[&str]) {
    let mut command = netns.command(words.first().copied().unwrap_or_default());
    run(command.args(&words[1..]));
}
