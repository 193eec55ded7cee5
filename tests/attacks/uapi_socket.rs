//! Attack 10: a thousand clients of the UAPI socket that are idle, slow or endless. `system/uapi` tests that no other user
//! may connect. Attack 11: what is put in the place of the socket's file while it is served.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use wgsep_tests::daemon::{Daemon, SOCKETS, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::Family;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{Process, run, stop};
use wgsep_tests::traffic::{Pinging, until_ping};
use wgsep_tests::tunnel::{Plan, Tunnel};
use wgsep_tests::uapi::Uapi;
use wgsep_tests::{procfs, require, wait};

const CLIENTS: usize = 1000;
/// Descriptors that they may take together.
const MOST_DESCRIPTORS: usize = 64;
/// What they may take together, in kilobytes: a line of 64 KiB for each of 64 clients, in memory that doubles when
/// it grows, and of which each doubling leaves a block for the next of its size; and what the daemon has not used
/// before.
const MOST_MEMORY: u64 = 64 * 256 + 4 * 1024;

/// Sends what a client of a number has to say now; one that was hung up on says nothing more.
fn speak(number: usize, client: &mut UnixStream, endless: &[u8]) {
    let said = match number % 3 {
        0 => return,
        1 => &b"a"[..],
        _ => endless,
    };
    let _hung_up = client.write(said);
}

/// Many, each with a transaction of this length, in bytes, which alone is allowed; together they have seven
/// times what is.
const LONG_CLIENTS: usize = 60;
const LONG: usize = 8 << 20;
/// What they may take together, in kilobytes: 64 MiB of text, in memory that doubles when it grows, and of
/// which each doubling leaves a block for the next of its size. Their text alone has 480 MiB.
const MOST_LONG_MEMORY: u64 = 400 << 10;

#[test]
fn attack_10_long_transactions_of_many_clients_are_bounded_together() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let dataplane = daemon.dataplane();
    let memory = || procfs::memory(dataplane, "VmRSS").unwrap();
    let used = memory();
    let connect = |_| UnixStream::connect(socket_path(&daemon.interface)).unwrap();
    let mut clients: Vec<_> = (0..LONG_CLIENTS).map(connect).collect();
    for client in &mut clients {
        client.write_all(b"set=1\n").unwrap();
    }
    let part = format!("fwmark={:0>1016}\n", 7).repeat(64);
    for _ in 0..LONG / part.len() {
        for client in &mut clients {
            client.write_all(part.as_bytes()).unwrap();
        }
        let more = memory().saturating_sub(used);
        assert!(more <= MOST_LONG_MEMORY, "{more} kB more");
    }
    // Whoever asks what is short is answered meanwhile.
    assert_eq!(daemon.listen_port(), 0);
    let mut outcomes = BTreeMap::<_, usize>::new();
    for client in &mut clients {
        client.write_all(b"\n").unwrap();
        let mut reply = [0; 64];
        let len = client.read(&mut reply).unwrap();
        *outcomes.entry(String::from_utf8_lossy(&reply[..len]).into_owned()).or_default() += 1;
    }
    let count = |errno: i32| outcomes.get(&format!("errno={errno}\n\n")).copied().unwrap_or(0);
    // EBUSY is 16. The others fill what there is, or nearly.
    assert_eq!(count(0) + count(-16), LONG_CLIENTS, "{outcomes:?}");
    assert!((4..=8).contains(&count(0)), "{outcomes:?}");
}

/// Many, who leave room for one that reads. Each asks for the configuration of so many peers, more than 3 MB, and does not
/// read the answer.
const UNREADING: usize = 63;
const PEERS: usize = 9_000;
/// What they may take together, in kilobytes: 16 KiB of text each, and what the daemon has not used before.
const MOST_UNREAD_MEMORY: u64 = UNREADING as u64 * 16 + 3 * 1024;
/// The same once the configuration has changed: 16 MiB of text.
const MOST_COMPLETED_MEMORY: u64 = MOST_UNREAD_MEMORY + 16 * 1024;

#[test]
fn attack_10_answers_that_many_clients_do_not_read_are_bounded_together_and_traffic_continues() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let daemon = &left.daemon;
    let dataplane = daemon.dataplane();
    let peers: String = (0..PEERS)
        .map(|number| format!("public_key={number:064x}\nallowed_ip=fdff::{number:x}/128\n"))
        .collect();
    let set = |lines: &str| {
        let mut uapi = Uapi::connect(&daemon.interface).unwrap();
        assert_eq!(uapi.transact(&format!("set=1\n{lines}\n")).unwrap(), "errno=0\n");
    };
    set(&peers);
    assert_eq!(daemon.peers().len(), PEERS + 1);
    until_ping(&daemon.netns, right.side.inner(Family::V4));
    let pinging = Pinging::start(&daemon.netns, right.side.inner(Family::V4));
    pinging.until_more(1);
    let memory = || procfs::memory(dataplane, "VmRSS").unwrap();
    let used = memory();
    let assert_used = |most: u64, when: &str| {
        let more = memory().saturating_sub(used);
        assert!(more <= most, "{more} kB more {when}");
    };
    let ask = || {
        let connect = |_| UnixStream::connect(socket_path(&daemon.interface)).unwrap();
        let mut clients: Vec<_> = (0..UNREADING).map(connect).collect();
        for client in &mut clients {
            client.write_all(b"get=1\n\n").unwrap();
        }
        for client in &mut clients {
            // The rest of the answer waits.
            client.read_exact(&mut [0; 1]).unwrap();
        }
        // Whoever reads is answered meanwhile.
        assert_eq!(daemon.peers().len(), PEERS + 1);
        clients
    };
    for _round in 0..2 {
        let clients = ask();
        assert_used(MOST_UNREAD_MEMORY, "while they do not read");
        pinging.until_more(3);
        drop(clients);
    }
    let clients = ask();
    set("fwmark=1\n");
    assert_eq!(daemon.peers().len(), PEERS + 1);
    assert_used(MOST_COMPLETED_MEMORY, "once the configuration has changed");
    drop(clients);
    assert_eq!(daemon.peers().len(), PEERS + 1);
    assert_used(MOST_COMPLETED_MEMORY, "once they are gone");
    let pings = pinging.stop();
    assert!(pings.received + 2 >= pings.sent, "{pings:?}");
}

#[test]
fn attack_10_a_thousand_idle_slow_and_endless_clients_are_bounded_and_traffic_continues() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let dataplane = left.daemon.dataplane();
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    let pinging = Pinging::start(&left.daemon.netns, right.side.inner(Family::V4));
    let descriptors = || procfs::descriptors(dataplane).len();
    let memory = || procfs::memory(dataplane, "VmRSS").unwrap();
    let (before, used) = (descriptors(), memory());

    let endless = vec![b'a'; 32 * 1024];
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        let mut client = UnixStream::connect(socket_path(&left.daemon.interface)).unwrap();
        client.set_nonblocking(true).unwrap();
        speak(number, &mut client, &endless);
        clients.push(client);
        assert!(descriptors() <= before + MOST_DESCRIPTORS, "after {number} clients");
    }
    let begun = pinging.replies();
    while pinging.replies() < begun + 10 {
        for (number, client) in clients.iter_mut().enumerate() {
            speak(number, client, &endless);
        }
        assert!(descriptors() <= before + MOST_DESCRIPTORS);
        assert!(memory() <= used + MOST_MEMORY, "{} kB more", memory() - used);
    }
    // Whoever has something to ask is answered, all of them being there still.
    assert_eq!(left.daemon.listen_port(), left.port);
    let pings = pinging.stop();
    assert!(pings.received + 2 >= pings.sent, "{pings:?}");
}

/// How long an end may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(10);

/// A daemon in a directory of its own, which is mended at the start and may change later.
fn in_own_directory(netns: &Netns, interface: &str) -> Process {
    let script = "mount -t tmpfs -o mode=0755 none /run; mkdir /run/wireguard; exec \"$@\"";
    let mut command = netns.command("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-ec", script, "sh"]);
    command.arg(wgsep_program("wgsep")).args(["-f", interface]);
    let mut daemon = Process::spawn(command, "wgsep in a directory of its own");
    wait::until("it has started", LIMIT, || {
        assert_eq!(daemon.try_exit(), None, "{}", daemon.log());
        daemon.log().contains("started: ")
    });
    daemon
}

/// Where anybody of a group may rename, a renaming may be an attack: its new name is no place to go to.
#[test]
fn attack_11_a_renamed_socket_is_followed_only_where_no_other_user_could_have_done_that() {
    require!(Wgsep);
    for (mode, user, remedy) in [
        ("0755", "0", None),
        ("1770", "0", None),
        ("0770", "0", Some("chmod 1770 /var/run/wireguard")),
        ("0755", "61001", Some("chown root /var/run/wireguard")),
    ] {
        let (netns, name, new) = (Netns::new(), unique_interface(), unique_interface());
        let mut daemon = in_own_directory(&netns, &name);
        let directory = format!("/proc/{}/root/run/wireguard", daemon.pid());
        run(Command::new("chmod").args([mode, &directory]));
        run(Command::new("chown").args([user, &directory]));
        let [from, to] = [&name, &new].map(|name| format!("{directory}/{name}.sock"));
        fs::rename(from, &to).unwrap();
        let what = format!("{mode} of uid {user}");
        if let Some(remedy) = remedy {
            let status = daemon.exit_within(LIMIT);
            let log = daemon.log();
            assert_eq!(status.code(), Some(1), "{what}: {log}");
            assert!(log.contains("the UAPI socket was renamed") && log.contains(remedy), "{log}");
            continue;
        }
        let reported = format!("the UAPI socket was renamed to \"{new}.sock\"");
        wait::until("the renaming is logged", LIMIT, || daemon.log().contains(&reported));
        netns.run(format!("nsenter --mount --target {} wg show {new}", daemon.pid()));
        // Another daemon may take the old name, and its report's.
        let left: Vec<_> = fs::read_dir(&directory).unwrap().map(|one| one.unwrap()).collect();
        assert_eq!(left.len(), 1, "{what}: {left:?}");
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.exit_within(LIMIT).code(), Some(0), "{what}: {}", daemon.log());
    }
}

/// More events than the kernel keeps for a helper that does not read them: what became of the socket is
/// not among them.
#[test]
fn attack_11_what_took_the_sockets_place_stays_there_though_the_event_of_that_was_lost() {
    require!(Wgsep);
    let mut daemon = Daemon::start(Wgsep, &Netns::new());
    let socket = socket_path(&daemon.interface);
    let most = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    stop(daemon.process.pid());
    let other = format!("{SOCKETS}/{}", unique_interface());
    for _ in 0..=most.trim().parse::<u32>().unwrap() {
        fs::write(&other, "").unwrap();
        fs::remove_file(&other).unwrap();
        fs::write(format!("{other}-2"), "").unwrap();
        fs::remove_file(format!("{other}-2")).unwrap();
    }
    fs::remove_file(&socket).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    daemon.process.signal(Signal::SIGCONT);
    assert_eq!(daemon.process.exit_within(LIMIT).code(), Some(0), "{}", daemon.process.log());
    assert!(UnixStream::connect(&socket).is_ok(), "another's socket was removed");
    drop(listener);
    let report = socket.with_extension("sandbox");
    assert!(!report.exists(), "{} is its own, and was left", report.display());
}
