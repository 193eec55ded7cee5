//! A UDP port that another program has when the interface is set up: reported everywhere, and opened once it is
//! free.
#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::process::Output;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{output, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{repository, require, wait};

const LIMIT: Duration = Duration::from_secs(10);
const PORT: u16 = 20_830;

/// A program that has the port.
fn holder(netns: &Netns) -> UdpSocket {
    netns.inside(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap())
}

fn take_up(daemon: &Daemon) {
    let key = KeyPair::generate();
    let text = format!("[Interface]\nPrivateKey = {}\nListenPort = {PORT}\n", key.private);
    daemon.wg_conf("setconf", &text);
    daemon.netns.run(format!("ip link set {} up", daemon.interface));
}

fn stats(daemon: &Daemon, options: &str) -> String {
    let program = wgsep_program("wgsep");
    daemon.netns.run(format!("{} stats {options} {}", program.display(), daemon.interface))
}

fn udp(daemon: &Daemon) -> Value {
    serde_json::from_str::<Value>(&stats(daemon, "--json")).unwrap()["udp"].take()
}

fn script(name: &str) -> String {
    repository().join("bin/dist").join(name).display().to_string()
}

#[track_caller]
fn until_logged(daemon: &Daemon, text: &str) {
    wait::until(&format!("the log has {text:?}"), LIMIT, || daemon.process.log().contains(text));
}

#[test]
fn it_is_in_the_log_the_statistics_the_status_and_the_reply_until_it_is_regained() {
    require!(Wgsep);
    let (netns, scratch) = (Netns::new(), Scratch::new());
    let manager = UnixDatagram::bind(scratch.join("notify")).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let status = || {
        let mut message = [0; 512];
        let length = manager.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..length]).into_owned()
    };
    let held = holder(&netns);
    let daemon = Daemon::start_with(Wgsep, &netns, |command| {
        command.env("NOTIFY_SOCKET", scratch.join("notify"));
    });
    let serving = format!("STATUS=serving {}", daemon.interface);
    assert_eq!(status(), format!("READY=1\n{serving}"));
    take_up(&daemon);

    let why = format!(
        "cannot open UDP port {PORT}: Address already in use (EADDRINUSE); stop the program"
    );
    until_logged(&daemon, &why);
    let log = daemon.process.log();
    assert!(log.lines().any(|line| line.contains(" ERROR ") && line.contains(&why)), "{log}");
    let refused = udp(&daemon);
    assert_eq!(refused["error"], "Address already in use", "{refused}");
    assert_eq!((&refused["port"], &refused["ipv4"]), (&PORT.into(), &false.into()));
    let table = stats(&daemon, "");
    assert!(
        table.contains(&format!("UDP port {PORT} cannot be opened: Address already")),
        "{table}"
    );
    assert_eq!(samples(&daemon), "1");
    let expected =
        format!("{serving}, but UDP port {PORT} cannot be opened: Address already in use");
    let printed = status();
    assert!(printed.starts_with(&expected), "{printed}");
    let set = daemon.try_wg_set(format!("listen-port {PORT}"));
    let message = String::from_utf8_lossy(&set.stderr);
    assert!(!set.status.success() && message.contains("Address already in use"), "{message}");

    drop(held);
    // It is tried again by itself.
    until_logged(&daemon, &format!("UDP port {PORT}, which was refused before"));
    assert_eq!(status(), serving);
    let open = udp(&daemon);
    assert_eq!((&open["error"], &open["ipv4"]), (&Value::Null, &true.into()), "{open}");
    assert_eq!(samples(&daemon), "0");
    daemon.wg_set(format!("listen-port {PORT}"));
    let log = daemon.process.log();
    let errors = log.lines().filter(|line| line.contains("interface up, but")).count();
    assert_eq!(errors, 1, "a port that is still refused is no news: {log}");
}

/// The value of the series that tells of the port.
fn samples(daemon: &Daemon) -> String {
    let scratch = Scratch::new();
    let mut command = daemon.netns.command(scratch.install_script("prometheus"));
    let text = run(command.arg(&daemon.interface));
    let series = format!("wgsep_udp_port_refused{{interface=\"{}\"}} ", daemon.interface);
    text.lines().find_map(|line| line.strip_prefix(&series)).unwrap().to_owned()
}

/// A daemon that is up without its UDP port, and the program that has it.
fn refused() -> (Daemon, UdpSocket) {
    let netns = Netns::new();
    let held = holder(&netns);
    let daemon = Daemon::start(Wgsep, &netns);
    take_up(&daemon);
    until_logged(&daemon, "cannot open UDP port");
    (daemon, held)
}

/// The waits grow to a minute; a set does not wait for the next.
#[test]
fn any_set_tries_again_at_once() {
    require!(Wgsep);
    let (daemon, held) = refused();
    // Each set that does not help doubles the wait.
    for _ in 0..8 {
        daemon.wg_set("fwmark 0");
    }
    drop(held);
    // A child that another test has forked may hold the port until it executes its program.
    wait::until("the port is open", LIMIT, || {
        daemon.wg_set("fwmark 7");
        udp(&daemon)["ipv4"] == true
    });
}

#[test]
fn a_link_that_goes_down_clears_the_refusal() {
    require!(Wgsep);
    let (daemon, held) = refused();
    let netns = &daemon.netns;
    netns.run(format!("ip link set {} down", daemon.interface));
    wait::until("nothing is refused", LIMIT, || udp(&daemon)["error"].is_null());
    drop(held);
    netns.run(format!("ip link set {} up", daemon.interface));
    wait::until("the port is open", LIMIT, || udp(&daemon)["ipv4"] == true);
}

/// What the unit runs after the daemon is ready.
fn configure(netns: &Arc<Netns>, daemon: &Daemon) -> Output {
    let key = KeyPair::generate();
    let file = format!("[Interface]\nPrivateKey = {}\nListenPort = {PORT}\n", key.private);
    let line = "mkdir -p /run/wgsep-quick && mount -t tmpfs none /run/wgsep-quick && \
                mount -t tmpfs none /etc/wireguard && printf %s \"$1\" >/etc/wireguard/$2.conf && exec \"$3\" apply \"$2\"";
    let mut command = netns.command("unshare");
    command.args(["--mount", "sh", "-c", line, "sh"]);
    output(command.args([&*file, &daemon.interface, &script("wgsep-quick")]))
}

#[test]
fn the_start_of_the_unit_fails_and_says_why() {
    require!(Wgsep);
    let netns = Netns::new();
    let daemon = Daemon::start(Wgsep, &netns);
    let held = holder(&netns);
    let refused = configure(&netns, &daemon);
    let message = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success(), "{message}");
    assert!(message.contains(&format!("no UDP port: {PORT} cannot be opened")), "{message}");
    drop(held);
    let configured = configure(&netns, &daemon);
    assert!(configured.status.success(), "{configured:?}");
    assert_eq!(udp(&daemon)["ipv4"], true);
}
