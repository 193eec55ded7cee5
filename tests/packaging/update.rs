//! An update, and a removal, of the package beside tunnels that cannot follow.

use wgsep_tests::machine::{Machine, package};
use wgsep_tests::netns::Netns;
use wgsep_tests::scratch::Scratch;

#[test]
fn a_tunnel_that_does_not_restart_or_stop_is_named_and_leaves_no_package_half_done() {
    let Some(image) = Machine::image_or_skips() else { return };
    let (scratch, netns) = (Scratch::new(), Netns::new());
    let deb = package(&scratch);
    let machine = Machine::boot(&image, &netns, &[(&deb, "/mnt/wgsep.deb")]);
    let dpkg = |line: &str| {
        let done = machine.output(&format!("{line} 2>&1"));
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(done.status.success(), "{line}: {said}");
        let of_ours = said.lines().filter(|line| line.starts_with("wgsep: "));
        of_ours.map(str::to_owned).collect::<Vec<_>>()
    };
    let state = || machine.run("dpkg-query --show --showformat '${Status}' wgsep");
    let pid = || machine.run("systemctl show --value --property MainPID wgsep@wg0");
    assert!(dpkg("dpkg --install /mnt/wgsep.deb").is_empty());
    for interface in ["wg0", "wg1"] {
        machine.write_configuration_with_a_key(interface);
        machine.run(&format!("systemctl start wgsep@{interface}"));
    }
    let before = pid();
    assert!(dpkg("dpkg --install /mnt/wgsep.deb").is_empty(), "both run again");
    assert_ne!(pid(), before);

    machine.run("echo PostUp = exit 1 >>/etc/wireguard/wg1.conf");
    let before = pid();
    let named = dpkg("dpkg --install /mnt/wgsep.deb");
    let [line] = &named[..] else { panic!("{named:?}") };
    assert!(line.contains("wgsep@wg1.service does not run after the update; see"), "{line}");
    assert_eq!(state(), "install ok installed");
    assert_ne!(pid(), before);
    machine.run("systemctl is-active wgsep@wg0");

    // Where systemd refuses.
    machine.run(
        "mkdir /run/stub; printf '#!/bin/sh\\ncase $1 in stop | daemon-reload) exit 1 ;; esac\\n\
         exec /usr/bin/systemctl \"$@\"\\n' >/run/stub/systemctl; chmod 755 /run/stub/systemctl",
    );
    let named = dpkg("PATH=/run/stub:$PATH dpkg --install /mnt/wgsep.deb");
    assert!(named[0].contains("run: systemctl daemon-reload"), "{named:?}");
    assert_eq!(state(), "install ok installed");
    let named = dpkg("PATH=/run/stub:$PATH dpkg --remove wgsep");
    assert!(named[0].contains("cannot stop wgsep@wg0.service"), "{named:?}");
    assert!(named[1].contains("run: systemctl daemon-reload"), "{named:?}");
    assert!(!machine.output("test -e /usr/sbin/wgsep").status.success());
}
