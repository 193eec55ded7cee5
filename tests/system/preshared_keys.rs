//! The socket for preshared keys: wg(8) on it without root, its file, and what becomes of it in an upgrade and a crash.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use wgsep_tests::daemon::{Daemon, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::output;
use wgsep_tests::service_manager::{QUEUE, ServiceManager, listen};
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::{End, Tunnel};
use wgsep_tests::uapi::Uapi;
use wgsep_tests::wg::{KeyPair, hex, preshared_key};
use wgsep_tests::{procfs, require, wait};

const LIMIT: Duration = Duration::from_secs(20);
/// A group that no account has.
const GROUP: u32 = 4242;

fn psk_path(interface: &str) -> PathBuf {
    socket_path(interface).with_extension("psk")
}

fn allow_group(command: &mut Command) {
    command.args(["--psk-group", &GROUP.to_string()]);
}

/// Two ends with the socket, which know each other.
fn tunnel() -> Tunnel {
    let (left, right) = link::joined();
    let start = |netns: &Arc<Netns>| Daemon::start_with(Wgsep, netns, allow_group);
    let tunnel = Tunnel {
        left: End::new(Side::Left, start(&left)),
        right: End::new(Side::Right, start(&right)),
    };
    for (end, other) in tunnel.directions() {
        end.configure(&other.key.public, Some(other.endpoint(Family::V4)), None);
    }
    tunnel
}

/// A command line of wgsep(8)'s recipe: as a user of a group and of no other, where the socket for preshared keys is seen
/// in the place of the UAPI socket.
fn in_the_place(interface: &str, group: u32, line: &str) -> Command {
    let (psk, uapi) = (psk_path(interface), socket_path(interface));
    let script = format!(
        "mount --bind {} {}; exec setpriv --reuid 61000 --regid {group} --clear-groups {line}",
        psk.display(),
        uapi.display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &script]);
    command
}

/// `wg set` of a preshared key there.
fn wg_set(interface: &str, group: u32, peer: &str, psk: &str) -> Output {
    // A pipe of its own, which it may open by a name.
    let line = format!("sh -c 'cat | wg set {interface} peer {peer} preshared-key /dev/stdin'");
    let mut command = in_the_place(interface, group, &line);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(psk.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[track_caller]
fn set(daemon: &Daemon, peer: &str, psk: &str) {
    let done = wg_set(&daemon.interface, GROUP, peer, psk);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let shown = daemon.wg("show", "preshared-keys");
    assert!(shown.contains(&format!("{peer}\t{psk}\n")), "it is not set");
}

/// Has the next packet start a handshake.
fn forget_keypairs(end: &End) {
    let (netns, interface) = (&end.daemon.netns, &end.daemon.interface);
    netns.run(format!("ip link set {interface} down"));
    netns.run(format!("ip link set {interface} up"));
    end.daemon.wg("show", "listen-port");
}

#[test]
fn members_of_the_group_set_preshared_keys_with_wg_and_nothing_else() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    let interface = &left.daemon.interface;
    let found = fs::metadata(psk_path(interface)).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (0, GROUP, 0o660));
    assert_eq!(fs::metadata(socket_path(interface)).unwrap().mode() & 0o7777, 0o600);

    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    for _ in 0..2 {
        let psk = preshared_key();
        set(&left.daemon, &right.key.public, &psk);
        set(&right.daemon, &left.key.public, &psk);
        forget_keypairs(left);
        until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    }
    // Ends of different keys find each other no more.
    set(&left.daemon, &right.key.public, &preshared_key());
    forget_keypairs(left);
    wait::until("the response is not authentic", LIMIT, || {
        let _unanswered = left
            .daemon
            .netns
            .output(format!("ping -n -q -c 1 -W 1 {}", right.side.inner(Family::V4)));
        left.daemon.process.log().contains("its response does not open")
    });

    let before = left.daemon.wg("showconf", "");
    let stranger = wg_set(interface, GROUP, &KeyPair::generate().public, &preshared_key());
    let said = String::from_utf8_lossy(&stranger.stderr).into_owned();
    assert!(!stranger.status.success() && said.contains("No such file"), "{said}");
    assert!(!wg_set(interface, GROUP + 1, &right.key.public, &preshared_key()).status.success());
    let peer = &right.key.public;
    for line in [
        format!("wg show {interface}"),
        format!("wg showconf {interface}"),
        format!("wg set {interface} listen-port 7"),
        format!("wg set {interface} fwmark 7"),
        format!("wg set {interface} private-key /dev/null"),
        format!("wg set {interface} peer {peer} remove"),
        format!("wg set {interface} peer {peer} allowed-ips 0.0.0.0/0"),
        format!("wg set {interface} peer {peer} endpoint 192.0.2.9:9"),
        format!("wg set {interface} peer {peer} persistent-keepalive 9"),
    ] {
        let done = output(&mut in_the_place(interface, GROUP, &line));
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!done.status.success() && done.stdout.is_empty(), "{line}: {done:?}");
        assert!(said.contains("Operation not permitted"), "{line}: {said}");
    }
    assert!(left.daemon.wg("showconf", "") == before, "something else was set");
    // wg(8) takes it for no interface.
    assert!(!left.daemon.netns.run("wg show interfaces").contains("psk"));
    let log = left.daemon.process.log();
    assert!(log.contains("no such peer; configure it first"), "{log}");
}

#[test]
fn there_is_no_such_socket_unless_it_is_asked_for_and_none_where_it_cannot_be_made() {
    require!(Wgsep);
    let netns = Netns::new();
    let daemon = Daemon::start(Wgsep, &netns);
    assert!(!psk_path(&daemon.interface).exists());
    let interface = unique_interface();
    let refused = |options: &[&str], reason: &str| {
        let mut command = netns.command(wgsep_program("wgsep"));
        let done = output(command.args(["-f", &interface]).args(options));
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(1), "{said}");
        assert!(said.contains(reason), "{said}");
        for extension in ["sock", "status", "sandbox", "upgrade"] {
            let path = socket_path(&interface).with_extension(extension);
            assert!(!path.exists(), "{} is left", path.display());
        }
    };
    refused(
        &["--psk-group", "no-such-group"],
        "--psk-group: no group \"no-such-group\"; create it: groupadd --system no-such-group",
    );
    let path = psk_path(&interface);
    fs::write(&path, "mine").unwrap();
    refused(
        &["--psk-group", "0"],
        &format!("{} exists and is not a socket; move it away", path.display()),
    );
    assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    fs::remove_file(path).unwrap();

    // For the unit and for wg-quick(8), which pass no options.
    let mut daemon = Daemon::start_with(Wgsep, &netns, |command| {
        command.env("WGSEP_PSK_GROUP", GROUP.to_string());
    });
    assert_eq!(fs::metadata(psk_path(&daemon.interface)).unwrap().gid(), GROUP);
    // Whoever removes it turns it off; the daemon goes on.
    fs::remove_file(psk_path(&daemon.interface)).unwrap();
    daemon.wg_set("fwmark 7");
    daemon.process.signal(Signal::SIGTERM);
    assert_eq!(daemon.process.exit_within(LIMIT).code(), Some(0), "{}", daemon.process.log());
}

#[test]
fn an_upgrade_hands_over_the_socket_and_the_keys_that_were_set_there() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    let daemon = &left.daemon;
    let psk = preshared_key();
    set(daemon, &right.key.public, &psk);
    set(&right.daemon, &left.key.public, &psk);
    let file = fs::metadata(psk_path(&daemon.interface)).unwrap();
    // One that is connected meanwhile, and has begun.
    let mut begun = Uapi::connect_psk(&daemon.interface).unwrap();
    begun.send(b"set=1\n").unwrap();
    for _ in 0..2 {
        daemon.netns.run(format!(
            "{} upgrade {}",
            wgsep_program("wgsep").display(),
            daemon.interface
        ));
        assert!(daemon.wg("show", "preshared-keys").contains(&psk), "the key is lost");
        let same = fs::metadata(psk_path(&daemon.interface)).unwrap();
        assert_eq!((file.ino(), file.gid(), file.mode()), (same.ino(), same.gid(), same.mode()));
    }
    assert!(begun.transact("\n").is_err(), "the new pair does not have its connection");
    let psk = preshared_key();
    set(daemon, &right.key.public, &psk);
    set(&right.daemon, &left.key.public, &psk);
    forget_keypairs(left);
    until_ping(&daemon.netns, right.side.inner(Family::V4));
    daemon.netns.run(format!("ip link del {}", daemon.interface));
    wait::until("the socket is removed", LIMIT, || !psk_path(&daemon.interface).exists());
}

#[test]
fn a_daemon_that_is_started_again_after_a_crash_has_a_new_socket_and_no_key_of_before() {
    require!(Wgsep);
    let (manager, netns) = (ServiceManager::default(), Netns::new());
    let peer = KeyPair::generate().public;
    let prepare = |daemon: &Daemon| {
        daemon.wg_set(format!("peer {peer} allowed-ips 10.99.0.0/16"));
        assert!(daemon.wg("show", "preshared-keys").contains("(none)"));
    };
    let mut daemon = Daemon::start_with(Wgsep, &netns, |command| {
        manager.supervise(command, 32);
        allow_group(command);
    });
    prepare(&daemon);
    set(&daemon, &peer, &preshared_key());
    manager.until_message("FDSTORE=1");
    let dataplane = daemon.dataplane();
    kill(daemon.process.pid(), Signal::SIGKILL).unwrap();
    daemon.process.exit_within(LIMIT);
    wait::until("both have ended", LIMIT, || !procfs::is_running(dataplane));
    assert!(psk_path(&daemon.interface).exists(), "a killed helper leaves its sockets");

    let again = Daemon::start_on(&daemon.interface, Wgsep, &netns, |command| {
        manager.supervise(command, 32);
        let stored = manager.stored();
        listen(command, &netns, &stored, &vec![QUEUE; stored.len()]);
        allow_group(command);
    });
    // What is dropped must not remove the sockets of the other.
    daemon.interface = unique_interface();
    drop(daemon);
    prepare(&again);
    set(&again, &peer, &preshared_key());
}

#[test]
fn it_works_wherever_the_interface_is_and_goes_with_the_name_of_the_uapi_socket() {
    require!(Wgsep);
    let netns = Netns::new();
    let mut daemon = Daemon::start_with(Wgsep, &netns, allow_group);
    let peer = KeyPair::generate().public;
    daemon.wg_set(format!("peer {peer} allowed-ips 10.99.0.0/16"));
    daemon.move_interface(&Netns::new());
    set(&daemon, &peer, &preshared_key());
    // Renamed, as its interface is: another daemon may take the old name.
    let (old, new) = (daemon.interface.clone(), unique_interface());
    daemon.netns.run(format!("ip link set {old} name {new}"));
    fs::rename(socket_path(&old), socket_path(&new)).unwrap();
    wait::until("the socket of the old name is removed", LIMIT, || !psk_path(&old).exists());
    daemon.interface = new;
    daemon.wg_set("fwmark 7");
}

#[test]
fn a_transaction_that_is_not_all_allowed_changes_nothing_and_the_next_one_counts() {
    require!(Wgsep);
    let netns = Netns::new();
    let daemon = Daemon::start_with(Wgsep, &netns, allow_group);
    let [first, second] = [KeyPair::generate().public, KeyPair::generate().public];
    for peer in [&first, &second] {
        daemon.wg_set(format!("peer {peer}"));
    }
    let [a, b] = [&first, &second].map(|peer| hex(peer));
    let unknown = hex(&KeyPair::generate().public);
    let key = "7".repeat(64);
    let before = daemon.wg("show", "dump");
    let mut client = Uapi::connect_psk(&daemon.interface).unwrap();
    for (rest, expected) in [
        (format!("public_key={unknown}\npreshared_key={key}\n"), "errno=-2\n"),
        ("allowed_ip=10.0.0.0/8\n".to_owned(), "errno=-1\n"),
        ("remove=true\n".to_owned(), "errno=-1\n"),
        (format!("public_key={b}\n"), "errno=-22\n"),
        (format!("public_key={b}\npreshared_key=7\n"), "errno=-22\n"),
        ("nonsense\n".to_owned(), "errno=-71\n"),
    ] {
        let said =
            client.transact(&format!("set=1\npublic_key={a}\npreshared_key={key}\n{rest}\n"));
        assert_eq!(said.unwrap(), expected, "{rest:?}");
        assert_eq!(daemon.wg("show", "dump"), before, "{rest:?}");
    }
    assert_eq!(client.transact("get=1\n\n").unwrap(), "errno=1\n");
    let both =
        format!("public_key={a}\npreshared_key={key}\npublic_key={b}\npreshared_key={key}\n");
    let skipped = format!("public_key={unknown}\nupdate_only=true\npreshared_key={key}\n");
    assert_eq!(client.transact(&format!("set=1\n{both}{skipped}\n")).unwrap(), "errno=0\n");
    let shown = daemon.wg("show", "preshared-keys");
    assert_eq!(shown.lines().count(), 2, "a peer was made");
    assert!(!shown.contains("(none)"));
    // All zeros clear a key, as on the UAPI socket.
    let none = format!("set=1\npublic_key={a}\npreshared_key={}\n\n", "0".repeat(64));
    assert_eq!(client.transact(&none).unwrap(), "errno=0\n");
    assert!(daemon.wg("show", "preshared-keys").contains(&format!("{first}\t(none)\n")));
}
