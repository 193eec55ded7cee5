//! The directory of the UAPI sockets beside units: whose it is, and what it keeps.

use wgsep_tests::machine::{Machine, package};
use wgsep_tests::netns::Netns;
use wgsep_tests::scratch::Scratch;

/// README's directory of a group, in which a user serves without root.
#[test]
fn units_make_the_directory_and_leave_one_of_a_group_and_the_sockets_in_it_as_they_are() {
    let Some(image) = Machine::image_or_skips() else { return };
    let (scratch, netns) = (Scratch::new(), Netns::new());
    let deb = package(&scratch);
    let machine = Machine::boot(&image, &netns, &[(&deb, "/mnt/wgsep.deb")]);
    let owners = |name: &str| {
        machine.run(&format!("stat --format '%A %U:%G' /run/wireguard/{name}")).trim().to_owned()
    };
    let is_served =
        |interface: &str| machine.output(&format!("wg show {interface}")).status.success();
    machine.run("dpkg --install /mnt/wgsep.deb");
    for interface in ["wg0", "wg1"] {
        machine.write_configuration_with_a_key(interface);
    }

    // As after a boot, when nothing has used it.
    machine.run("rm -rf /run/wireguard; systemctl start wgsep@wg0");
    assert_eq!(owners(""), "drwxr-xr-x root:root");
    machine.run("systemctl start wgsep@wg1; systemctl stop wgsep@wg0; wg show wg1");
    assert!(!is_served("wg0"));
    machine.run("systemctl stop wgsep@wg1");

    machine.run("rmdir /run/wireguard; install -d -m 1770 -g wgsep /run/wireguard");
    machine.run("install -m 600 -o www-data -g wgsep /dev/null /run/wireguard/user.sock");
    let is_unchanged = |when: &str| {
        assert_eq!(owners(""), "drwxrwx--T root:wgsep", "{when}");
        assert_eq!(owners("user.sock"), "-rw------- www-data:wgsep", "{when}");
    };
    machine.run("systemctl start wgsep@wg0 wgsep@wg1");
    is_unchanged("after a start");
    machine.run("systemctl restart wgsep@wg0; systemctl stop wgsep@wg1");
    is_unchanged("after a stop");
    assert!(is_served("wg0"), "the stop of one ended another");
    machine.run("dpkg --install /mnt/wgsep.deb; systemd-tmpfiles --create");
    is_unchanged("after an update");
    assert!(is_served("wg0"), "it does not run after an update");
    machine.run("dpkg --remove wgsep");
    is_unchanged("after the removal");
    assert!(!is_served("wg0"));
}
