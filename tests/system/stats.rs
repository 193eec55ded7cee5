//! `wgsep stats`: what was dropped and why, counted by a daemon that runs, and shown to people, to
//! programs and to Prometheus.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::{IpAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{Backlog, listen};
use serde_json::Value;
use wgsep_proto::DropCause;
use wgsep_tests::daemon::{Daemon, SOCKETS, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::{Wgsep, WireguardGo};
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::{Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{output, run, stop};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::{End, Plan, Tunnel};
use wgsep_tests::uapi::Uapi;
use wgsep_tests::{require, wait};

/// How long a packet may take to be counted.
const LIMIT: Duration = Duration::from_secs(10);

fn stats(netns: &Netns, interface: &str, options: &[&str]) -> Output {
    let mut command = netns.command(wgsep_program("wgsep"));
    output(command.arg("stats").args(options).arg(interface))
}

/// The causes of the daemon itself, beside those of the protocol.
const LOCAL_CAUSES: [&str; 7] = [
    "send_no_route",
    "send_forbidden",
    "send_no_buffer",
    "send_failed",
    "handshake_queue_full",
    "interface_down",
    "tun_refused",
];
const CAUSES: usize = DropCause::ALL.len() + LOCAL_CAUSES.len();

#[track_caller]
fn json(daemon: &Daemon) -> Value {
    let said = stats(&daemon.netns, &daemon.interface, &["--json"]);
    assert_eq!(said.status.code(), Some(0), "{said:?}");
    serde_json::from_slice(&said.stdout).unwrap()
}

#[track_caller]
fn until_dropped(daemon: &Daemon, cause: &str, count: u64) {
    let what = format!("{count} dropped: {cause}");
    // The kernel's own packets, such as those that look for neighbours, may come in between.
    wait::until(&what, LIMIT, || json(daemon)["drops"][cause].as_u64().unwrap() >= count);
}

/// Packets to an address behind the interface, which remain unanswered.
fn send_to(daemon: &Daemon, address: IpAddr, count: usize) {
    daemon.netns.inside(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for _ in 0..count {
            // The second meets the ICMP error that the first caused.
            let _ = socket.send_to(b"x", (address, 9));
        }
    });
}

/// `stats` prints the causes of which there are any.
#[test]
fn each_cause_has_its_explanation() {
    let source = include_str!("../../bin/wgsep/src/stats.rs");
    let (_, causes) = source.split_once("const CAUSES:").unwrap();
    let (causes, _) = causes.split_once("\n];").unwrap();
    let protocol = DropCause::ALL.into_iter().map(DropCause::name);
    for cause in protocol.chain(LOCAL_CAUSES) {
        assert_eq!(causes.matches(&format!("\"{cause}\",")).count(), 1, "{cause}");
    }
    let rows = causes.matches("\"in: ").count() + causes.matches("\"out: ").count();
    assert_eq!(rows, CAUSES);
}

#[test]
fn each_cause_is_counted_explained_and_kept_from_wg_show() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let End { daemon, .. } = &tunnel.left;
    until_ping(&daemon.netns, tunnel.right.side.inner(Family::V4));
    let drops = json(daemon)["drops"].clone();
    let names: Vec<_> = drops.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(names.len(), CAUSES);
    assert!(DropCause::ALL.iter().all(|cause| names.contains(&cause.name())), "{names:?}");
    assert!(LOCAL_CAUSES.iter().all(|cause| names.contains(cause)), "{names:?}");

    let stranger = "192.0.2.77".parse().unwrap();
    daemon.netns.run(format!("ip route add {stranger} dev {}", daemon.interface));
    let before = json(daemon)["drops"]["no_peer"].as_u64().unwrap();
    send_to(daemon, stranger, 3);
    until_dropped(daemon, "no_peer", before + 3);
    // A datagram that is none of WireGuard's, from the other end of the link.
    let to = tunnel.left.endpoint(Family::V4);
    tunnel.right.daemon.netns.inside(|| {
        let socket = UdpSocket::bind((Side::Right.outer(Family::V4), 0)).unwrap();
        socket.send_to(b"not WireGuard", to).unwrap();
        // An initiation by its form, but for no peer's key.
        let mut initiation = [0; 148];
        initiation[0] = 1;
        socket.send_to(&initiation, to).unwrap();
    });
    until_dropped(daemon, "malformed", 1);
    until_dropped(daemon, "bad_mac1", 1);

    let said = stats(&daemon.netns, &daemon.interface, &[]);
    let table = String::from_utf8_lossy(&said.stdout).into_owned();
    for text in ["  no_peer  ", "1  malformed  ", "1  bad_mac1  ", "offloads: "] {
        assert!(table.contains(text), "no {text:?} in {table}");
    }
    // A line a cause, each with what it means.
    let causes = table.lines().skip(1).take_while(|line| !line.is_empty());
    assert!(
        causes.clone().count() >= 3
            && causes.clone().all(|line| line.contains("out: ") || line.contains("in: "))
    );

    // The keys are in the answer to get=1, before the first peer; wg(8) shows what it always does.
    let answer = Uapi::connect(&daemon.interface).unwrap().transact("get=1\n\n").unwrap();
    let (device, _peers) = answer.split_once("public_key=").unwrap();
    assert!(device.contains("drop_malformed=1\n") && !device.contains("drop_replay"), "{device}");
    let shown = daemon.wg("show", "");
    assert!(shown.contains("listening port: 51820") && !shown.contains("drop"), "{shown}");
    assert_eq!(daemon.wg("show", "peers").trim(), tunnel.right.key.public);
    assert!(!daemon.wg("showconf", "").contains("drop"));
}

/// The longest IP packet is longer than any datagram has room for.
#[test]
fn a_packet_that_no_datagram_can_carry_is_counted_and_the_mtu_warned_of() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let (daemon, to) = (&left.daemon, right.side.inner(Family::V4));
    until_ping(&daemon.netns, to);
    daemon.netns.run(format!("ip link set {} mtu 65475", daemon.interface));
    daemon.netns.run(format!("ip link set {} mtu 65476", daemon.interface));
    wait::until("the MTU is warned of", LIMIT, || {
        daemon.process.log().contains("MTU is 65476: packets of more than 65472 bytes")
    });
    assert!(!daemon.process.log().contains("MTU is 65475: packets"), "that one does");
    daemon.netns.run(format!("ip link set {} mtu 65535", daemon.interface));
    let longest_send = 65_507 - 32 - 28;
    for (payload, what) in [
        (longest_send + 1, "longer than IPv4 carries"),
        (65_489 - 28, "padded to more than the length of a datagram can say"),
        (65_535 - 28, "the longest packet"),
    ] {
        let before = json(daemon)["drops"]["send_too_long"].as_u64().unwrap();
        daemon.netns.inside(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(&vec![0; payload], (to, 9)).expect(what);
        });
        until_dropped(daemon, "send_too_long", before + 1);
    }
}

#[test]
fn a_firewall_and_a_missing_route_are_distinguished() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let End { daemon, .. } = &tunnel.left;
    let inner = tunnel.right.side.inner(Family::V4);
    until_ping(&daemon.netns, inner);
    let count = |cause: &str| json(daemon)["drops"][cause].as_u64().unwrap();
    assert_eq!(count("send_forbidden"), 0);
    let nft = "add table inet t; add chain inet t c { type filter hook output priority 0; }; \
               add rule inet t c udp sport 51820 drop";
    run(daemon.netns.command("nft").arg(nft));
    send_to(daemon, inner, 3);
    wait::until("the firewall's refusals are counted", LIMIT, || count("send_forbidden") >= 3);
    run(daemon.netns.command("nft").arg("delete table inet t"));

    assert_eq!(count("send_no_route"), 0);
    let elsewhere = "198.51.100.1:51820";
    tunnel.left.set_peer(&tunnel.right, format!("endpoint {elsewhere}"));
    send_to(daemon, inner, 3);
    wait::until("the missing route is counted", LIMIT, || count("send_no_route") >= 3);
}

/// EACCES is the errno of both a route of type prohibit and a broadcast address; a firewall's is EPERM.
#[test]
fn a_prohibited_route_and_a_broadcast_endpoint_count_as_missing_routes() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let End { daemon, .. } = left;
    let inner = right.side.inner(Family::V4);
    until_ping(&daemon.netns, inner);
    let count = |cause: &str| json(daemon)["drops"][cause].as_u64().unwrap();
    let no_route_grows = |occasion: &str| {
        let before = count("send_no_route");
        send_to(daemon, inner, 3);
        wait::until(occasion, LIMIT, || count("send_no_route") >= before + 3);
    };
    let route = format!("prohibit {}", right.side.outer(Family::V4));
    daemon.netns.run(format!("ip route add {route}"));
    no_route_grows("the prohibited route is counted");
    daemon.netns.run(format!("ip route del {route}"));
    until_ping(&daemon.netns, inner);

    left.set_peer(right, "endpoint 10.77.0.255:51820");
    no_route_grows("the broadcast endpoint is counted");
    left.set_peer(right, format!("endpoint {}", right.endpoint(Family::V4)));
    until_ping(&daemon.netns, inner);
    assert_eq!(count("send_forbidden"), 0);
    let table = stats(&daemon.netns, &daemon.interface, &[]);
    let table = String::from_utf8_lossy(&table.stdout);
    assert!(table.contains("see `ip route get ADDRESS mark MARK`"), "{table}");
}

#[test]
fn there_is_one_line_for_what_cannot_be_asked() {
    require!(Wgsep, WireguardGo);
    let netns = Netns::new();
    let other = Daemon::start(WireguardGo, &netns);
    let unserved = unique_interface();
    for (interface, reason) in [
        (&*unserved, "no daemon serves"),
        (&*other.interface, "served by another program, or by another version of wgsep"),
        ("a/b", "bad interface name"),
    ] {
        let said = stats(&netns, interface, &[]);
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert_eq!(said.status.code(), Some(2), "{said:?}");
        assert!(text.contains(reason) && text.lines().count() == 1, "{text}");
        assert!(said.stdout.is_empty(), "{said:?}");
    }
}

#[test]
fn an_answer_that_cannot_be_written_is_no_success() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let interface = &*daemon.interface;
    for arguments in [
        &["stats", interface][..],
        &["stats", "--json", interface],
        &["audit", interface],
        &["audit", "--json", interface],
        &["--help"],
        &["--version"],
    ] {
        let mut command = daemon.netns.command(wgsep_program("wgsep"));
        command.args(arguments).stdout(fs::File::create("/dev/full").unwrap());
        let said = output(&mut command);
        let text = String::from_utf8_lossy(&said.stderr);
        assert_eq!(said.status.code(), Some(2), "{arguments:?}: {said:?}");
        assert!(text.contains("cannot write the answer: ") && text.lines().count() == 1, "{text}");
    }
}

/// The daemon may be stopped, or be another program.
#[test]
fn a_daemon_that_answers_slowly_or_not_at_all_is_given_up_within_seconds() {
    require!(Wgsep);
    let netns = Netns::new();
    let ask = |interface: &str| {
        let began = Instant::now();
        let mut command = netns.command("timeout");
        command.arg("30").arg(wgsep_program("wgsep")).args(["stats", interface]);
        let said = output(&mut command);
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert_eq!(said.status.code(), Some(2), "{said:?}");
        assert!(text.lines().count() == 1 && text.contains("restart it"), "{text}");
        // Of a machine that is busy; the daemon has 5 seconds.
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        text
    };
    let interface = unique_interface();
    let path = socket_path(&interface);
    fs::create_dir_all(SOCKETS).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let slow = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        // Until the client is gone.
        while client.write_all(b"d").is_ok() {
            std::thread::sleep(Duration::from_secs(1));
        }
        listener
    });
    let said = ask(&interface);
    assert!(said.contains("does not answer within 5 s"), "{said}");
    let listener = slow.join().unwrap();

    listen(&listener, Backlog::new(1).unwrap()).unwrap();
    let _waiting = [0; 2].map(|_| UnixStream::connect(&path).unwrap());
    let said = ask(&interface);
    assert!(said.contains("accepts no clients"), "{said}");
    fs::remove_file(&path).unwrap();
}

/// Samples of an exposition, by name and labels. Panics at what Prometheus would not read (its text
/// format, version 0.0.4).
fn samples(text: &str) -> BTreeMap<String, f64> {
    let mut typed = String::new();
    let mut samples = BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["counter", "gauge"].contains(&kind), "{line}");
            assert!(kind != "counter" || name.ends_with("_total"), "{line}");
            name.clone_into(&mut typed);
            continue;
        }
        if line.starts_with("# HELP ") {
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap();
        assert_eq!(name, typed, "a sample away from its type: {line}");
        let labels = labels.strip_suffix('}').unwrap();
        for label in labels.split(',') {
            let (label, text) = label.split_once('=').unwrap();
            assert!(label.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{line}");
            let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap();
            assert!(!text.contains(['"', '\\', '\n']), "{line}");
        }
        let twice = samples.insert(series.to_owned(), value.parse().unwrap());
        assert_eq!(twice, None, "{line}");
    }
    assert!(text.ends_with('\n'));
    samples
}

/// What cron has.
const PATH_OF_CRON: &str = "/usr/bin:/bin";

#[test]
fn the_script_for_the_node_exporter_writes_what_prometheus_reads() {
    require!(Wgsep);
    let (netns, scratch) = (Netns::new(), Scratch::new());
    let daemons = [(); 2].map(|()| Daemon::start(Wgsep, &netns));
    let mut command = netns.command(scratch.install_script("prometheus"));
    command.args(daemons.iter().map(|daemon| &daemon.interface));
    // Twice the same sample, and Prometheus reads nothing of it.
    command.arg(&daemons[0].interface);
    let text = run(command.env_clear().env("PATH", PATH_OF_CRON));
    let samples = samples(&text);
    assert_eq!(samples.len(), 2 * (CAUSES + 8), "{text}");
    for daemon in &daemons {
        let labels = format!("interface=\"{}\"", daemon.interface);
        assert_eq!(samples.get(&format!("wgsep_up{{{labels}}}")), Some(&1.0), "{text}");
        let drops = format!("wgsep_dropped_packets_total{{{labels},cause=\"no_peer\"}}");
        assert_eq!(samples.get(&drops), Some(&0.0), "{text}");
        let offload = format!("wgsep_offload_in_use{{{labels},offload=\"udp_gso\"}}");
        assert!(samples.contains_key(&offload), "{text}");
    }
}

/// One that is not there, and one that hangs.
#[test]
fn an_interface_that_does_not_answer_costs_the_others_no_sample() {
    require!(Wgsep);
    let (netns, scratch) = (Netns::new(), Scratch::new());
    let [served, hanging] = [(); 2].map(|()| Daemon::start(Wgsep, &netns));
    let unserved = unique_interface();
    stop(hanging.dataplane());
    let mut command = netns.command(scratch.install_script("prometheus"));
    command.args([&unserved, &hanging.interface, &served.interface]);
    let printed = output(command.env_clear().env("PATH", PATH_OF_CRON));
    let (text, reasons) =
        (String::from_utf8_lossy(&printed.stdout), String::from_utf8_lossy(&printed.stderr));
    assert!(printed.status.success(), "{printed:?}");
    let samples = samples(&text);
    assert_eq!(samples.len(), CAUSES + 8 + 2, "{text}");
    for (interface, up) in [(&served.interface, 1.0), (&hanging.interface, 0.0), (&unserved, 0.0)] {
        let series = format!("wgsep_up{{interface=\"{interface}\"}}");
        assert_eq!(samples.get(&series), Some(&up), "{text}");
        let reason = reasons.lines().filter(|line| line.contains(interface)).count();
        assert_eq!(reason, usize::from(up == 0.0), "{reasons}");
    }
}

#[test]
fn the_script_for_the_node_exporter_replaces_its_file_at_once() {
    require!(Wgsep);
    let (netns, scratch, collector) = (Netns::new(), Scratch::new(), Scratch::new());
    let daemon = Daemon::start(Wgsep, &netns);
    let (script, file) = (scratch.install_script("prometheus"), collector.join("wgsep.prom"));
    fs::write(&file, "before").unwrap();
    // Were it written in place, this would see it.
    let before = fs::File::open(&file).unwrap();
    let write = |path: &str| {
        let mut command = netns.command("/bin/sh");
        command.args(["-c", "umask 077; exec \"$@\"", "sh"]).arg(&script).arg("--output");
        command.arg(&file).arg(&daemon.interface).env("PATH", path);
        output(&mut command)
    };
    // As when the file system is full.
    let broken = scratch.join("bin");
    fs::create_dir(&broken).unwrap();
    run(Command::new("ln").args(["-s", "/bin/false"]).arg(broken.join("mv")));
    let failed = write(&format!("{}:{PATH_OF_CRON}", broken.display()));
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "before");
    let written = write(PATH_OF_CRON);
    assert!(written.status.success() && written.stdout.is_empty(), "{written:?}");
    assert_eq!(std::io::read_to_string(before).unwrap(), "before");
    assert!(!samples(&fs::read_to_string(&file).unwrap()).is_empty());
    // node_exporter is not root.
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644);
    assert_eq!(fs::read_dir(&*collector).unwrap().count(), 1, "something is left");
}

/// A directory, a FIFO, and a link such as /dev/stdout, which a file would replace.
#[test]
fn the_script_for_the_node_exporter_refuses_what_is_no_regular_file() {
    require!(Wgsep);
    let (netns, scratch, collector) = (Netns::new(), Scratch::new(), Scratch::new());
    let script = scratch.install_script("prometheus");
    let [directory, fifo, link] = ["directory", "fifo", "link"].map(|name| collector.join(name));
    fs::create_dir(&directory).unwrap();
    run(Command::new("mkfifo").arg(&fifo));
    std::os::unix::fs::symlink(scratch.join("wgsep.prom"), &link).unwrap();
    let slash = directory.join("");
    for refused in [&directory, &slash, &fifo, &link, &PathBuf::new()] {
        let mut command = netns.command(&script);
        command.arg("--output").arg(refused).arg(unique_interface()).env("PATH", PATH_OF_CRON);
        let done = output(&mut command);
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{done:?}");
        assert!(done.stdout.is_empty() && said.lines().count() == 1, "{done:?}");
        let expected = format!("prometheus: cannot write to '{}': ", refused.display());
        assert!(said.starts_with(&expected) && said.contains("; name one, such as"), "{said}");
        assert_eq!(fs::read_dir(&*collector).unwrap().count(), 3, "something is left");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0, "something is left");
    }
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
}

/// A daemon serves fewer at once: one that has connected and not asked yet gives its place to another.
#[test]
fn each_of_a_hundred_that_ask_at_once_has_its_answer() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| assert!(json(&daemon)["drops"].is_object()));
        }
    });
}
