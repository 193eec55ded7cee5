//! What is kept of a tunnel when one of its processes dies, with the unit and systemd.

use std::fs;
use std::time::{Duration, Instant};

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::machine::{Machine, package, write_configuration};
use wgsep_tests::netns::Netns;
use wgsep_tests::nft::Counter;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::traffic::{Pinging, until_ping};
use wgsep_tests::tunnel::{End, PORT};
use wgsep_tests::wait;
use wgsep_tests::wg::KeyPair;

/// How long a service may take to start, to stop, or to be started again.
const SERVICE_LIMIT: Duration = Duration::from_secs(20);
/// How long traffic may be interrupted.
const INTERRUPTION: Duration = Duration::from_secs(2);

/// Index, settings, addresses and routes of an interface.
fn state(netns: &Netns) -> String {
    let shown = ["-o link", "-o addr", "-4 route", "-6 route"].map(|what| {
        let (options, object) = what.split_once(' ').unwrap();
        netns.run(format!("ip {options} {object} show dev wg0"))
    });
    shown.concat()
}

#[test]
fn after_a_crash_systemd_and_the_unit_keep_the_interface_and_nothing_leaves_by_another_route() {
    let Some(image) = Machine::image_or_skips() else { return };
    let (scratch, (left, right)) = (Scratch::new(), link::joined());
    let deb = package(&scratch.join("built"));
    let key = KeyPair::generate();
    let other = End::new(Side::Right, Daemon::start(Wgsep, &right));
    other.configure(&key.public, None, None);
    let (inner, theirs) = (Side::Left.inner(Family::V4), Side::Right.inner(Family::V4));
    let file = scratch.join("wg0.conf");
    write_configuration(
        &file,
        &format!(
            "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\nAddress = {inner}/32, fd77::1/128\nMTU = 1400\n\
             \n[Peer]\nPublicKey = {}\nAllowedIPs = {theirs}/32, 198.51.100.0/24, fd78::/64\nEndpoint = {}\n",
            key.private,
            other.key.public,
            other.endpoint(Family::V4)
        ),
    );
    let files = [(&*deb, "/mnt/wgsep.deb"), (&*file, "/etc/wireguard/wg0.conf")];
    let machine = Machine::boot(&image, &left, &files);
    machine.run("dpkg --install /mnt/wgsep.deb && systemctl start wgsep@wg0");
    left.run(format!("ip route add default via {}", Side::Right.outer(Family::V4)));
    let elsewhere = format!("ip daddr {theirs} oifname != wg0");
    let leaked = Counter::new(&left, "leaked", "output", &elsewhere);
    until_ping(&left, theirs);
    let show =
        |what: &str| machine.run(&format!("systemctl show --value --property {what} wgsep@wg0"));
    let is_there = || left.output("ip link show wg0").status.success();
    let helper = || {
        let pid = show("MainPID").trim().to_owned();
        assert_ne!(pid, "0", "the unit does not run");
        pid
    };
    let dataplane = || machine.run(&format!("cat /proc/{}/task/*/children", helper()));
    assert_eq!(show("NFileDescriptorStore").trim(), "17");

    // What an operator has added by hand is kept too.
    left.run("ip addr add 192.0.2.7/32 dev wg0");
    left.run("ip route add 203.0.113.0/24 dev wg0");
    let before = state(&left);
    for round in 1..=4 {
        let pinging = Pinging::start(&left, theirs);
        pinging.until_more(3);
        let victim = if round % 2 == 0 { dataplane() } else { helper() };
        let replies = pinging.replies();
        let killed = Instant::now();
        machine.run(&format!("kill -KILL {victim}"));
        // One reply may have been under way.
        wait::until("traffic flows again", SERVICE_LIMIT, || pinging.replies() > replies + 1);
        let took = killed.elapsed();
        assert!(took < INTERRUPTION, "round {round}: {took:?}");
        println!("round {round}: traffic after {took:?}");
        wait::until("the unit is active", SERVICE_LIMIT, || show("ActiveState").trim() == "active");
        assert_eq!(show("NRestarts").trim(), round.to_string());
        assert_eq!(state(&left), before);
        assert_eq!(show("NFileDescriptorStore").trim(), "17");
    }
    let log = machine.run("journalctl --quiet --no-pager --unit wgsep@wg0");
    let line = "took over the interface as it was, with 17 queues that the service manager stored";
    assert_eq!(log.matches(line).count(), 4, "{log}");

    // What fails after the start is tried again, beside an interface that stays.
    let configuration = fs::read_to_string(&file).unwrap();
    write_configuration(&file, &format!("{configuration}\n[Interface]\nMTU = 1\n"));
    let restarts = || show("NRestarts").trim().parse::<u32>().unwrap();
    let pinging = Pinging::start(&left, theirs);
    machine.run(&format!("kill -KILL {}", helper()));
    wait::until("it has failed more than once", SERVICE_LIMIT, || restarts() > 8);
    assert_eq!(state(&left), before);
    write_configuration(&file, &configuration);
    wait::until("the unit is active", SERVICE_LIMIT, || show("ActiveState").trim() == "active");
    pinging.until_more(3);
    assert_eq!(state(&left), before);
    assert_eq!(leaked.packets(), 0);
    // From here on, only what goes through the tunnel is answered.
    left.run("ip route del default");

    // A restart that was asked for makes the interface anew, from the file.
    machine.run("systemctl restart wgsep@wg0");
    until_ping(&left, theirs);
    let anew = state(&left);
    assert!(!anew.contains("192.0.2.7") && !anew.contains("203.0.113.0"), "{anew}");
    assert_ne!(anew.split(':').next(), before.split(':').next(), "the index is the same");
    assert_eq!(show("NFileDescriptorStore").trim(), "17");

    // After a breach there is no restart, and nothing is kept.
    machine.run(&format!("kill -SYS {}", dataplane()));
    wait::until("the unit has failed", SERVICE_LIMIT, || show("ActiveState").trim() == "failed");
    assert_eq!(show("ExecMainStatus").trim(), "76");
    wait::until("the interface is gone", SERVICE_LIMIT, || !is_there());
    assert_eq!(show("NFileDescriptorStore").trim(), "0");

    machine.run("systemctl start wgsep@wg0");
    until_ping(&left, theirs);
    machine.run("systemctl stop wgsep@wg0");
    wait::until("the interface is gone", SERVICE_LIMIT, || !is_there());
    assert_eq!(show("NFileDescriptorStore").trim(), "0");
    assert!(!machine.output("test -e /run/wireguard/wg0.sock").status.success());

    // The same while systemd waits to start it again.
    machine.run(
        "mkdir -p /run/systemd/system/wgsep@.service.d && printf '[Service]\\nRestartSec=5\\nWatchdogSec=1\\n' \
         >/run/systemd/system/wgsep@.service.d/late.conf && systemctl daemon-reload && \
         systemctl start wgsep@wg0",
    );
    until_ping(&left, theirs);
    // A process that hangs is killed by the watchdog.
    let before = state(&left);
    machine.run(&format!("kill -STOP {}", dataplane()));
    wait::until("the watchdog kills it", SERVICE_LIMIT, || {
        show("SubState").trim() == "auto-restart"
    });
    until_ping(&left, theirs);
    assert_eq!(state(&left), before);
    let waits = || show("SubState").trim() == "auto-restart";
    let crash = || {
        machine.run(&format!("kill -KILL {}", helper()));
        wait::until("systemd waits with the restart", SERVICE_LIMIT, waits);
        assert!(is_there());
    };
    crash();
    machine.run("ip link del wg0");
    until_ping(&left, theirs);
    crash();
    machine.run("systemctl stop wgsep@wg0");
    wait::until("the interface is gone", SERVICE_LIMIT, || !is_there());
    let log = machine.run("journalctl --quiet --no-pager --unit wgsep@wg0");
    assert!(log.contains("is given up: a stored queue is a queue of no interface"), "{log}");
}
