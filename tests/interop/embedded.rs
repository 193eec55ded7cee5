//! Programs that embed the protocol's library, with daemons as their peers: the examples of `wgsep-tokio`.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use wgsep_tests::daemon::{Daemon, unique_interface};
use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{Process, output, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::traffic::{Load, iperf, until_ping};
use wgsep_tests::tunnel::End;
use wgsep_tests::wg::{KeyPair, preshared_key};
use wgsep_tests::{example, require, wait};

/// More than any of what is waited for takes, on a slow machine.
const LIMIT: Duration = Duration::from_secs(30);
/// The port of the page.
const PORT: u16 = 8080;

/// An example, and a directory with its file.
struct Program {
    path: PathBuf,
    scratch: Scratch,
}

impl Program {
    #[track_caller]
    fn new(name: &str, file: &str) -> Self {
        let scratch = Scratch::new();
        let path = scratch.join(name);
        // Where an account without privileges finds it.
        run(Command::new("install").args(["-m", "755"]).arg(example::build(name)).arg(&path));
        fs::set_permissions(&*scratch, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(scratch.join("file.conf"), file).unwrap();
        Self { path, scratch }
    }

    fn file(&self) -> PathBuf {
        self.scratch.join("file.conf")
    }

    /// As an account that has no file and no privilege.
    fn without_privileges(&self, netns: &Netns) -> Command {
        let mut command = netns.command("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]);
        command.args(["--inh-caps=-all", "--bounding-set=-all"]).arg(&self.path).arg(self.file());
        command
    }
}

/// What the file of a program at the right has, whose one peer is the daemon at the left.
fn file(key: &KeyPair, daemon: &End, psk: &str) -> String {
    let (own, other) = (Side::Right, daemon.side);
    format!(
        "[Interface]\nPrivateKey = {}\nAddress = {}/24, {}/64\n\
         [Peer]\nPublicKey = {}\nPresharedKey = {psk}\nAllowedIPs = {}/32, {}/128\nEndpoint = {}\n",
        key.private,
        own.inner(Family::V4),
        own.inner(Family::V6),
        daemon.key.public,
        other.inner(Family::V4),
        other.inner(Family::V6),
        daemon.endpoint(Family::V4),
    )
}

/// A daemon at the left that has a program as its peer, the namespace of that, and the program's file.
fn beside_a_daemon(implementation: Implementation) -> (End, Arc<Netns>, String) {
    let (left, right) = link::joined();
    let daemon = End::new(Side::Left, Daemon::start(implementation, &left));
    let (key, psk) = (KeyPair::generate(), preshared_key());
    // It learns the endpoint from the handshake.
    daemon.configure(&key.public, None, Some(&psk));
    let file = file(&key, &daemon, &psk);
    (daemon, right, file)
}

macro_rules! with {
    ($($name:ident: $implementation:expr;)+) => {$(
        mod $name {
            use super::*;

            #[test]
            fn a_tunnel_with_a_tun_device_carries_traffic_both_ways() {
                require!($implementation);
                a_tunnel_carries_traffic_both_ways($implementation);
            }

            #[test]
            fn a_program_without_privileges_fetches_a_page_over_v4() {
                require!($implementation);
                a_page_is_fetched($implementation, Family::V4);
            }

            #[test]
            fn a_program_without_privileges_fetches_a_page_over_v6() {
                require!($implementation);
                a_page_is_fetched($implementation, Family::V6);
            }
        }
    )+};
}

with! {
    wgsep: Wgsep;
    wireguard_go: WireguardGo;
}

fn a_tunnel_carries_traffic_both_ways(implementation: Implementation) {
    let (daemon, right, file) = beside_a_daemon(implementation);
    let (program, interface) = (Program::new("tunnel", &file), unique_interface());
    let mut command = right.command(&program.path);
    command.arg(&interface).arg(program.file());
    let mut process = Process::spawn(command, "tunnel");
    let has_started = |log: &str| log.contains("ip link set") && log.ends_with('\n');
    wait::until("the example says how to set its interface up", LIMIT, || {
        assert_eq!(process.try_exit(), None, "{}", process.log());
        has_started(&process.log())
    });
    for line in process.log().lines() {
        right.run(line);
    }
    for family in [Family::V4, Family::V6] {
        let (own, other) = (Side::Right.inner(family), daemon.side.inner(family));
        until_ping(&right, other);
        until_ping(&daemon.daemon.netns, own);
        let tcp = iperf(&right, &daemon.daemon.netns, other, Load::Tcp);
        assert!(tcp.bytes > 0, "{family:?}: {tcp:?}");
    }
    assert_eq!(process.try_exit(), None, "{}", process.log());
}

/// Serves one page to each of as many connections, on a thread.
fn serve(netns: &Netns, address: IpAddr, page: &str, connections: usize) {
    let address = SocketAddr::new(address, PORT);
    let listener = netns.inside(|| TcpListener::bind(address)).unwrap();
    let page = page.to_owned();
    thread::spawn(move || {
        for stream in listener.incoming().take(connections) {
            let Ok(mut stream) = stream else { return };
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                let Ok(1) = stream.read(&mut byte) else { return };
                request.extend(byte);
            }
            let found = request.starts_with(b"GET /page ");
            let (status, body) = if found { ("200 OK", &*page) } else { ("404 Not Found", "") };
            let head = format!("HTTP/1.0 {status}\r\nContent-Length: {}\r\n\r\n", body.len());
            // A client that has exited is the test's to notice.
            let _ = stream.write_all((head + body).as_bytes());
        }
    });
}

fn a_page_is_fetched(implementation: Implementation, inner: Family) {
    let (daemon, right, file) = beside_a_daemon(implementation);
    let program = Program::new("fetch", &file);
    let address = daemon.side.inner(inner);
    // Some hundred packets, and more than a window.
    let page: String = (0..40_000).map(|line| format!("line {line}\n")).collect();
    serve(&daemon.daemon.netns, address, &page, 2);
    let at = SocketAddr::new(address, PORT);
    let fetch =
        |path: &str| output(program.without_privileges(&right).arg(format!("http://{at}/{path}")));

    let fetched = fetch("page");
    let stderr = String::from_utf8_lossy(&fetched.stderr);
    assert!(fetched.status.success(), "{stderr}");
    assert!(fetched.stdout == page.as_bytes(), "{} bytes; {stderr}", fetched.stdout.len());
    let missing = fetch("another");
    assert!(!missing.status.success());
    assert!(String::from_utf8_lossy(&missing.stderr).contains("404 Not Found"), "{missing:?}");
}

/// The two daemons have their sockets in the namespace of the hub, and their interfaces each in one of its own: one
/// reaches the other through the hub or not at all.
#[test]
fn a_hub_without_privileges_connects_wgsep_and_wireguard_go() {
    require!(Wgsep, WireguardGo);
    const HUB_PORT: u16 = 51_900;
    let hub_addresses: [IpAddr; 2] =
        [[192, 168, 77, 3].into(), [0xfd77, 0, 0, 0, 0, 0, 0, 3].into()];
    let key = KeyPair::generate();
    let middle = Netns::new();
    let ends = [(Side::Left, Wgsep), (Side::Right, WireguardGo)].map(|(side, implementation)| {
        let mut end = End::new(side, Daemon::start(implementation, &middle));
        end.port += side as u16;
        end.daemon.move_interface(&Netns::new());
        end
    });
    let peer = |end: &End| {
        let addresses = [Family::V4, Family::V6].map(|family| end.side.inner(family));
        let [v4, v6] = addresses;
        format!("[Peer]\nPublicKey = {}\nAllowedIPs = {v4}/32, {v6}/128\n", end.key.public)
    };
    let [v4, v6] = hub_addresses;
    let interface = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = {HUB_PORT}\nAddress = {v4}/24, {v6}/64\n",
        key.private
    );
    let program = Program::new("hub", &[interface, peer(&ends[0]), peer(&ends[1])].concat());
    let mut hub = Process::spawn(program.without_privileges(&middle), "hub");
    wait::until("the hub listens", LIMIT, || {
        assert_eq!(hub.try_exit(), None, "{}", hub.log());
        hub.log().contains(&format!("listening on [::]:{HUB_PORT}"))
    });

    for (end, family) in [(&ends[0], Family::V4), (&ends[1], Family::V6)] {
        let loopback = if family == Family::V4 { "127.0.0.1" } else { "::1" };
        let endpoint = SocketAddr::new(loopback.parse().unwrap(), HUB_PORT);
        end.configure(&key.public, Some(endpoint), None);
        let all = "192.168.77.0/24,fd77::/64";
        end.daemon.wg_set(format!("peer {} allowed-ips {all}", key.public));
        for address in hub_addresses {
            until_ping(&end.daemon.netns, address);
        }
    }
    for (from, to) in [(&ends[0], &ends[1]), (&ends[1], &ends[0])] {
        for family in [Family::V4, Family::V6] {
            until_ping(&from.daemon.netns, to.side.inner(family));
        }
    }
    let (from, to) = (&ends[0].daemon.netns, &ends[1].daemon.netns);
    let tcp = iperf(from, to, ends[1].side.inner(Family::V4), Load::Tcp);
    assert!(tcp.bytes > 0, "{tcp:?}");
    assert_eq!(hub.try_exit(), None, "{}", hub.log());
}

#[test]
fn an_example_says_what_is_wrong_with_its_file() {
    let wrong = [
        ("[Interface]\nPrivateKey = short\n", "line 2: a key is 44 characters"),
        ("[Interface]\nPrivateKey\n", "line 2 has no `=`"),
        ("[Peer]\nAllowedIPs = 192.0.2.0/33\n", "line 2: a prefix length is 0 to 32 bits"),
        ("[Interface]\nAddress = 192.0.2.1/24, 192.0.2\n", "line 2: not an IP address"),
        ("[Peer]\nEndpoint = 192.0.2.1:51820\n", "a peer has no PublicKey"),
    ];
    for (file, error) in wrong {
        let program = Program::new("hub", file);
        let failed = output(Command::new(&program.path).arg(program.file()));
        assert!(!failed.status.success());
        let stderr = String::from_utf8_lossy(&failed.stderr);
        assert!(stderr.contains(error), "{stderr}");
    }
    let program = Program::new("hub", "");
    let missing = output(Command::new(&program.path).arg(Path::new("/nonexistent/file.conf")));
    assert!(
        String::from_utf8_lossy(&missing.stderr).contains("cannot read /nonexistent/file.conf")
    );
}
