//! The unit's step `configure`: what it makes of a file that wg-quick(8) would read, and what it says of one
//! that cannot be applied.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::process::Output;
use std::sync::Arc;

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::output;
use wgsep_tests::require;
use wgsep_tests::wg::KeyPair;

/// A host with a daemon that is ready, as it is when the unit runs the step.
struct Host {
    netns: Arc<Netns>,
    daemon: Daemon,
}

impl Host {
    fn new() -> Self {
        let netns = Netns::new();
        let daemon = Daemon::start(Wgsep, &netns);
        Self { netns, daemon }
    }

    /// A LAN with this prefix on another interface.
    fn with_lan(self, addresses: &[&str]) -> Self {
        self.netns.run("ip link add lan0 type veth peer name lan1");
        self.netns.run("ip link set lan0 up");
        self.netns.run("ip link set lan1 up");
        for address in addresses {
            let nodad = if address.contains(':') { " nodad" } else { "" };
            self.netns.run(format!("ip address add {address} dev lan0{nodad}"));
        }
        self
    }

    /// Runs the step on a file of its own.
    fn configure(&self, action: &str, file: &str) -> Output {
        let line = "mkdir -p /etc/wireguard && mount -t tmpfs none /etc/wireguard && umask 077 && \
                    printf %s \"$1\" >/etc/wireguard/$3.conf && exec timeout 60 \"$4\" \"$2\" \"$3\"";
        let mut command = self.netns.command("unshare");
        command.args(["--mount", "sh", "-c", line, "sh", file, action, &self.daemon.interface]);
        output(command.arg(script()))
    }

    #[track_caller]
    fn must(&self, action: &str, file: &str) {
        let done = self.configure(action, file);
        assert!(done.status.success(), "{action}: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// The one line that the step says when it fails.
    #[track_caller]
    fn refused(&self, action: &str, file: &str) -> String {
        let refused = self.configure(action, file);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{action}: {said}");
        assert!(refused.stdout.is_empty(), "{refused:?}");
        assert_eq!(said.lines().count(), 1, "{said}");
        said
    }

    /// Where the kernel sends packets for an address.
    #[track_caller]
    fn is_routed(&self, address: &str) -> bool {
        let routed = self.netns.run(format!("ip route get {address}"));
        routed.contains(&format!(" dev {} ", self.daemon.interface))
    }

    /// The destinations of the interface's routes of one family, but for link-local ones.
    fn routes(&self, family: &str) -> Vec<String> {
        let shown = self.netns.run(format!("ip {family} route show dev {}", self.daemon.interface));
        let routes = shown.lines().map(|line| line.split(' ').next().unwrap().to_owned());
        routes.filter(|route| !route.starts_with("fe80:")).collect()
    }

    fn link(&self) -> String {
        self.netns.run(format!("ip link show {}", self.daemon.interface))
    }
}

fn script() -> PathBuf {
    fs::canonicalize(concat!(env!("CARGO_MANIFEST_DIR"), "/../bin/dist/configure")).unwrap()
}

/// A file with these lines of the interface, and a peer for each of these lists of AllowedIPs.
fn file(lines: &str, peers: &[&str]) -> String {
    let mut file = format!("[Interface]\nPrivateKey = {}\n{lines}\n", KeyPair::generate().private);
    for allowed_ips in peers {
        let key = KeyPair::generate().public;
        file += &format!("[Peer]\nPublicKey = {key}\nAllowedIPs = {allowed_ips}\n");
    }
    file
}

/// With another interface's route between the two: without a route of the longer one, its packets would leave
/// by that, in clear.
#[test]
fn of_nested_allowed_ips_each_has_its_route() {
    require!(Wgsep);
    let (lines, lan) = ("Address = 10.66.0.2/32, fd66::2/128", ["10.0.0.7/9", "fd10::7/24"]);
    for peers in [
        &["10.0.0.0/8, 10.1.0.0/16, fd10::/16, fd10:0:1::/48"][..],
        &["10.1.0.0/16, 10.0.0.0/8, fd10:0:1::/48, fd10::/16"],
        &["10.0.0.0/8, fd10::/16", "10.1.0.0/16", "fd10:0:1::/48"],
        &["10.1.0.0/16, fd10::/16", "fd10:0:1::/48, 10.0.0.0/8"],
    ] {
        let host = Host::new().with_lan(&lan);
        let file = file(lines, peers);
        for action in ["up", "reload"] {
            host.must(action, &file);
            assert!(host.is_routed("10.1.2.3"), "{action} with {peers:?}");
            assert!(host.is_routed("fd10:0:1::3"), "{action} with {peers:?}");
            assert_eq!(host.routes("-4"), ["10.0.0.0/8", "10.1.0.0/16"], "{action}");
        }
    }
    // The LAN may come later, and the longer one with a reload.
    let host = Host::new();
    host.must("up", &file(lines, &["10.0.0.0/8, 10.1.0.0/16", "fd10::/16, fd10:0:1::/48"]));
    let more = ["10.0.0.0/8, 10.1.0.0/16, 10.2.0.0/16", "fd10::/16, fd10:0:1::/48, fd10:0:2::/48"];
    host.must("reload", &file(lines, &more));
    let host = host.with_lan(&lan);
    for address in ["10.1.2.3", "10.2.2.3", "fd10:0:1::3", "fd10:0:2::3"] {
        assert!(host.is_routed(address), "{address}");
    }
}

/// The address's own route may be as wide.
#[test]
fn allowed_ips_within_the_address_have_a_route_only_where_another_interface_is_between() {
    require!(Wgsep);
    let file = file("Address = 10.66.0.2/8, fd66::2/16", &["10.1.0.0/16, fd66:1::/64"]);
    let alone = Host::new();
    alone.must("up", &file);
    assert!(alone.is_routed("10.1.2.3") && alone.is_routed("fd66:1::3"));
    assert_eq!(alone.routes("-4"), ["10.0.0.0/8"]);
    let host = Host::new().with_lan(&["10.0.0.7/9", "fd66:1::7/32"]);
    for action in ["up", "reload"] {
        host.must(action, &file);
        assert!(host.is_routed("10.1.2.3") && host.is_routed("fd66:1::3"), "{action}");
        assert!(!host.is_routed("10.2.0.1") && !host.is_routed("fd66:1:0:1::1"), "{action}");
    }
}

/// wg(8) masks them, and gives a prefix that two peers have to the last.
#[test]
fn allowed_ips_may_have_host_bits() {
    require!(Wgsep);
    let host = Host::new();
    let peers = ["10.66.1.1/24, 10.67.1.9/25", "10.67.1.1/25, fd66:1::9/64"];
    let file = file("Address = 10.66.0.2/32, fd66::2/128", &peers);
    for action in ["up", "reload"] {
        host.must(action, &file);
        assert_eq!(host.routes("-4"), ["10.66.1.0/24", "10.67.1.0/25"], "{action}");
        assert_eq!(host.routes("-6"), ["fd66::2", "fd66:1::/64"], "{action}");
    }
}

#[test]
fn an_mtu_that_takes_no_ipv6_is_refused_by_start_and_reload_alike() {
    require!(Wgsep);
    let host = Host::new();
    let only_ipv4 = file("Address = 10.66.0.2/24\nMTU = 1200", &["10.66.0.0/24"]);
    host.must("up", &only_ipv4);
    host.must("reload", &only_ipv4);
    assert!(host.link().contains("mtu 1200"));
    for (address, peer, refused) in [
        ("10.66.0.2/24, fd66::2/64", "10.67.0.0/24", "fd66::2/64"),
        ("10.66.0.2/24", "10.67.0.0/24, fd66:1::/64", "fd66:1::/64"),
    ] {
        let file = file(&format!("Address = {address}\nMTU = 1279"), &[peer]);
        for action in ["up", "reload"] {
            let said = host.refused(action, &file);
            assert!(said.contains("an MTU below 1280 takes no IPv6 address"), "{said}");
            assert!(said.contains("MTU = 1279") && said.contains(refused), "{said}");
            // What is there stays.
            assert!(host.link().contains("mtu 1200"));
            assert_eq!(host.routes("-4"), ["10.66.0.0/24"]);
        }
    }
    let routed_by_hand = "Address = 10.66.0.2/24\nMTU = 1200\nTable = off";
    host.must("reload", &file(routed_by_hand, &["10.66.0.0/24, fd66:1::/64"]));
    host.must("reload", &file("Address = 10.66.0.2/24, fd66::2/64\nMTU = 1280", &["fd66:1::/64"]));
    assert_eq!(host.routes("-6"), ["fd66::/64", "fd66:1::/64"]);
}

/// Of a repeated key the last line counts, or all of them do; and a list is split at blanks, too.
#[test]
fn repeated_keys_are_read_as_wg_quick_reads_them() {
    require!(Wgsep);
    let host = Host::new();
    let lines = "MTU = 1400\nAddress = 10.66.0.2/32 10.66.0.3/32\nmtu=1380 # bytes\r\n\
                 ADDRESS = 10.66.0.4/32\nSaveConfig = true\nSaveConfig = FALSE\nTable = off\nTable = off";
    let peer = ["10.67.0.0/24"];
    for action in ["up", "reload"] {
        host.must(action, &file(lines, &peer));
        assert!(host.link().contains("mtu 1380"), "{}", host.link());
        let addresses = host.netns.run("ip -o -4 address show");
        for address in ["10.66.0.2/32", "10.66.0.3/32", "10.66.0.4/32"] {
            assert!(addresses.contains(address), "{addresses}");
        }
        assert!(host.routes("-4").is_empty());
    }
    host.must("reload", &file("Table = 7\nTable = auto\nMTU = 1370\nMTU =", &peer));
    assert_eq!(host.routes("-4"), peer);
    assert!(host.link().contains("mtu 1380"), "{}", host.link());
    let said = host.refused("reload", &file("Table = auto\nTable = 7", &peer));
    assert!(said.contains("Table = 7, a routing table of its own"), "{said}");
    let said = host.refused("reload", &file("SaveConfig = false\nSaveConfig = True", &peer));
    assert!(said.contains("SaveConfig = true, which is wg-quick(8)'s"), "{said}");
}

/// The file, the step, the reason that the command gave, and the remedy.
#[test]
fn each_step_that_fails_says_so_in_one_line() {
    require!(Wgsep);
    let host = Host::new().with_lan(&["192.0.2.1/24"]);
    host.netns.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1");
    host.netns.run("sysctl -qw net.ipv6.conf.default.disable_ipv6=1");
    let peer = ["10.66.0.0/24"];
    let taken =
        "cannot add the route 192.0.2.0/24, of AllowedIPs: RTNETLINK answers: File exists; take";
    for (file, step, remedy) in [
        (file("MTU = auto", &peer), "cannot set MTU = auto: ", "; set MTU to a number"),
        (file("MTU = 1", &peer), "cannot set MTU = 1: ", "; set MTU to a number"),
        (
            file("Address = 10.0.0.256/24", &peer),
            "cannot set Address = 10.0.0.256/24: ",
            "; correct Address",
        ),
        (file("Address = fd66::2/64", &peer), "cannot set Address = fd66::2/64: ", "disable_ipv6"),
        (
            file("SaveConfig = maybe", &peer),
            "cannot run wg-quick strip on it: ",
            "; correct the file",
        ),
        (file("ListenPort = x", &peer), "(wg SET): ", "; correct that line"),
        (file("", &["10.66.0.0/33"]), "10.66.0.0/33", "; correct that line"),
        (file("", &["192.0.2.0/24"]), taken, "set Table = off"),
        (file("", &["fd66:1::/64"]), "cannot add the route fd66:1::/64", "set Table = off"),
        (
            file("", &["1.2.3.4/00"]),
            "has AllowedIPs = 1.2.3.4/00, a default route",
            "use wg-quick@",
        ),
    ] {
        for (action, set) in [("up", "setconf"), ("reload", "syncconf")] {
            let said = host.refused(action, &file);
            let named = format!("configure: /etc/wireguard/{}.conf", host.daemon.interface);
            assert!(said.starts_with(&named), "{said}");
            let step = step.replace("SET", set);
            assert!(
                said.contains(&step) && said.contains(remedy),
                "no {step:?}, {remedy:?}: {said}"
            );
        }
    }
    // A mistyped key is not for the log.
    let key = KeyPair::generate().private;
    for lines in [format!("PrivatKey = {key}"), format!("PrivateKey = {}", &key[1..])] {
        let said = host.refused("up", &file(&lines, &peer));
        assert!(said.contains("(a key)") && !said.contains(&key[1..40]), "{said}");
    }
}
