//! An update of the package replaces the programs of running tunnels while traffic flows, with the unit and systemd.

use std::time::Duration;

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::machine::{Machine, package, write_configuration};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::traffic::{Pinging, until_ping};
use wgsep_tests::tunnel::{End, PORT};
use wgsep_tests::wait;
use wgsep_tests::wg::KeyPair;

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn an_update_of_the_package_interrupts_no_tunnel_and_systemd_follows() {
    let Some(image) = Machine::image_or_skips() else { return };
    let (scratch, (left, right)) = (Scratch::new(), link::joined());
    let deb = package(&scratch.join("built"));
    let key = KeyPair::generate();
    let other = End::new(Side::Right, Daemon::start(Wgsep, &right));
    other.configure(&key.public, None, None);
    let (inner, theirs) = (Side::Left.inner(Family::V4), Side::Right.inner(Family::V4));
    let file = scratch.join("wg0.conf");
    write_configuration(
        &file,
        &format!(
            "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\nAddress = {inner}/32\n\
             \n[Peer]\nPublicKey = {}\nAllowedIPs = {theirs}/32\nEndpoint = {}\n",
            key.private,
            other.key.public,
            other.endpoint(Family::V4)
        ),
    );
    let files = [(&*deb, "/mnt/wgsep.deb"), (&*file, "/etc/wireguard/wg0.conf")];
    let machine = Machine::boot(&image, &left, &files);
    machine.run("dpkg --install /mnt/wgsep.deb && systemctl start wgsep@wg0");
    until_ping(&left, theirs);
    let show = |what: &str| {
        let shown = machine.run(&format!("systemctl show --value --property {what} wgsep@wg0"));
        shown.trim().to_owned()
    };
    let program = || machine.run(&format!("readlink /proc/{}/exe", show("MainPID")));
    let state = || left.run("ip -o link show dev wg0") + &left.run("ip route show dev wg0");
    let (before, handshake) = (state(), other.daemon.peer().latest_handshake);
    for _ in 0..3 {
        let main = show("MainPID");
        let pinging = Pinging::start(&left, theirs);
        pinging.until_more(3);
        machine.run("systemctl reload wgsep@wg0");
        assert!(machine.run("wg show wg0 peers").contains(&other.key.public));
        pinging.until_more(3);
        assert!(pinging.stop().were_answered(), "a ping was lost");
        wait::until("systemd follows", LIMIT, || show("MainPID") != main);
        assert_eq!(show("ActiveState"), "active");
    }
    let pinging = Pinging::start(&left, theirs);
    pinging.until_more(3);
    machine.run("dpkg --install /mnt/wgsep.deb");
    pinging.until_more(3);
    assert!(pinging.stop().were_answered(), "a ping was lost");
    assert!(!program().contains("deleted"), "{}", program());
    assert_eq!((state(), show("NRestarts")), (before.clone(), "0".to_owned()));
    assert_eq!(other.daemon.peer().latest_handshake, handshake, "a handshake took place");
    assert_eq!(show("NFileDescriptorStore"), "17");

    // The new one is as well kept as the one before.
    machine.run(&format!("kill -KILL {}", show("MainPID")));
    wait::until("it is started again", LIMIT, || show("NRestarts") == "1");
    until_ping(&left, theirs);
    assert_eq!(state(), before);
    machine.run("systemctl stop wgsep@wg0");
    assert!(!left.output("ip link show wg0").status.success());
    assert_eq!(machine.run("ls /run/wireguard").trim(), "");
}
