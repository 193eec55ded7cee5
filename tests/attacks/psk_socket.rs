//! Attack 10 on the socket for preshared keys, which a less trusted user may reach: a thousand clients that say nothing, say
//! garbage, or read nothing, and what the UAPI understands.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use wgsep_tests::crowd::Crowd;
use wgsep_tests::daemon::{Daemon, socket_path};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::run;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::tunnel::End;
use wgsep_tests::uapi::Uapi;
use wgsep_tests::wg::{KeyPair, hex, preshared_key};
use wgsep_tests::{require, wait};

/// Descriptors that they may take together, and two clients of the UAPI.
const MOST_DESCRIPTORS: usize = 4 + 2;
/// What they may take together, in kilobytes: 80 KiB each, and what the daemon has not used before.
const MOST_MEMORY: u64 = 4 * 80 + 3 * 1024;
const LIMIT: Duration = Duration::from_secs(60);

fn psk_path(daemon: &Daemon) -> PathBuf {
    socket_path(&daemon.interface).with_extension("psk")
}

fn crowd(daemon: &Daemon) -> Crowd {
    Crowd {
        path: psk_path(daemon),
        most_descriptors: MOST_DESCRIPTORS,
        most_memory: MOST_MEMORY,
        speak,
    }
}

/// Sends what a client of a number has to say now; one that was hung up on says nothing more.
fn speak(number: usize, client: &mut UnixStream) {
    let unread = b"get=1\n\n".repeat(500);
    let said = match number % 6 {
        0 => return,
        1 => &b"set=1\npublic"[..],
        2 => &[b'a'; 4096],
        3 => b"set=1\nprivate_key=0000000000000000000000000000000000000000000000000000000000000001\n\n",
        4 => &unread,
        _ => b"\n\n\n\n",
    };
    let _hung_up = client.write(said);
}

#[test]
fn attack_10_a_thousand_clients_of_the_psk_socket_are_bounded_and_keep_nobody_out() {
    require!(Wgsep);
    let (left, right) = link::joined();
    let start = |netns| {
        Daemon::start_with(Wgsep, netns, |command| {
            command.args(["--psk-group", "0"]);
        })
    };
    let left = End::new(Side::Left, start(&left));
    let right = End::new(Side::Right, start(&right));
    left.configure(&right.key.public, Some(right.endpoint(Family::V4)), None);
    right.configure(&left.key.public, None, None);
    let daemon = &left.daemon;
    let configured = daemon.wg("showconf", "");
    let clients = crowd(daemon).disturbs_nothing(&left, &right);
    assert!(daemon.wg("showconf", "") == configured, "one of them set something");

    // wg(8) gets its turn among them, behind those that wait already.
    let scratch = Scratch::new();
    let psk = preshared_key();
    fs::write(scratch.join("psk"), &psk).unwrap();
    let script = format!(
        "mount --bind {} {}; timeout 120 wg set {} peer {} preshared-key {}",
        psk_path(daemon).display(),
        socket_path(&daemon.interface).display(),
        daemon.interface,
        right.key.public,
        scratch.join("psk").display(),
    );
    run(daemon.netns.command("unshare").args(["--mount", "sh", "-ec", &script]));
    assert!(daemon.wg("show", "preshared-keys").contains(&psk));
    drop(clients);
}

#[test]
fn attack_10_a_silent_client_of_the_psk_socket_makes_room_for_another() {
    require!(Wgsep);
    let daemon = Daemon::start_with(Wgsep, &Netns::new(), |command| {
        command.args(["--psk-group", "0"]);
    });
    let mut silent: Vec<_> = (0..4).map(|_| crowd(&daemon).connect()).collect();
    for client in &mut silent {
        client.write_all(b"set=1\n").unwrap();
    }
    let mut client = Uapi::connect_psk(&daemon.interface).unwrap();
    assert_eq!(client.transact("set=1\n\n").unwrap(), "errno=0\n");
    let hung_up = |client: &mut UnixStream| matches!(client.read(&mut [0; 16]), Ok(0));
    wait::until("one was hung up on", LIMIT, || silent.iter_mut().any(hung_up));
}

/// Nothing but preshared keys of existing peers is set there, whatever the UAPI understands.
#[test]
fn attack_10_no_other_request_of_the_uapi_is_one_of_the_psk_socket() {
    require!(Wgsep);
    let daemon = Daemon::start_with(Wgsep, &Netns::new(), |command| {
        command.args(["--psk-group", "0"]);
    });
    let peer = KeyPair::generate().public;
    daemon.wg_set(format!("peer {peer} allowed-ips 10.99.0.0/16"));
    let before = daemon.wg("show", "dump");
    let (peer, key) = (hex(&peer), "1".repeat(64));
    let mut client = Uapi::connect_psk(&daemon.interface).unwrap();
    for line in [
        format!("private_key={key}"),
        "listen_port=7".to_owned(),
        "fwmark=7".to_owned(),
        "replace_peers=true".to_owned(),
        format!("public_key={peer}\nremove=true"),
        format!("public_key={peer}\nendpoint=192.0.2.9:9"),
        format!("public_key={peer}\npersistent_keepalive_interval=9"),
        format!("public_key={peer}\nreplace_allowed_ips=true"),
        format!("public_key={peer}\nallowed_ip=0.0.0.0/0"),
        format!("public_key={peer}\nprotocol_version=1"),
    ] {
        let valid = format!("public_key={peer}\npreshared_key={key}\n");
        for request in [format!("set=1\n{line}\n{valid}\n"), format!("set=1\n{line}\n\n")] {
            assert_eq!(client.transact(&request).unwrap(), "errno=-1\n", "{request}");
        }
    }
    for request in ["get=1\n\n", "get=statistics\n\n", "get=1\nset=1\n\n"] {
        assert_eq!(client.transact(request).unwrap(), "errno=1\n", "{request}");
    }
    let stranger = format!("set=1\npublic_key={key}\npreshared_key={key}\n\n");
    assert_eq!(client.transact(&stranger).unwrap(), "errno=-2\n");
    assert_eq!(daemon.wg("show", "dump"), before);
}
