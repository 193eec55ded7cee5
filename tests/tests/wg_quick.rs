//! wg-quick(8) with wgsep as its userspace implementation: a full tunnel up, traffic, down, and
//! nothing left behind; twice, because what was left would show.
#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use wgsep_tests::daemon::{Daemon, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::run;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::End;
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{procfs, require, wait};

#[test]
fn a_full_tunnel_over_v4_goes_up_and_down_twice() {
    require!(Wgsep);
    up_and_down_twice(Wgsep, Family::V4);
}

#[test]
fn a_full_tunnel_over_v6_goes_up_and_down_twice() {
    require!(Wgsep);
    up_and_down_twice(Wgsep, Family::V6);
}

#[test]
fn control_wireguard_go_goes_up_and_down_twice() {
    require!(WireguardGo);
    up_and_down_twice(WireguardGo, Family::V4);
}

fn up_and_down_twice(implementation: Implementation, outer: Family) {
    let (left, right) = link::joined();
    let server = End::new(Side::Right, Daemon::start(implementation, &right));
    let quick = Quick::new(implementation, &server, outer);
    server.configure(&quick.key.public, None, None);

    let before = state(&left);
    for _ in 0..2 {
        quick.run(&left, "up");
        until_ping(&left, Side::Right.inner(Family::V4));
        until_ping(&left, Side::Right.inner(Family::V6));
        // Everything but the tunnel's own datagrams goes through the tunnel.
        let route = left.run("ip route get 203.0.113.1");
        assert!(route.contains(&quick.interface), "{route}");

        quick.run(&left, "down");
        wait::until("the daemon is gone", Duration::from_secs(1), || {
            procfs::with_argument(&quick.interface).is_empty()
        });
        wait::until("its socket is gone", Duration::from_secs(1), || {
            !socket_path(&quick.interface).exists()
        });
        assert_eq!(state(&left), before);
    }
}

/// What wg-quick changes in a namespace.
fn state(netns: &Netns) -> String {
    ["ip -o addr", "ip rule", "ip -6 rule", "ip route show table all", "nft list ruleset"]
        .map(|line| netns.run(line))
        .join("\n")
}

/// A configuration of wg-quick in a directory of its own.
struct Quick {
    interface: String,
    key: KeyPair,
    program: PathBuf,
    directory: Scratch,
}

impl Quick {
    fn new(implementation: Implementation, server: &End, outer: Family) -> Self {
        let interface = unique_interface();
        let program = implementation.program().unwrap();
        let quick =
            Self { interface, key: KeyPair::generate(), program, directory: Scratch::new() };
        let text = format!(
            "[Interface]\nPrivateKey = {}\nAddress = {}/24, {}/64\n\
             [Peer]\nPublicKey = {}\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = {}\n",
            quick.key.private,
            Side::Left.inner(Family::V4),
            Side::Left.inner(Family::V6),
            server.key.public,
            server.endpoint(outer),
        );
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(quick.path()).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        quick
    }

    fn path(&self) -> PathBuf {
        self.directory.join(format!("{}.conf", self.interface))
    }

    fn run(&self, netns: &Netns, verb: &str) {
        let mut command = netns.command("wg-quick");
        command.env("WG_QUICK_USERSPACE_IMPLEMENTATION", &self.program);
        run(command.arg(verb).arg(self.path()));
    }
}

impl Drop for Quick {
    fn drop(&mut self) {
        let _ = fs::remove_file(socket_path(&self.interface));
    }
}
