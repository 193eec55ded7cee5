//! An update of the package by apt replaces the programs of running tunnels while traffic flows, with the unit and systemd.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use wgsep_tests::machine::{Debian, package};
use wgsep_tests::process::run;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::traffic::{Pinging, until_ping};
use wgsep_tests::unit::Unit;
use wgsep_tests::wait;

const LIMIT: Duration = Duration::from_secs(20);

/// Where apt finds packages, on the machine.
const REPOSITORY: &str = "/mnt/repository";

/// What apt reads of a repository with one package, which is a later version of one that was built.
fn publish(repository: &Path, built: &Path, version: u32) {
    let scratch = Scratch::new();
    let tree = scratch.join("tree");
    run(Command::new("dpkg-deb").arg("--raw-extract").arg(built).arg(&tree));
    let edit = format!("s/^Version: .*/&+{version}/");
    run(Command::new("sed").args(["-i", &edit]).arg(tree.join("DEBIAN/control")));
    let deb = repository.join(format!("{version}.deb"));
    let build = ["--root-owner-group", "-Znone", "--build"];
    run(Command::new("dpkg-deb").args(build).arg(&tree).arg(&deb));
    let fields = run(Command::new("dpkg-deb").arg("--field").arg(&deb));
    let sum = run(Command::new("sha256sum").arg(&deb));
    let (sum, size) = (sum.split(' ').next().unwrap(), fs::metadata(&deb).unwrap().len());
    let index = format!("{fields}Filename: ./{version}.deb\nSize: {size}\nSHA256: {sum}\n\n");
    fs::write(repository.join("Packages"), index).unwrap();
}

#[test]
fn an_update_by_apt_interrupts_no_tunnel_and_systemd_follows() {
    interrupts_no_tunnel(Debian::Bookworm);
}

/// It restarts, of its own accord here, what runs with programs or libraries of before an update.
#[test]
fn on_a_newer_debian_neither_does_needrestart() {
    interrupts_no_tunnel(Debian::Trixie);
}

fn interrupts_no_tunnel(debian: Debian) {
    let Some(image) = debian.image_or_skips() else { return };
    let (scratch, repository) = (Scratch::new(), Scratch::new());
    let deb = package(&scratch);
    publish(&repository, &deb, 1);
    let unit = Unit::boot(&image, &[(&repository, REPOSITORY)]);
    let Unit { machine, netns, other, .. } = &unit;
    let apt = |line: &str| {
        machine.run(&format!(
            "DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=a apt-get --quiet --yes {line} 2>&1"
        ))
    };
    // The archive's lists stay as they were made, so that nothing else is there to be upgraded.
    let update = "-o Dir::Etc::sourcelist=/etc/apt/wgsep.list -o APT::Get::List-Cleanup=0 update";
    machine.run(&format!("echo 'deb [trusted=yes] file:{REPOSITORY} ./' >/etc/apt/wgsep.list"));
    machine.run("cp /etc/apt/wgsep.list /etc/apt/sources.list.d");
    apt(update);
    apt("install --no-install-recommends wgsep");
    unit.start();
    let program = || machine.run(&format!("readlink /proc/{}/exe", unit.show("MainPID")));
    let (before, handshake) = (unit.state(), other.daemon.peer().latest_handshake);
    for _ in 0..3 {
        let main = unit.show("MainPID");
        let pinging = Pinging::start(netns, unit.theirs());
        pinging.until_more(3);
        machine.run("systemctl reload wgsep@wg0");
        assert!(machine.run("wg show wg0 peers").contains(&other.key.public));
        pinging.until_more(3);
        assert!(pinging.stop().were_answered(), "a ping was lost");
        wait::until("systemd follows", LIMIT, || unit.show("MainPID") != main);
        assert_eq!(unit.show("ActiveState"), "active");
    }
    let pinging = Pinging::start(netns, unit.theirs());
    pinging.until_more(3);
    let has_needrestart = debian == Debian::Trixie;
    let outdated = || {
        let listed = machine.run("needrestart -b -r l");
        assert!(listed.contains("NEEDRESTART-VER"), "{listed}");
        listed.contains("NEEDRESTART-SVC: wgsep@wg0.service")
    };
    if has_needrestart {
        // A program that is replaced by other means is named, and the tunnel goes on.
        machine.run("cd /usr/sbin && cp wgsep wgsep.new && mv wgsep.new wgsep");
        assert!(outdated(), "needrestart does not know it");
        let main = unit.show("MainPID");
        let said = machine.run("needrestart -r a");
        assert!(said.contains("wgsep@wg0.service"), "{said}");
        assert_eq!(unit.show("MainPID"), main, "{said}");
    }
    publish(&repository, &deb, 2);
    apt(update);
    let said = apt("upgrade");
    let installed = machine.run("dpkg-query --show --showformat '${Version}' wgsep");
    assert!(installed.ends_with("+2"), "{installed}: {said}");
    pinging.until_more(3);
    assert!(pinging.stop().were_answered(), "a ping was lost");
    assert!(!program().contains("deleted"), "{}", program());
    assert!(!has_needrestart || !outdated(), "{}", machine.run("needrestart -v -r l 2>&1"));
    assert_eq!((unit.state(), unit.show("NRestarts")), (before.clone(), "0".to_owned()));
    assert_eq!(other.daemon.peer().latest_handshake, handshake, "a handshake took place");
    assert_eq!(unit.show("NFileDescriptorStore"), "17");

    // The new one is as well kept as the one before.
    machine.run(&format!("kill -KILL {}", unit.show("MainPID")));
    wait::until("it is started again", LIMIT, || unit.show("NRestarts") == "1");
    until_ping(netns, unit.theirs());
    assert_eq!(unit.state(), before);

    // A service manager that is busy reads of the first when the second has long been there.
    for _ in 0..3 {
        machine.run(
            "systemctl daemon-reload & for number in 1 2 3; do wgsep upgrade wg0 || exit; done; wait",
        );
    }
    until_ping(netns, unit.theirs());
    assert_eq!((unit.show("ActiveState"), unit.show("NRestarts")), ("active".into(), "1".into()));
    machine.run("systemctl stop wgsep@wg0");
    assert!(!unit.has_interface());
    assert_eq!(machine.run("ls /run/wireguard").trim(), "");
}
