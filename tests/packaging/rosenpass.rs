//! The recipe of wgsep(8) for post-quantum keys, run as it is printed, with the unit and systemd.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Command;
use std::time::Duration;

use wgsep_tests::link::{Family, Side};
use wgsep_tests::machine::{Debian, package};
use wgsep_tests::process::{Process, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::skip::skip;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::unit::Unit;
use wgsep_tests::{cache, manual, wait};

/// A restart of both units and an exchange, on a busy machine.
const LIMIT: Duration = Duration::from_secs(90);

#[test]
fn the_recipe_for_post_quantum_keys_works_and_survives_a_crash() {
    let Some(image) = Debian::Trixie.image_or_skips() else { return };
    let entry = match cache::entry("rosenpass") {
        Ok(entry) => entry,
        Err(reason) => return skip(&reason),
    };
    let (scratch, theirs) = (Scratch::new(), Scratch::new());
    let deb = package(&scratch);
    let program = entry.join("bin/rosenpass");
    // The other end, whose rosenpass is root.
    let mut command = Command::new(&program);
    command.arg("gen-keys").arg("--secret-key").arg(theirs.join("secret"));
    run(command.arg("--public-key").arg(theirs.join("public")));
    let unit = Unit::boot(
        &image,
        &[
            (&deb, "/mnt/wgsep.deb"),
            (&program, "/usr/bin/rosenpass"),
            (&entry.join("lib/libsodium.so.23"), "/usr/lib/libsodium.so.23"),
            (&theirs.join("public"), "/mnt/peer"),
        ],
    );
    let Unit { machine, other, .. } = &unit;
    machine.run("dpkg --install /mnt/wgsep.deb");
    unit.start();
    for line in manual::block("an account for rosenpass, its keys, and the socket") {
        machine.run(&line);
    }
    machine.run("cp /mnt/peer /etc/rosenpass/peer");
    let configured = manual::text("with the peer's key of WireGuard last");
    let ours = configured
        .replace("PUBLIC KEY", &other.key.public)
        .replace("192.0.2.2", &other.side.outer(Family::V4).to_string());
    machine.run(&format!("cat >/etc/rosenpass/wg0.toml <<'END'\n{ours}\nEND"));
    let text = manual::text("from then on together with the tunnel");
    machine.run(&format!("cat >/etc/systemd/system/rosenpass@.service <<'END'\n{text}\nEND"));

    let public = machine.output("cat /etc/rosenpass/public").stdout;
    fs::write(theirs.join("peer"), public).unwrap();
    let key_of_machine = machine.run("wg show wg0 public-key");
    let text = configured
        .replace("/etc/rosenpass", &theirs.display().to_string())
        .replace("wg0", &other.daemon.interface)
        .replace("PUBLIC KEY", key_of_machine.trim());
    let text: Vec<_> = text.lines().filter(|line| !line.starts_with("endpoint")).collect();
    fs::write(theirs.join("wg0.toml"), text.join("\n")).unwrap();
    let mut command = other.daemon.netns.command(&program);
    command.arg("exchange-config").arg(theirs.join("wg0.toml"));
    let _their_rosenpass = Process::spawn(command, "the other end's rosenpass");

    machine.run("systemctl daemon-reload && systemctl enable --now rosenpass@wg0");
    let key = |shown: String| shown.trim().split_once('\t').unwrap().1.to_owned();
    let agreed = |before: &str| {
        let found = wait::poll(LIMIT, || {
            let shown = machine.output("wg show wg0 preshared-keys");
            let ours =
                key(String::from_utf8(shown.stdout).ok().filter(|text| text.contains('\t'))?);
            let theirs = key(other.daemon.wg("show", "preshared-keys"));
            (ours == theirs && ours != before && ours != "(none)").then_some(ours)
        });
        found.unwrap_or_else(|| {
            panic!("{}", machine.run("journalctl --quiet --no-pager --unit 'rosenpass@wg0'"))
        })
    };
    let first = agreed("");
    let handshake = || {
        let (netns, interface) = (&other.daemon.netns, &other.daemon.interface);
        netns.run(format!("ip link set {interface} down"));
        netns.run(format!("ip link set {interface} up"));
        // From the end that has no keypair any more.
        until_ping(netns, Side::Left.inner(Family::V4));
    };
    handshake();
    // It is an ordinary user, who sees the socket for preshared keys as the UAPI's.
    let pid = "$(systemctl show --value --property MainPID rosenpass@wg0)";
    let status = machine.run(&format!("cat /proc/{pid}/status"));
    assert!(status.contains("CapEff:\t0000000000000000\n"), "{status}");
    let uid = machine.run("id -u rosenpass");
    assert!(status.contains(&format!("Uid:\t{}\t", uid.trim())), "{status}");
    let of_machine = machine.run("stat -c %i /run/wireguard/wg0.psk");
    let seen = machine.run(&format!("nsenter -m -t {pid} stat -c %i /run/wireguard/wg0.sock"));
    assert_eq!(seen, of_machine);

    // The file has no key, which a reload leaves as it is.
    machine.run("systemctl reload wgsep@wg0");
    assert_ne!(key(machine.run("wg show wg0 preshared-keys")), "(none)");
    handshake();

    // Both units are started again, and another key is agreed on.
    let helper = unit.show("MainPID");
    machine.run(&format!("kill -9 {helper}"));
    wait::until("systemd has started the daemon again", LIMIT, || {
        let now = unit.show("MainPID");
        now != helper && now != "0" && unit.show("ActiveState") == "active"
    });
    let second = agreed(&first);
    assert_ne!(first, second);
    handshake();
    // Started and stopped with the tunnel.
    machine.run("systemctl stop wgsep@wg0");
    assert_eq!(machine.output("systemctl is-active rosenpass@wg0").stdout, b"inactive\n");
    machine.run("systemctl start wgsep@wg0");
    agreed(&second);
    let log = machine.run("journalctl --quiet --no-pager --unit 'rosenpass@wg0'");
    assert!(!log.contains("could not pass psk"), "{log}");
}
