//! What is kept of a tunnel when one of its processes dies, with the unit and systemd.

use std::fs;
use std::time::{Duration, Instant};

use wgsep_tests::link::{Family, Side};
use wgsep_tests::machine::{Debian, package, write_configuration};
use wgsep_tests::nft::Counter;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::traffic::{Pinging, until_ping};
use wgsep_tests::unit::Unit;
use wgsep_tests::wait;

/// How long a service may take to start, to stop, or to be started again.
const SERVICE_LIMIT: Duration = Duration::from_secs(20);
/// How long traffic may be interrupted.
const INTERRUPTION: Duration = Duration::from_secs(2);

#[test]
fn after_a_crash_systemd_and_the_unit_keep_the_interface_and_nothing_leaves_by_another_route() {
    keeps_the_interface(Debian::Bookworm);
}

#[test]
fn a_newer_systemd_keeps_it_as_well() {
    keeps_the_interface(Debian::Trixie);
}

fn keeps_the_interface(debian: Debian) {
    let Some(image) = debian.image_or_skips() else { return };
    let scratch = Scratch::new();
    let deb = package(&scratch);
    let unit = Unit::boot(&image, &[(&deb, "/mnt/wgsep.deb")]);
    let Unit { machine, netns: left, file, .. } = &unit;
    let theirs = unit.theirs();
    let show = |what: &str| unit.show(what);
    machine.run("dpkg --install /mnt/wgsep.deb");
    unit.start();
    left.run(format!("ip route add default via {}", Side::Right.outer(Family::V4)));
    let elsewhere = format!("ip daddr {theirs} oifname != wg0");
    let leaked = Counter::new(left, "leaked", "output", &elsewhere);
    let helper = || {
        let pid = show("MainPID");
        assert_ne!(pid, "0", "the unit does not run");
        pid
    };
    let dataplane = || machine.run(&format!("cat /proc/{}/task/*/children", helper()));
    assert_eq!(show("NFileDescriptorStore"), "17");

    // What an operator has added by hand is kept too.
    left.run("ip addr add 192.0.2.7/32 dev wg0");
    left.run("ip route add 203.0.113.0/24 dev wg0");
    let before = unit.state();
    // The kernel kills what takes too much memory as these kills do, and then systemd does not stop the rest.
    assert_eq!(show("OOMPolicy"), "continue");
    let of_file = machine.run("wg show wg0 peers");
    machine.run("wg set wg0 peer $(wg genkey | wg pubkey) allowed-ips 192.0.2.9/32");
    for round in 1..=4 {
        let pinging = Pinging::start(left, theirs);
        pinging.until_more(3);
        let victim = if round % 2 == 0 { dataplane() } else { helper() };
        machine.run(&format!("kill -KILL {victim}"));
        let (killed, replies) = (Instant::now(), pinging.replies());
        // One reply may have been under way.
        wait::until("traffic flows again", SERVICE_LIMIT, || pinging.replies() > replies + 1);
        let took = killed.elapsed();
        assert!(took < INTERRUPTION, "round {round}: {took:?}");
        // The unit stays active until systemd sees that the process is gone.
        let restarts = round.to_string();
        wait::until("systemd has started it again", SERVICE_LIMIT, || {
            show("NRestarts") == restarts && show("ActiveState") == "active"
        });
        assert_eq!(unit.state(), before);
        assert_eq!(show("NFileDescriptorStore"), "17");
        assert_eq!(machine.run("wg show wg0 peers"), of_file);
    }
    let log = machine.run("journalctl --quiet --no-pager --unit wgsep@wg0");
    let line = "took over the interface as it was, with 17 queues that the service manager stored";
    assert_eq!(log.matches(line).count(), 4, "{log}");

    // What fails after the start is tried again, beside an interface that stays.
    let configuration = fs::read_to_string(file).unwrap();
    write_configuration(file, &format!("{configuration}\n[Interface]\nMTU = 1\n"));
    let restarts = || show("NRestarts").parse::<u32>().unwrap();
    let pinging = Pinging::start(left, theirs);
    machine.run(&format!("kill -KILL {}", helper()));
    wait::until("it has failed more than once", SERVICE_LIMIT, || restarts() > 8);
    assert_eq!(unit.state(), before);
    write_configuration(file, &configuration);
    wait::until("the unit is active", SERVICE_LIMIT, || show("ActiveState") == "active");
    pinging.until_more(3);
    assert_eq!(unit.state(), before);
    assert_eq!(leaked.packets(), 0);
    // From here on, only what goes through the tunnel is answered.
    left.run("ip route del default");

    // A restart that was asked for makes the interface anew, from the file.
    machine.run("systemctl restart wgsep@wg0");
    until_ping(left, theirs);
    let anew = unit.state();
    assert!(!anew.contains("192.0.2.7") && !anew.contains("203.0.113.0"), "{anew}");
    assert_ne!(anew.split(':').next(), before.split(':').next(), "the index is the same");
    assert_eq!(show("NFileDescriptorStore"), "17");

    // After a breach there is no restart, and nothing is kept.
    machine.run(&format!("kill -SYS {}", dataplane()));
    wait::until("the unit has failed", SERVICE_LIMIT, || show("ActiveState") == "failed");
    assert_eq!(show("ExecMainStatus"), "76");
    wait::until("the interface is gone", SERVICE_LIMIT, || !unit.has_interface());
    assert_eq!(show("NFileDescriptorStore"), "0");

    machine.run("systemctl start wgsep@wg0");
    until_ping(left, theirs);
    machine.run("systemctl stop wgsep@wg0");
    wait::until("the interface is gone", SERVICE_LIMIT, || !unit.has_interface());
    assert_eq!(show("NFileDescriptorStore"), "0");
    assert!(!machine.output("test -e /run/wireguard/wg0.sock").status.success());

    // The same while systemd waits to start it again.
    machine.run(
        "mkdir -p /run/systemd/system/wgsep@.service.d && printf '[Service]\\nRestartSec=5\\nWatchdogSec=1\\n' \
         >/run/systemd/system/wgsep@.service.d/late.conf && systemctl daemon-reload && \
         systemctl start wgsep@wg0",
    );
    until_ping(left, theirs);
    // A process that hangs is killed by the watchdog.
    let before = unit.state();
    machine.run(&format!("kill -STOP {}", dataplane()));
    wait::until("the watchdog kills it", SERVICE_LIMIT, || show("SubState") == "auto-restart");
    until_ping(left, theirs);
    assert_eq!(unit.state(), before);
    let waits = || show("SubState") == "auto-restart";
    let crash = || {
        machine.run(&format!("kill -KILL {}", helper()));
        wait::until("systemd waits with the restart", SERVICE_LIMIT, waits);
        assert!(unit.has_interface());
    };
    crash();
    machine.run("ip link del wg0");
    until_ping(left, theirs);
    crash();
    machine.run("systemctl stop wgsep@wg0");
    wait::until("the interface is gone", SERVICE_LIMIT, || !unit.has_interface());
    let log = machine.run("journalctl --quiet --no-pager --unit wgsep@wg0");
    assert!(log.contains("is given up: a stored queue is a queue of no interface"), "{log}");

    // So many starts that they may be tries of an exploit.
    machine.run(
        "printf '[Unit]\\nStartLimitBurst=3\\n[Service]\\nRestartSec=100ms\\nWatchdogSec=30\\n' \
         >/run/systemd/system/wgsep@.service.d/late.conf && systemctl daemon-reload && \
         systemctl reset-failed wgsep@wg0; systemctl start wgsep@wg0",
    );
    for round in 1..=3 {
        until_ping(left, theirs);
        machine.run(&format!("kill -KILL {}", helper()));
        let again = || show("ActiveState") == "active" && show("MainPID") != "0";
        if round < 3 {
            let restarts = round.to_string();
            wait::until("it runs again", SERVICE_LIMIT, || {
                show("NRestarts") == restarts && again()
            });
        }
    }
    wait::until("the unit has failed", SERVICE_LIMIT, || show("ActiveState") == "failed");
    assert_eq!(
        (show("Result"), show("NFileDescriptorStore")),
        ("signal".to_owned(), "0".to_owned())
    );
    wait::until("the interface is gone", SERVICE_LIMIT, || !unit.has_interface());
}
