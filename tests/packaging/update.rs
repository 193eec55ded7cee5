//! An update, and a removal, of the package beside tunnels that cannot follow.

use std::time::Duration;

use wgsep_tests::machine::{Machine, package};
use wgsep_tests::netns::Netns;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::wait;

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

    // What wg(8) has set stays.
    machine.run("wg set wg0 peer $(wg genkey | wg pubkey) persistent-keepalive 25");
    let peers = || machine.run("wg show wg0 peers");
    let (before, had) = (pid(), peers());
    assert!(dpkg("dpkg --install /mnt/wgsep.deb").is_empty(), "both run again");
    assert_ne!(pid(), before);
    assert_eq!((peers(), had.lines().count()), (had.clone(), 1));

    // One cannot follow: its socket was renamed, with its interface.
    machine.run("ip link set wg1 name wg9; mv /run/wireguard/wg1.sock /run/wireguard/wg9.sock");
    machine.run("until ! [ -e /run/wireguard/wg1.upgrade ]; do sleep 0.1; done; touch /run/wireguard/wg1.upgrade");
    let before = pid();
    let named = dpkg("dpkg --install /mnt/wgsep.deb");
    let [line] = &named[..] else { panic!("{named:?}") };
    assert!(line.contains("wgsep@wg1.service goes on as before the update; see"), "{line}");
    assert_eq!(state(), "install ok installed");
    assert_ne!(pid(), before);
    machine.run("systemctl is-active wgsep@wg0 wgsep@wg1");

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

/// Those of units and by hand, and what a crash has left, which no unit stops.
#[test]
fn with_the_package_ends_every_tunnel_with_its_rules_and_what_its_hooks_did() {
    let Some(image) = Machine::image_or_skips() else { return };
    let (scratch, netns) = (Scratch::new(), Netns::new());
    let deb = package(&scratch);
    let machine = Machine::boot(&image, &netns, &[(&deb, "/mnt/wgsep.deb")]);
    // Settings of the network are the machine's, as on a real one.
    machine.run("dpkg --install /mnt/wgsep.deb; mount -o remount,bind,rw /proc/sys");
    let state = || {
        machine.run(
            "ip -o -br address; ip rule; ip -6 rule; nft list ruleset; ls /run/wgsep-quick /var/tmp 2>/dev/null; true",
        )
    };
    let before = state();
    for interface in ["wg0", "wg1", "wg2"] {
        machine.write_configuration_with_a_key(interface);
        machine.run(&format!(
            "printf 'PostUp = touch /var/tmp/%%i\\nPostDown = rm /var/tmp/%%i\\n[Peer]\\nPublicKey = %s\\n\
             AllowedIPs = 0.0.0.0/0\\n' $(wg genkey | wg pubkey) >>/etc/wireguard/{interface}.conf"
        ));
    }
    machine.run("systemctl start wgsep@wg0; wgsep-quick up wg1; wgsep-quick up wg2");
    machine.run("kill -9 $(pgrep -f '[w]gsep --fwmark .* wg2$')");
    let has_wg2 = || machine.output("ip link show wg2").status.success();
    wait::until("the interface is gone", Duration::from_secs(10), || !has_wg2());
    assert!(state().contains("wg-quick-wg2") && state().contains("wg2"), "{}", state());
    let removed = machine.output("dpkg --remove wgsep 2>&1");
    let said = String::from_utf8_lossy(&removed.stdout);
    assert!(removed.status.success() && !said.contains("wgsep: cannot"), "{said}");
    assert_eq!(state(), before);
}
