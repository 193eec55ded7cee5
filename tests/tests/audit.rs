//! `wgsep audit`: what it says of a daemon that runs, and with which exit status.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};
use std::sync::Arc;

use serde_json::Value;
use wgsep_tests::daemon::{Daemon, SOCKETS, unique_interface};
use wgsep_tests::implementation::Implementation::{Wgsep, WireguardGo};
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{output, run};
use wgsep_tests::require;
use wgsep_tests::uapi::Uapi;

/// Layers that the kernel shows, and layers of which there is only the helper's word.
const SEEN: [&str; 12] = [
    "user",
    "capabilities",
    "bounding-set",
    "no-new-privs",
    "seccomp",
    "tracer",
    "namespaces",
    "empty-root",
    "limits",
    "sealed-memory",
    "no-processes",
    "non-dumpable",
];
const CLAIMED: [&str; 5] = ["securebits", "no-fd-out", "death-signal", "untraceable", "landlock"];

fn audit(netns: &Netns, interface: &str, options: &[&str]) -> Output {
    let mut command = netns.command(wgsep_program("wgsep"));
    output(command.arg("audit").args(options).arg(interface))
}

#[track_caller]
fn audit_json(daemon: &Daemon) -> (i32, Value) {
    let said = audit(&daemon.netns, &daemon.interface, &["--json"]);
    let text = String::from_utf8_lossy(&said.stdout);
    let Ok(json) = serde_json::from_str(&text) else { panic!("no JSON: {said:?}") };
    (said.status.code().unwrap(), json)
}

/// The finding of one layer of one process.
#[track_caller]
fn finding<'j>(json: &'j Value, process: &str, layer: &str) -> &'j Value {
    let findings = json["findings"].as_array().unwrap();
    let found = findings.iter().find(|one| one["process"] == process && one["layer"] == layer);
    found.unwrap_or_else(|| panic!("no {layer} of the {process} in {json}"))
}

#[test]
fn started_by_root_every_layer_is_in_force() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let (status, json) = audit_json(&daemon);
    assert_eq!(status, 0, "{json}");
    assert_eq!(json["helper"], daemon.process.pid().as_raw());
    assert_eq!(json["dataplane"], daemon.dataplane().as_raw());
    for (layers, source) in [(&SEEN[..], "kernel"), (&CLAIMED[..], "claimed")] {
        for layer in layers {
            let finding = finding(&json, "dataplane", layer);
            assert_eq!(
                (&finding["state"], &finding["source"]),
                (&"applied".into(), &source.into())
            );
        }
    }
    // How much there is, from the kernel; that all keys are in it, from the report.
    let findings = json["findings"].as_array().unwrap();
    let [kernels, claimed] = ["kernel", "claimed"].map(|source| {
        let is = |one: &&Value| one["layer"] == "secret-memory" && one["source"] == source;
        findings.iter().find(is).unwrap_or_else(|| panic!("no {source} secret-memory in {json}"))
    });
    let kilobytes = kernels["seen"].as_str().and_then(|seen| seen.strip_suffix(" KiB")).unwrap();
    assert!(kilobytes.parse::<u32>().unwrap() >= 1024, "{kernels}");
    assert_eq!(claimed["state"], "applied", "{claimed}");
    let capabilities = &finding(&json, "helper", "capabilities")["seen"];
    assert_eq!(capabilities, "CAP_KILL CAP_NET_ADMIN");

    // A client of another network namespace is a socket that none of this one's tables lists.
    let _stays = Uapi::connect(&daemon.interface).unwrap();
    let table = audit(&daemon.netns, &daemon.interface, &[]);
    let text = String::from_utf8_lossy(&table.stdout).into_owned();
    assert_eq!(table.status.code(), Some(0), "{text}");
    assert!(text.ends_with("every layer is in force\n"), "{text}");
    // A header, a line a finding, and the verdict, with a blank line before and after the table.
    let findings = json["findings"].as_array().unwrap().len();
    assert_eq!(text.lines().count(), findings + 5, "{text}");
}

/// Without CAP_SETPCAP nobody empties a bounding set.
#[test]
fn a_degraded_layer_is_named_with_its_errno_and_a_remedy() {
    require!(Wgsep);
    let netns = Netns::new();
    let daemon = Daemon::start_with(Wgsep, &netns, |command| {
        let program = command.get_program().to_owned();
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let mut without = netns.command("setpriv");
        without.arg("--bounding-set=-setpcap").arg(program).args(arguments);
        *command = without;
    });
    let (status, json) = audit_json(&daemon);
    assert_eq!(status, 1, "{json}");
    let bounding = finding(&json, "dataplane", "bounding-set");
    assert_eq!((&bounding["state"], &bounding["source"]), (&"degraded".into(), &"kernel".into()));
    assert!(bounding["remedy"].as_str().unwrap().contains("root"), "{bounding}");
    let securebits = finding(&json, "dataplane", "securebits");
    assert_eq!(securebits["seen"], "degraded(EPERM)", "{securebits}");
    // The rest does not suffer.
    assert_eq!(finding(&json, "dataplane", "seccomp")["state"], "applied");

    let table = audit(&netns, &daemon.interface, &[]);
    assert_eq!(table.status.code(), Some(1));
    let text = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(text.contains("dataplane bounding-set: start wgsep as root"), "{text}");
}

#[test]
fn without_its_report_the_audit_is_incomplete() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let report = format!("{SOCKETS}/{}.sandbox", daemon.interface);
    std::fs::remove_file(&report).unwrap();
    let (status, json) = audit_json(&daemon);
    assert_eq!(status, 3, "{json}");
    assert_eq!(finding(&json, "dataplane", "landlock")["state"], "unread");
    assert_eq!(finding(&json, "dataplane", "seccomp")["state"], "applied");
    let table = audit(&daemon.netns, &daemon.interface, &[]);
    let text = String::from_utf8_lossy(&table.stdout).into_owned();
    let remedies: Vec<_> = text.lines().filter(|line| line.starts_with(&report)).collect();
    let [remedy] = remedies[..] else { panic!("{text}") };
    assert!(remedy.contains("ENOENT") && remedy.contains("start wgsep again"), "{text}");
    // Root has no more to read.
    assert!(!text.contains("root may"), "{text}");
}

#[test]
fn there_is_one_line_for_what_cannot_be_audited() {
    require!(Wgsep, WireguardGo);
    let netns = Netns::new();
    let nobody = unique_interface();
    let other = Daemon::start(WireguardGo, &netns);
    let ours = Daemon::start(Wgsep, &netns);
    let program = wgsep_program("wgsep");
    let stranger = |interface: &str| {
        let mut command = Arc::clone(&netns).command("setpriv");
        command.args(["--reuid=61000", "--regid=61000", "--clear-groups"]);
        // The build directory may be out of a stranger's reach; its descriptor is not.
        command.args(["sh", "-c", "exec \"$0\" audit \"$1\""]).arg(&program).arg(interface);
        output(&mut command)
    };
    for (said, reason) in [
        (audit(&netns, &nobody, &[]), "no daemon serves"),
        (audit(&netns, &other.interface, &[]), "not wgsep"),
        (audit(&netns, "a/b", &[]), "bad interface name"),
        (stranger(&ours.interface), "ermission denied"),
    ] {
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(matches!(said.status.code(), Some(2 | 126)), "{said:?}");
        assert!(text.contains(reason) && text.lines().count() == 1, "{text}");
        assert!(said.stdout.is_empty(), "{said:?}");
    }
}

#[test]
fn the_report_goes_with_the_daemon() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let report = format!("{SOCKETS}/{}.sandbox", daemon.interface);
    assert!(std::fs::metadata(&report).is_ok());
    let interface = daemon.interface.clone();
    let mut daemon = daemon;
    daemon.netns.run(format!("ip link del {interface}"));
    daemon.process.exit_within(std::time::Duration::from_secs(1));
    assert!(std::fs::metadata(&report).is_err(), "{report} was left behind");
}

/// In a group's directory a member may make the report of a daemon that has none.
#[test]
fn attack_11_a_report_that_the_helper_did_not_write_is_not_believed_followed_or_waited_for() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let report = format!("{SOCKETS}/{}.sandbox", daemon.interface);
    let claims = std::fs::read_to_string(&report).unwrap();
    let fake = format!("{report}-fake");
    std::fs::write(&fake, &claims).unwrap();
    for (script, reason) in [
        ("mkfifo -m 0644 $0", "no regular file"),
        ("mkdir $0", "no regular file"),
        ("ln -s $0-fake $0", "ymbolic link"),
        ("cp $0-fake $0; chown 61001 $0", "uid 61001's"),
        ("head -c 20000 /dev/zero >$0", "longer than"),
        ("truncate -s 1T $0", "longer than"),
        ("printf '\\377' >$0", "utf-8"),
    ] {
        let mut plant = Command::new("sh");
        run(plant.args(["-ec", &format!("rm -rf $0; {script}"), &report]));
        let mut command = daemon.netns.command("timeout");
        command.arg("10").arg(wgsep_program("wgsep")).args(["audit", &daemon.interface]);
        let said = output(&mut command);
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        assert_eq!(said.status.code(), Some(3), "{script}: {said:?}");
        let line = text.lines().find(|line| line.contains("landlock")).unwrap();
        assert!(line.contains("unread") && line.contains(reason), "{script}: {line}");
    }
    // Root's own may still have been spoilt.
    let spoilt = claims.replace("landlock=applied", "landlock=\u{1b}]0;x\u{7}\u{9b}2J");
    std::fs::remove_file(&report).unwrap();
    std::fs::write(&report, spoilt).unwrap();
    for options in [&[][..], &["--json"]] {
        let said = audit(&daemon.netns, &daemon.interface, options);
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        let shown = |one: char| one == '\n' || !one.is_control();
        assert!(text.contains("]0;x") && text.chars().all(shown), "{text:?}");
    }
    for left in [report, fake] {
        std::fs::remove_file(left).unwrap();
    }
}
