//! Attack 10 on the status socket, which less trusted users may reach: a thousand clients that say nothing, say garbage, or
//! read nothing, and events that no client reads.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use wgsep_tests::crowd::Crowd;
use wgsep_tests::daemon::{Daemon, socket_path};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::tunnel::{Plan, Tunnel};
use wgsep_tests::uapi::Uapi;
use wgsep_tests::{require, wait};

/// Descriptors that they may take together, and two clients of the UAPI.
const MOST_DESCRIPTORS: usize = 16 + 2;
/// What they may take together, in kilobytes: 32 KiB each, and what the daemon has not used before.
const MOST_MEMORY: u64 = 16 * 32 + 3 * 1024;
const LIMIT: Duration = Duration::from_secs(60);

fn status_path(daemon: &Daemon) -> PathBuf {
    socket_path(&daemon.interface).with_extension("status")
}

fn crowd(daemon: &Daemon) -> Crowd {
    Crowd {
        path: status_path(daemon),
        most_descriptors: MOST_DESCRIPTORS,
        most_memory: MOST_MEMORY,
        speak,
    }
}

/// Sends what a client of a number has to say now; one that was hung up on says nothing more.
fn speak(number: usize, client: &mut UnixStream) {
    let said = match number % 5 {
        0 => return,
        1 => &b"get"[..],
        2 => &[b'a'; 4096],
        3 => b"set=1\nprivate_key=0000000000000000000000000000000000000000000000000000000000000001\n\n",
        _ => b"get=1\n\nwatch=1\n\n",
    };
    let _hung_up = client.write(said);
}

#[test]
fn attack_10_a_thousand_clients_of_the_status_socket_are_bounded_and_nothing_else_is_disturbed() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let daemon = &left.daemon;
    // Answers that are longer than a socket's buffer.
    let peers: String = (0..3000)
        .map(|number| format!("public_key={number:064x}\nallowed_ip=fdff::{number:x}/128\n"))
        .collect();
    let mut uapi = Uapi::connect(&daemon.interface).unwrap();
    assert_eq!(uapi.transact(&format!("set=1\n{peers}\n")).unwrap(), "errno=0\n");
    assert_eq!(daemon.peers().len(), 3001);
    let clients = crowd(daemon).disturbs_nothing(left, right);
    assert_eq!(daemon.peers().len(), 3001, "none of them set anything");
    // Those that read nothing, and those that say nothing, are hung up on; then it is served again.
    wait::until("the status is answered", LIMIT, || {
        let answer = Uapi::connect_status(&daemon.interface)
            .and_then(|mut status| status.transact("get=1\n\n"));
        answer.is_ok_and(|answer| answer.ends_with("\nerrno=0\n"))
    });
    drop(clients);
}

#[test]
fn attack_10_a_client_that_sends_nothing_is_hung_up_on() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let mut silent = UnixStream::connect(status_path(&daemon)).unwrap();
    let mut endless = UnixStream::connect(status_path(&daemon)).unwrap();
    let began = Instant::now();
    endless.write_all(b"get=").unwrap();
    for client in [&mut silent, &mut endless] {
        client.set_read_timeout(Some(LIMIT)).unwrap();
        assert_eq!(client.read(&mut [0; 16]).unwrap(), 0);
    }
    assert!(began.elapsed() >= Duration::from_secs(25), "{:?}", began.elapsed());
}

/// It can set nothing, whatever the UAPI understands.
#[test]
fn attack_10_no_request_of_the_uapi_is_one_of_the_status_socket() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let before = daemon.wg("show", "dump");
    for request in [
        "set=1\nlisten_port=7\n\n",
        "set=1\nfwmark=7\n\n",
        "set=1\nreplace_peers=true\n\n",
        "get=statistics\n\n",
        "get=1\nset=1\nlisten_port=7\n\n",
        "get=1\nprivate_key=00\n\n",
        "\n\n",
    ] {
        let mut client = Uapi::connect_status(&daemon.interface).unwrap();
        assert_eq!(client.transact(request).unwrap(), "errno=71\n", "{request:?}");
        let after = client.transact("get=1\n\n").unwrap_err();
        let is_hung_up = matches!(
            after.kind(),
            ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
        );
        assert!(is_hung_up, "{request:?}: {after}");
    }
    assert_eq!(daemon.wg("show", "dump"), before);
}
