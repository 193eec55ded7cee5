//! An update, and a removal, of the package beside tunnels that cannot follow.

use std::time::{Duration, Instant};

use wgsep_tests::machine::{Debian, Machine, package};
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
    for interface in ["wg0", "wg1", "wg-lan"] {
        machine.write_configuration_with_a_key(interface);
        machine.run(&format!("systemctl start wgsep@{interface}"));
    }
    let indices = || machine.run("ip -o link show type tun | cut -d : -f 1,2");
    let (before, created) = (pid(), indices());
    assert_eq!(created.lines().count(), 3);
    assert!(dpkg("dpkg --install /mnt/wgsep.deb").is_empty(), "both run again");
    assert_ne!(pid(), before);
    assert_eq!(indices(), created);

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

    // One of a version without that command.
    machine.run("rm /run/wireguard/wg0.upgrade");
    let before = indices();
    dpkg("dpkg --install /mnt/wgsep.deb");
    assert_ne!(indices(), before, "it was not restarted");
    machine.run("systemctl is-active wgsep@wg0");

    // As where /run is full.
    machine.run("mv /run/wgsep-quick /run/kept; touch /run/wgsep-quick");
    let before = pid();
    let named = dpkg("dpkg --install /mnt/wgsep.deb");
    let full = "wgsep@wg0.service goes on as before the update: cannot write to /run/wgsep-quick";
    assert!(named.iter().any(|line| line.contains(full)), "{named:?}");
    assert_eq!((state().as_str(), pid()), ("install ok installed", before));
    machine.run("rm /run/wgsep-quick; mv /run/kept /run/wgsep-quick");

    // Where systemd refuses.
    machine.run(
        "mkdir /run/stub; printf '#!/bin/sh\\ncase $1 in stop | daemon-reload) exit 1 ;; esac\\n\
         exec /usr/bin/systemctl \"$@\"\\n' >/run/stub/systemctl; chmod 755 /run/stub/systemctl",
    );
    let named = dpkg("PATH=/run/stub:$PATH dpkg --install /mnt/wgsep.deb");
    assert!(named[0].contains("run: systemctl daemon-reload"), "{named:?}");
    assert_eq!(state(), "install ok installed");
    let named = dpkg("PATH=/run/stub:$PATH dpkg --remove wgsep");
    assert!(
        named[0].contains("cannot stop wgsep@") && named[0].contains("wgsep@wg0.service"),
        "{named:?}"
    );
    assert!(named[1].contains("run: systemctl daemon-reload"), "{named:?}");
    assert!(!machine.output("test -e /usr/sbin/wgsep").status.success());
}

/// A unit that waits for a name takes half a minute, and a reload that the administrator asks for meanwhile is one of the file.
#[test]
fn an_update_waits_for_no_unit_that_starts_skips_no_other_reload_and_obeys_the_machine_s_policy() {
    let Some(image) = Machine::image_or_skips() else { return };
    let (scratch, netns) = (Scratch::new(), Netns::new());
    let deb = package(&scratch);
    let machine = Machine::boot(&image, &netns, &[(&deb, "/mnt/wgsep.deb")]);
    machine.run("dpkg --install /mnt/wgsep.deb");
    let shown = |what: &str, interface: &str| {
        let line = format!("systemctl show --value --property {what} wgsep@{interface}");
        machine.run(&line).trim().to_owned()
    };
    let pid = |interface: &str| shown("MainPID", interface);
    let add_peer = |interface: &str, more: &str| {
        format!(
            "printf '[Peer]\\nPublicKey = %s\\n{more}' $(wg genkey | wg pubkey) >>/etc/wireguard/{interface}.conf"
        )
    };
    for interface in ["wg0", "wg1", "wg2"] {
        machine.write_configuration_with_a_key(interface);
    }
    machine.run(&add_peer("wg2", "Endpoint = name.invalid:51820\\n"));
    machine.run("systemctl start wgsep@wg0 wgsep@wg1; systemctl --no-block start wgsep@wg2");
    let starts = || shown("SubState", "wg2") == "start-post";
    wait::until("the unit waits for the name", Duration::from_secs(10), starts);
    // In the midst of the update, the administrator has wg1 read its file.
    machine.run(&format!(
        "mkdir /run/stub; cat >/run/stub/systemctl <<'E'\n#!/bin/sh\n\
         [ \"$*\" != 'reload wgsep@wg0.service' ] || {{ {}; /usr/bin/systemctl reload wgsep@wg1; }}\n\
         exec /usr/bin/systemctl \"$@\"\nE\nchmod 755 /run/stub/systemctl",
        add_peer("wg1", "")
    ));
    let dpkg = |what: &str| {
        let done = machine.output(&format!("PATH=/run/stub:$PATH dpkg {what} 2>&1"));
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(done.status.success(), "{said}");
        said
    };
    let (before, began) = (["wg0", "wg1", "wg2"].map(pid), Instant::now());
    let said = dpkg("--install /mnt/wgsep.deb");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert!(!said.contains("wgsep: "), "{said}");
    assert_eq!(machine.run("wg show wg1 peers").lines().count(), 1);
    let runs_anew = || {
        let now = ["wg0", "wg1", "wg2"].map(pid);
        now.iter().zip(&before).all(|(now, before)| now != "0" && now != before)
    };
    wait::until("each runs the new program", Duration::from_secs(10), runs_anew);

    // What an update that was killed left says nothing of another process that has its number.
    machine.run(&format!(
        "mkdir -p /run/wgsep-quick; echo 1 >/run/wgsep-quick/wg1.updating; {}; systemctl reload wgsep@wg1",
        add_peer("wg1", "")
    ));
    assert_eq!(machine.run("wg show wg1 peers").lines().count(), 2);

    let before = pid("wg0");
    machine.run(
        "printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d",
    );
    dpkg("--install /mnt/wgsep.deb");
    let said = dpkg("--remove wgsep");
    assert!(said.contains("policy-rc.d forbids"), "{said}");
    assert_eq!(pid("wg0"), before);
    machine.run("wg show wg0");
}

#[test]
fn daemons_of_no_unit_are_upgraded_too_but_not_in_a_container_nor_those_of_another_program() {
    upgrades_daemons_of_no_unit(Debian::Bookworm);
}

#[test]
fn a_newer_debian_upgrades_daemons_of_no_unit_too() {
    upgrades_daemons_of_no_unit(Debian::Trixie);
}

/// By dpkg in a service, as PackageKit runs it: what is in the control group of that ends with it.
fn upgrades_daemons_of_no_unit(debian: Debian) {
    let Some(image) = debian.image_or_skips() else { return };
    let (scratch, netns) = (Scratch::new(), Netns::new());
    let deb = package(&scratch);
    let machine = Machine::boot(&image, &netns, &[(&deb, "/mnt/wgsep.deb")]);
    machine.run("dpkg --install /mnt/wgsep.deb");
    machine.write_configuration_with_a_key("wg1");
    machine.run(
        "wgsep wg0 && wgsep-quick up wg1 && ip netns add other && ip netns exec other wgsep wg2",
    );
    machine.run(
        "for file in sbin/wgsep libexec/wgsep/wgsep-dataplane; do \
         install -D /usr/$file /usr/local/$file || exit; done; /usr/local/sbin/wgsep wg3",
    );
    machine.run(
        "setsid unshare --pid --fork --mount-proc wgsep --foreground wg4 >/dev/null 2>&1 & \
         until wg show wg4 >/dev/null 2>&1; do sleep 0.1; done",
    );
    // Other services, of which one has more than a program.
    machine.run(
        "systemd-run --quiet --unit plain wgsep --foreground wg5; \
         systemd-run --quiet --unit confined --property PrivateTmp=yes wgsep --foreground wg6; \
         until wg show wg5 >/dev/null 2>&1 && wg show wg6 >/dev/null 2>&1; do sleep 0.1; done",
    );
    let helper = |interface: &str| {
        let audited = machine.output(&format!("wgsep audit --json {interface}")).stdout;
        let audited: serde_json::Value = serde_json::from_slice(&audited).unwrap();
        audited["helper"].as_u64().unwrap()
    };
    let all = || ["wg0", "wg1", "wg2", "wg5", "wg3", "wg4", "wg6"].map(helper);
    let indices = || {
        let links = "ip -o link show type tun | cut -d : -f 1,2";
        machine.run(&format!("{links}; ip netns exec other {links}"))
    };
    let update = || {
        machine.run(
            "systemd-run --quiet --collect --property Type=oneshot --property StandardOutput=file:/run/said \
             --property StandardError=file:/run/said dpkg --install /mnt/wgsep.deb; cat /run/said; rm /run/said",
        )
    };
    let (before, created) = (all(), indices());
    let of_ours = |said: &str| -> Vec<String> {
        said.lines().filter(|line| line.starts_with("wgsep: ")).map(str::to_owned).collect()
    };
    let said = update();
    let [line] = &of_ours(&said)[..] else { panic!("{said}") };
    assert!(line.contains("wg6 goes on") && line.contains("confined.service"), "{line}");
    let after = all();
    for (number, (pid, earlier)) in after.into_iter().zip(before).enumerate() {
        let is_upgraded = number < 4;
        assert_eq!(pid != earlier, is_upgraded, "number {number}: {said}");
        let program = machine.run(&format!("readlink /proc/{pid}/exe"));
        assert_eq!(program.contains("deleted"), number > 4, "number {number}: {program}");
    }
    assert_eq!(indices(), created);

    // One that cannot follow is named.
    machine.run("rm /run/wireguard/wg0.upgrade && touch /run/wireguard/wg0.upgrade");
    machine.run("systemctl stop confined");
    // So is one of a user, who could command what root began.
    machine.run(
        "chgrp 65500 /run/wireguard; chmod 1770 /run/wireguard; chmod 666 /dev/net/tun; \
         setpriv --reuid=65500 --regid=65500 --clear-groups --inh-caps=+net_admin --ambient-caps=+net_admin \
         wgsep --log-file /dev/null wg7",
    );
    let of_user = helper("wg7");
    let said = update();
    let lines = of_ours(&said);
    assert!(lines.len() == 3 && lines[1].contains("wg0 goes on as before"), "{said}");
    assert!(lines[2].ends_with("sudo -u '#65500' wgsep upgrade wg7"), "{said}");
    assert_eq!(helper("wg7"), of_user);
    machine.run("ip link del wg7");
    assert_eq!(helper("wg0"), after[0]);
    assert_ne!(helper("wg1"), after[1]);

    // The service still ends what it began.
    machine.run("systemctl stop plain");
    wait::until("wg5 is gone", Duration::from_secs(30), || {
        !machine.output("ip link show wg5").status.success()
    });
    // With the package end those that it upgrades.
    machine.run("dpkg --remove wgsep");
    assert_eq!(
        machine.run("ls /run/wireguard/*.sock"),
        "/run/wireguard/wg3.sock\n/run/wireguard/wg4.sock\n"
    );
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
    // The hooks of two fail and hang.
    let hooks = [("wg0", "true"), ("wg1", "false"), ("wg2", "true"), ("wg5", "sleep 1000")];
    for (interface, pre_down) in hooks {
        machine.write_configuration_with_a_key(interface);
        machine.run(&format!(
            "printf 'PreDown = {pre_down}\\nPostUp = touch /var/tmp/%%i\\nPostDown = rm /var/tmp/%%i\\n[Peer]\\nPublicKey = %s\\n\
             AllowedIPs = 0.0.0.0/0\\n' $(wg genkey | wg pubkey) >>/etc/wireguard/{interface}.conf"
        ));
    }
    machine.run(
        "systemctl start wgsep@wg0; for name in wg1 wg2 wg5; do wgsep-quick up $name || exit; done",
    );
    machine.run("kill -9 $(pgrep -f '[w]gsep --fwmark .* wg2$')");
    let has_wg2 = || machine.output("ip link show wg2").status.success();
    wait::until("the interface is gone", Duration::from_secs(10), || !has_wg2());
    assert!(state().contains("wg-quick-wg2") && state().contains("wg2"), "{}", state());
    // What is of no file, what is in the store of a unit that waits, and what has failed for good.
    machine.run("wgsep --log-file /var/log/wgsep-wg3.log wg3; mkdir -p /run/systemd/system/wgsep@wg0.service.d; systemctl enable wgsep@wg0 wgsep@wg4");
    machine.run(
        "printf '[Service]\\nRestartSec=1h\\n' >/run/systemd/system/wgsep@wg0.service.d/late.conf; \
         systemctl daemon-reload; kill -9 $(systemctl show --value --property MainPID wgsep@wg0)",
    );
    let shown = |what: &str| {
        machine
            .run(&format!("systemctl show --value --property {what} wgsep@wg0"))
            .trim()
            .to_owned()
    };
    let waits = || shown("SubState") == "auto-restart";
    wait::until("the unit waits for its restart", Duration::from_secs(10), waits);
    assert_eq!(shown("NFileDescriptorStore"), "17");
    assert!(!machine.output("systemctl start wgsep@wg4").status.success(), "it has no file");
    assert!(machine.run("ls /var/log").contains("wgsep-wg3.log"));
    // A hook may hang for a minute, which is three seconds here.
    machine.run(
        "mkdir /run/stub; cat >/run/stub/timeout <<'E'\n#!/bin/sh\n\
         if [ \"$1 $2\" = '--kill-after=30 60' ]; then shift 2; set -- 3 \"$@\"; fi\n\
         exec /usr/bin/timeout \"$@\"\nE\nchmod 755 /run/stub/timeout",
    );
    let dpkg = |what: &str| {
        let line = format!("PATH=/run/stub:$PATH dpkg --{what} wgsep 2>&1");
        let removed = machine.output(&line);
        let said = String::from_utf8_lossy(&removed.stdout);
        assert!(removed.status.success() && !said.contains("wgsep: cannot"), "{said}");
        assert!(!said.contains("warning"), "{said}");
    };
    // The tunnels of the machine are not those of a chroot, though it has the same /run.
    let all = || format!("{}{}", state(), machine.run("pgrep -l wgsep; ls /run/wireguard"));
    let with_chroot = all();
    machine.run(
        "mkdir /var/chroot; mount -t tmpfs none /var/chroot; cd /var/chroot; mkdir upper work root; \
         mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work none root; \
         for part in proc sys dev run; do mount --rbind /$part root/$part; mount --make-rslave root/$part; done",
    );
    machine.run("chroot /var/chroot/root dpkg --remove wgsep");
    assert_eq!(all(), with_chroot);
    machine.run("umount --recursive /var/chroot/root; umount /var/chroot; rmdir /var/chroot");
    dpkg("remove");
    assert_eq!(state(), before);
    assert_eq!(
        machine.run(
            "systemctl list-units --plain --no-legend --state=activating,active,failed 'wgsep@*'"
        ),
        ""
    );
    assert_eq!(
        machine.run("pgrep -l wgsep; ls -d /run/wireguard /run/wgsep-quick 2>/dev/null; true"),
        ""
    );
    // Which ones are enabled is kept, as other configuration is.
    let enabled = || machine.output("ls /etc/systemd/system/*/wgsep@wg0.service").status.success();
    assert!(enabled());
    dpkg("purge");
    let left =
        "find /etc /run /usr /var -xdev -name '*wgsep*' | grep -v '^/run/systemd/system/'; true";
    assert_eq!(machine.run(left), "");
}
