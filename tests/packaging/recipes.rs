//! Commands of README and wgsep(8), run as they are printed: without root, and against leaks.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use wgsep_tests::daemon::{Daemon, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::{DEVICE, Family};
use wgsep_tests::netns::Netns;
use wgsep_tests::nft::Counter;
use wgsep_tests::process::{output, run, stop};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::skip::skip;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::{Plan, Tunnel};
use wgsep_tests::{manual, procfs, readme, repository, require, tun_device, wait};

const LIMIT: Duration = Duration::from_secs(10);

/// A uid and gid without account or privilege.
const NORMAL_USER: u32 = 65_500;

/// The recipes for Kubernetes: each container of them is as narrow as it can be.
#[test]
fn the_recipes_for_kubernetes_grant_no_more_than_is_needed() {
    for recipe in ["sidecar.yaml", "gateway.yaml", "kilo.yaml"] {
        let path = repository().join("bin/dist/container").join(recipe);
        let text = fs::read_to_string(path).unwrap();
        let count = |line: &str| text.lines().filter(|other| other.trim() == line).count();
        let containers = text.lines().filter(|line| line.trim().starts_with("image: ")).count();
        for line in ["allowPrivilegeEscalation: false", "drop: [ALL]"] {
            assert_eq!(count(line), containers, "{recipe}: {line}");
        }
        assert_eq!(count("type: RuntimeDefault"), 1, "{recipe}");
        // Kilo itself talks to the API server.
        let is_patch = recipe == "kilo.yaml";
        assert!(is_patch || count("automountServiceAccountToken: false") == 1, "{recipe}");
        let limited = text.lines().filter(|line| line.trim().starts_with("limits: {memory: "));
        assert_eq!(limited.count(), containers, "{recipe}");
        for word in ["privileged: true", "hostPID", "SYS_ADMIN]", "cpu: 1,"] {
            assert!(!text.contains(word), "{recipe}: {word}");
        }
    }
    let dockerfile = repository().join("bin/dist/container/Dockerfile");
    let dockerfile = fs::read_to_string(dockerfile).unwrap();
    assert!(dockerfile.contains("install -m 0111 target/*-linux-musl/release/wgsep-dataplane "));
}

/// What stands behind a key of the daemon's liveness probe, in both recipes for Kubernetes.
fn of_both_recipes(key: &str) -> String {
    let found = ["sidecar.yaml", "gateway.yaml"].map(|recipe| {
        let path = repository().join("bin/dist/container").join(recipe);
        let text = fs::read_to_string(path).unwrap();
        let probe = text.split_once("livenessProbe:").unwrap().1;
        let mut values = probe.lines().filter_map(|line| line.trim().strip_prefix(key));
        let value = values.next().map(str::to_owned);
        value.unwrap_or_else(|| panic!("{recipe} has no {key}"))
    });
    assert_eq!(found[0], found[1]);
    found[0].clone()
}

#[test]
fn the_probe_of_the_recipes_outlasts_upgrades_and_fails_where_the_daemon_hangs() {
    require!(Wgsep);
    let number = |key: &str| of_both_recipes(key).trim().parse::<u64>().unwrap();
    let (period, timeout) = (number("periodSeconds:"), number("timeoutSeconds:"));
    let threshold = number("failureThreshold:");
    assert!(period * (threshold - 1) > 15 + timeout, "the longest hand-over and one late probe");
    let mut daemon = Daemon::start(Wgsep, &Netns::new());
    let line = of_both_recipes("exec: {command: [");
    let words = line.trim_end_matches("]}").split(", ").map(|word| match word {
        "/sbin/wgsep" => wgsep_program("wgsep").display().to_string(),
        "wg0" => daemon.interface.clone(),
        other => other.to_owned(),
    });
    let words: Vec<_> = words.collect();
    let probe = || output(Command::new(&words[0]).args(&words[1..])).status.success();
    assert!(probe());
    let upgrade = || {
        let mut command = daemon.netns.command(wgsep_program("wgsep"));
        run(command.args(["upgrade", &daemon.interface]));
    };
    let failed_in_a_row = thread::scope(|scope| {
        let upgrading = scope.spawn(|| (0..20).for_each(|_| upgrade()));
        let (mut failed, mut most) = (0, 0);
        while !upgrading.is_finished() {
            failed = if probe() { 0 } else { failed + 1 };
            most = most.max(failed);
        }
        most
    });
    assert!(failed_in_a_row < threshold, "{failed_in_a_row} in a row");

    let is_dataplane = |pid: &Pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.starts_with("wgsep-data")
    };
    let all = || procfs::with_argument(&daemon.interface).into_iter().filter(is_dataplane);
    wait::until("one dataplane is left", LIMIT, || all().count() == 1);
    let dataplane = all().next().unwrap();
    stop(dataplane);
    let began = Instant::now();
    assert!(!probe() && began.elapsed().as_secs() < timeout, "{:?}", began.elapsed());
    kill(dataplane, Signal::SIGKILL).unwrap();
    daemon.process.exit_within(LIMIT);
    assert!(!probe());
}

/// How many packets for an address behind the tunnel take the ordinary route once the daemon is dead.
fn leaked(outer: Family, behind: &str, prepare: impl Fn(&Netns, &str)) -> u64 {
    let tunnel = Plan { outer, ..Plan::new(Wgsep, Wgsep) }.build();
    let Tunnel { left, right } = &tunnel;
    let (netns, interface) = (&left.daemon.netns, &left.daemon.interface);
    netns.run(format!("ip route add default via {} dev {DEVICE}", right.side.outer(Family::V4)));
    right.daemon.netns.run(format!("ip addr add {behind}/32 dev lo"));
    left.set_peer(right, "allowed-ips 0.0.0.0/0");
    let leak = format!("oifname {DEVICE} ip daddr {behind}");
    let leaks = Counter::new(netns, "leaks", "output", &leak);
    prepare(netns, interface);
    until_ping(netns, behind.parse().unwrap());
    assert_eq!(leaks.packets(), 0, "it did not go through the tunnel");

    kill(left.daemon.dataplane(), Signal::SIGKILL).unwrap();
    wait::until("the interface is gone", LIMIT, || !left.daemon.has_interface());
    netns.output(format!("ping -n -c 2 -i 0.1 -W 1 {behind}"));
    leaks.packets()
}

const BEHIND: &str = "203.0.113.9";

#[test]
fn nothing_leaks_past_the_rule_when_the_daemon_dies() {
    require!(Wgsep);
    let recipe = manual::block("By hand, for all traffic but the tunnel's own datagrams");
    assert_eq!(recipe.len(), 5, "{recipe:?}");
    let leaked = leaked(Family::V4, BEHIND, |netns, interface| {
        for line in &recipe {
            netns.run(line.replace("wg0", interface));
        }
    });
    assert_eq!(leaked, 0);
}

/// What the rule is for: without it, the same traffic goes out in clear.
#[test]
fn control_without_the_rule_traffic_takes_the_ordinary_route() {
    require!(Wgsep);
    let leaked = leaked(Family::V4, BEHIND, |netns, interface| {
        netns.run(format!("ip route add {BEHIND} dev {interface}"));
    });
    assert!(leaked > 0, "the test cannot see a leak");
}

/// README's steps, with the group of a user who has nothing else: a member may, another user may not.
#[test]
fn a_normal_user_of_the_group_runs_it_with_setcap() {
    require!(Wgsep);
    if Command::new("setcap").arg("-h").output().is_err() {
        return skip("setcap is missing: run `make deps`");
    }
    let (scratch, netns, interface) = (Scratch::new(), Netns::new(), unique_interface());
    for program in ["wgsep", "wgsep-dataplane"] {
        scratch.install(program, program);
    }
    let configuration = scratch.join("wg0.conf");
    fs::write(&configuration, "[Interface]\nListenPort = 51820\nFwMark = 7\n").unwrap();
    let as_user = format!("setpriv --reuid {NORMAL_USER} --regid {NORMAL_USER} --clear-groups");
    // The machine's accounts stay as they are.
    let group = NORMAL_USER.to_string();
    let readme = readme::block("a change of the group takes the capability away");
    assert_eq!(readme.len(), 6, "{readme:?}");
    let steps = readme.iter().map(|line| match line.strip_prefix("sudo ") {
        Some(as_root) => as_root.to_owned(),
        None => format!("{as_user} {line}"),
    });
    let steps: Vec<_> = steps
        .map(|line| {
            line.replace("chgrp wgsep", &format!("chgrp {group}"))
                .replace("-g wgsep", &format!("-g {group}"))
                .replace("/usr/sbin/wgsep", &scratch.join("wgsep").display().to_string())
                .replace("wg0.conf", &configuration.display().to_string())
                .replace(" wgsep wg0", &format!(" {} {interface}", scratch.join("wgsep").display()))
                .replace(" wg0 ", &format!(" {interface} "))
        })
        .collect();
    // The machine's own directory stays as it is: this shell has another in its place.
    let (stranger, program) = (NORMAL_USER + 1, scratch.join("wgsep"));
    let script = format!(
        "mkdir -p /run/wireguard; mount -t tmpfs none /run/wireguard; {}\n{}\n\
         {as_user} wg show {interface} dump; ip link del {interface}; \
         ! setpriv --reuid {stranger} --regid {stranger} --clear-groups sh -c '{} --version'",
        tun_device::OPEN_TO_EVERY_USER,
        steps.join("\n"),
        program.display()
    );
    let mut shell = netns.command("unshare");
    shell.args(["--mount", "sh", "-ec", &script]);
    // The user may write neither to /var/log nor, on a machine without syslog, to that.
    let done = output(shell.env("WG_LOG_FILE", "/run/wireguard/log"));
    let (reported, complaints) =
        (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{script}\n{complaints}");
    assert!(reported.contains("51820") && reported.contains("0x7"), "{reported}\n{complaints}");
}

/// As a script of theirs would start it; each unneeded option gets a line, and none is an error.
#[test]
fn a_command_line_of_boringtun_starts_it() {
    require!(Wgsep);
    let daemon = Daemon::start_with(Wgsep, &Netns::new(), |command| {
        command.args(["-t", "2", "-v", "trace", "--disable-connected-udp"]);
        command.args(["--disable-multi-queue", "--disable-drop-privileges"]).env("WG_SUDO", "1");
    });
    let log = daemon.process.log();
    for option in
        ["--disable-connected-udp", "--disable-multi-queue", "--disable-drop-privileges", "WG_SUDO"]
    {
        let notes = log.lines().filter(|line| line.contains(&format!("{option} changes nothing")));
        assert_eq!(notes.count(), 1, "{option}: {log}");
    }
    daemon.wg_set("fwmark 51820 listen-port 0");
}
