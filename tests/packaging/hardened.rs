//! The unit on a hardened Debian: what the host's /proc hides, what the journal shows, and a name that
//! nothing resolves.

use std::path::Path;

use wgsep_tests::machine::{Machine, package, write_configuration};
use wgsep_tests::netns::Netns;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::wg::KeyPair;

fn configuration(path: &Path, endpoint: &str) {
    let [ours, theirs] = [KeyPair::generate(), KeyPair::generate()];
    let text = format!(
        "[Interface]\nPrivateKey = {}\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.7.0.2/32\nEndpoint = {endpoint}\n",
        ours.private, theirs.public
    );
    write_configuration(path, &text);
}

/// A drop-in for the unit, of one interface.
fn drop_in(machine: &Machine, interface: &str, lines: &str) {
    machine.run(&format!(
        "mkdir -p /run/systemd/system/wgsep@{interface}.service.d && printf '[Service]\\n{lines}' \
         >/run/systemd/system/wgsep@{interface}.service.d/test.conf && systemctl daemon-reload"
    ));
}

#[test]
fn the_unit_serves_where_proc_hides_processes_and_fails_with_a_reason() {
    let Some(image) = Machine::image_or_skips() else { return };
    let scratch = Scratch::new();
    let deb = package(&scratch);
    let (served, nameless) = (scratch.join("wg0.conf"), scratch.join("wg1.conf"));
    configuration(&served, "192.0.2.1:51820");
    configuration(&nameless, "vpn.example.invalid:51820");
    let files = [
        (&*deb, "/mnt/wgsep.deb"),
        (&served, "/etc/wireguard/wg0.conf"),
        (&nameless, "/etc/wireguard/wg1.conf"),
    ];
    let netns = Netns::new();
    let machine = Machine::boot(&image, &netns, &files);
    machine.run("dpkg --install /mnt/wgsep.deb");
    let journal = |interface: &str, format: &str| {
        machine.run(&format!(
            "journalctl --quiet --no-pager --output {format} --unit wgsep@{interface}"
        ))
    };

    // The host's own, as an administrator hardens it.
    machine.run("mount -o remount,hidepid=2,gid=77 /proc");
    machine.run("mknod /dev/another c 1 3 && systemctl start wgsep@wg0");
    // The machine's systemd is older than mseal(2), and its filters refuse what they do not know.
    let audit = machine.run("wgsep audit wg0; true");
    let others = |line: &&str| !line.contains("sealed-memory") && !line.starts_with("degraded: ");
    assert!(audit.contains("seccomp"), "{audit}");
    assert!(!audit.lines().filter(others).any(|line| line.contains("degraded")), "{audit}");
    assert!(!audit.contains("could not be read"), "{audit}");
    let log = journal("wg0", "cat");
    let started = log.lines().find(|line| line.contains("started: ")).unwrap();
    assert!(started.starts_with("wgsep[wg0]: started: "), "a time, or a priority: {started}");
    let known = started.replace("'s sealed-memory degraded(EPERM)", "");
    assert!(!known.contains("degraded"), "{started}");
    // /proc/sys is read-only in the unit, which needs no action.
    assert!(!log.contains("settings stay"), "{log}");
    // Of the machine's devices it sees the interface's, and those that every program may use.
    let dev = "/proc/$(systemctl show --value --property MainPID wgsep@wg0)/root/dev";
    machine.run(&format!("test -c {dev}/net/tun && test ! -e {dev}/another"));
    let fields = journal("wg0", "json");
    let fields = fields.lines().find(|line| line.contains("started: version")).unwrap();
    assert!(fields.contains(r#""PRIORITY":"6""#), "{fields}");
    machine.run("systemctl stop wgsep@wg0");

    // A port below 1024 of the file takes nothing more, and neither does one that the host has made privileged, but
    // for a setting: the unit's /proc does not show the limit.
    let with_port = |port: &str| {
        machine.run(&format!(
            "umask 077; sed '/PrivateKey/a ListenPort = {port}' /etc/wireguard/wg0.conf >/etc/wireguard/wg2.conf"
        ));
        let started = machine.output("systemctl start wgsep@wg2").status.success();
        let port = if started { machine.run("wg show wg2 listen-port") } else { String::new() };
        machine.run("systemctl stop wgsep@wg2; systemctl reset-failed wgsep@wg2; true");
        port.trim().to_owned()
    };
    drop_in(&machine, "wg2", "Restart=no\\n");
    assert_eq!(with_port("443"), "443", "{}", journal("wg2", "cat"));
    netns.run("sysctl -qw net.ipv4.ip_unprivileged_port_start=20000");
    assert_eq!(with_port("5001"), "", "the limit can be read");
    let log = journal("wg2", "cat");
    assert!(log.contains("--allow-low-ports (or WGSEP_ALLOW_LOW_PORTS=1)"), "{log}");
    drop_in(&machine, "wg2", "Environment=WGSEP_ALLOW_LOW_PORTS=1\\n");
    assert_eq!(with_port("5001"), "5001", "{}", journal("wg2", "cat"));

    // As many workers as there can be, within the unit's limit of tasks. Not SECURITY.md's drop-in for strict
    // mode: the machine's filter does not know mseal(2) either.
    let many = "ExecStart=/usr/sbin/wgsep --foreground --workers 64 %%i";
    drop_in(&machine, "wg0", &format!("ExecStart=\\n{many}\\n"));
    let started = machine.output("systemctl start wgsep@wg0");
    assert!(started.status.success(), "{}", journal("wg0", "cat"));
    machine.run("systemctl reload wgsep@wg0");
    let threads = machine.run(
        "main=$(systemctl show --value --property MainPID wgsep@wg0); \
         for pid in $main $(cat /proc/$main/task/$main/children); do ls /proc/$pid/task; done | wc -l",
    );
    assert_eq!(threads.trim(), "67", "the unit's reason for TasksMax= is wrong");
    machine.run("systemctl stop wgsep@wg0");

    // A unit's own, which no group may look into either.
    drop_in(&machine, "wg0", "ProtectProc=ptraceable\\nRestart=no\\n");
    assert!(!machine.output("systemctl start wgsep@wg0").status.success());
    let fields = journal("wg0", "json");
    let refused = fields.lines().find(|line| line.contains("CAP_SYS_PTRACE")).unwrap_or(&fields);
    assert!(refused.contains(r#""PRIORITY":"3""#) && refused.contains("ProtectProc="), "{refused}");
    drop_in(&machine, "wg0", "ProtectProc=ptraceable\\nCapabilityBoundingSet=CAP_SYS_PTRACE\\n");
    machine.run("systemctl start wgsep@wg0");
    machine.run("systemctl stop wgsep@wg0");
    drop_in(&machine, "wg0", "LimitNOFILE=128\\n");
    machine.run("systemctl start wgsep@wg0");

    drop_in(&machine, "wg1", "Environment=WGSEP_RESOLVE_SECONDS=1\\nRestart=no\\n");
    assert!(!machine.output("systemctl start wgsep@wg1").status.success());
    let log = journal("wg1", "cat");
    assert!(log.contains("waiting until vpn.example.invalid, the Endpoint of a peer"), "{log}");
    assert!(log.contains("cannot resolve vpn.example.invalid"), "{log}");
    assert!(!machine.output("ip link show wg1").status.success(), "it is left");
}
