//! wgsep-quick(8) beside a daemon that runs, as in the unit: what it makes of a file, and what it says of one that
//! cannot be applied.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;

use wgsep_tests::daemon::{Daemon, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::output;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::skip::skip;
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{repository, require};

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
        output(&mut self.command(action, file))
    }

    fn command(&self, action: &str, file: &str) -> Command {
        // Each `up` is the first one of its file: what an earlier one recorded is not seen.
        let line = "mkdir -p /etc/wireguard /run/wgsep-quick && mount -t tmpfs none /etc/wireguard && umask 077 && \
                    mount -t tmpfs none /run/wgsep-quick && printf %s \"$1\" >/etc/wireguard/$3.conf && \
                    exec timeout 60 \"$4\" \"$2\" \"$3\" $5";
        let mut command = self.netns.command("unshare");
        let action = if action == "up" { "apply" } else { action };
        command.args(["--mount", "sh", "-c", line, "sh", file, action, &self.daemon.interface]);
        command.arg(script());
        if action == "serve" {
            command.arg("echo");
        }
        command
    }

    /// What `serve` adds to a command that prints it.
    #[track_caller]
    fn serve(&self, file: &str) -> String {
        wgsep_tests::process::run(&mut self.command("serve", file))
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
    repository().join("bin/dist/wgsep-quick")
}

/// A PATH that finds the programs of a directory first.
fn before_path(directory: &Scratch) -> String {
    format!("{}:{}", directory.display(), std::env::var("PATH").unwrap())
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

/// The kernel takes both routes: of equal addresses' prefixes the first counts, with IPv6 the lower metric.
#[test]
fn allowed_ips_whose_packets_leave_by_another_interface_are_refused() {
    require!(Wgsep);
    let text = |prefix: &str| {
        format!("packets to {prefix}, of AllowedIPs, would leave by lan0 instead of ")
    };
    for (lines, lan, prefix, address) in [
        ("Address = 192.168.9.2/24", "192.168.9.7/24", "192.168.9.0/24", "192.168.9.40"),
        ("Address = fd66::2/64", "fd66::7/64", "fd66::/64", "fd66::40"),
        ("Address = fd67::2/128", "fd66::7/64", "fd66::/64", "fd66::40"),
    ] {
        let file = file(lines, &[prefix]);
        let host = Host::new().with_lan(&[lan]);
        for action in ["up", "reload"] {
            let said = host.refused(action, &file);
            assert!(said.contains(&text(prefix)), "{action}: {said}");
            assert!(!host.is_routed(address), "{action}: the refusal is about something");
        }
        // Without the other route, or with one that counts less, nothing is wrong.
        host.netns.run(format!("ip address del {lan} dev lan0"));
        host.must("reload", &file);
        assert!(host.is_routed(address), "{lines}");
        host.netns.run(format!("ip route add {prefix} dev lan0 metric 4000"));
        host.must("reload", &file);
        assert!(host.is_routed(address), "{lines}");
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

/// Peers and keys are in force by then, and packets for a prefix without its route would leave by the default route.
#[test]
fn a_reload_that_cannot_set_all_sets_the_rest() {
    require!(Wgsep);
    let host = Host::new().with_lan(&["10.33.0.1/24", "192.0.2.1/24"]);
    host.netns.run("ip route add default via 192.0.2.9");
    let lines = "Address = 10.8.0.1/24";
    host.must("up", &file(lines, &["10.8.0.2/32, 10.71.0.0/16"]));
    let more = "10.8.0.2/32, 10.33.0.0/24, 10.71.0.0/16, 10.72.0.0/16";
    let said = host.refused("reload", &file(lines, &[more]));
    assert!(said.contains("10.33.0.0/24, of AllowedIPs"), "{said}");
    assert!(said.contains("all else of the file is in force"), "{said}");
    assert!(host.is_routed("10.71.0.1") && host.is_routed("10.72.0.1"));

    let host = Host::new().with_lan(&["192.0.2.1/24"]);
    host.netns.run("ip route add default via 192.0.2.9");
    host.must("up", &file(lines, &["10.71.0.0/16"]));
    host.netns.run(format!("sysctl -q net.ipv6.conf.{}.disable_ipv6=1", host.daemon.interface));
    let lines = "Address = 10.8.0.1/24, fd08::1/64";
    let said = host.refused("reload", &file(lines, &["10.71.0.0/16, 10.72.0.0/16"]));
    assert!(said.contains("Address = fd08::1/64"), "{said}");
    assert!(host.is_routed("10.72.0.1"));
}

/// As with wg-quick(8): with 1420 on a narrower link each full packet would leave in two fragments.
#[test]
fn without_an_mtu_the_interface_has_that_of_the_narrowest_path_to_an_endpoint() {
    require!(Wgsep);
    let host = Host::new().with_lan(&["192.0.2.1/24", "2001:db8::1/64"]);
    let netns = &host.netns;
    let up = |endpoints: &[&str]| {
        let mut file = file("Address = 10.66.0.2/24", &[]);
        for endpoint in endpoints {
            let key = KeyPair::generate().public;
            file += &format!("[Peer]\nPublicKey = {key}\nEndpoint = {endpoint}\n");
        }
        host.must("up", &file);
        let link = host.link();
        let (_, after) = link.split_once(" mtu ").unwrap();
        after.split(' ').next().unwrap().to_owned()
    };
    assert_eq!(up(&[]), "1420", "no path is known");
    netns.run("ip link set lan0 mtu 1460");
    for endpoint in ["192.0.2.2:51820", "[2001:db8::2]:51820"] {
        assert_eq!(up(&[endpoint]), "1380", "{endpoint}");
    }
    netns.run("ip route add default via 192.0.2.9 mtu 1400");
    assert_eq!(up(&[]), "1320", "the default route's");
    netns.run("ip route add 192.0.2.77 dev lan0 mtu 1370");
    assert_eq!(up(&["192.0.2.2:51820", "192.0.2.77:51820"]), "1290");
    netns.run("ip route add 192.0.2.78 dev lan0 mtu lock 1360");
    assert_eq!(up(&["192.0.2.78:51820"]), "1280", "its MTU is locked");
    netns.run("ip link add lan2 mtu 1440 type veth peer name lan3");
    netns.run("ip link set lan2 up");
    netns.run("ip link set lan3 up");
    assert_eq!(up(&["[fe80::2%lan2]:51820"]), "1360", "a link-local one");
}

/// As 0.0.0.0/1 and 128.0.0.0/1 do, which stand for a default route beside another one.
#[test]
fn an_endpoint_that_allowed_ips_lead_into_the_tunnel_is_named() {
    require!(Wgsep);
    let with = |endpoint: &str| {
        let peer = file("Address = 10.66.0.2/24", &["0.0.0.0/1, 128.0.0.0/1, ::/1, 8000::/1"]);
        format!("{peer}Endpoint = {endpoint}\n")
    };
    for (endpoint, address, route) in [
        ("192.0.2.2:51820", "192.0.2.2", "192.0.2.0/24"),
        ("[2001:db8::2]:51820", "2001:db8::2", "2001:db8::/64"),
    ] {
        let host = Host::new().with_lan(&["198.51.100.1/24", "fd10::1/64"]);
        let text = format!("the route to the endpoint {address} leads into");
        for action in ["up", "reload"] {
            let said = host.configure(action, &with(endpoint));
            assert!(said.status.success(), "{said:?}");
            let said = String::from_utf8_lossy(&said.stderr).into_owned();
            assert!(said.contains(&text) && said.lines().count() == 1, "{action}: {said}");
        }
        host.netns.run(format!("ip route add {route} dev lan0"));
        let said = host.configure("reload", &with(endpoint));
        assert!(said.status.success() && said.stderr.is_empty(), "{said:?}");
    }
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
    host.must("reload", &file("Table = auto\nTable = 7\nSaveConfig = True", &peer));
    assert!(host.netns.run("ip route show table 7").starts_with(peer[0]));
}

/// As a text editor or a web page leaves them, from which a file was copied.
#[test]
fn bytes_that_are_invisible_are_shown_where_a_line_is_refused() {
    require!(Wgsep);
    let host = Host::new();
    let mark = format!("\u{feff}{}", file("", &["10.67.0.0/24"]));
    for (file, shown) in [
        (
            mark.as_str(),
            "line 1 begins with a byte order mark; remove it: sed -i '1s/^\\xEF\\xBB\\xBF//' /etc",
        ),
        (
            &file("ListenPort\u{a0}= 5001", &[]),
            "line 3: wg setconf refuses it: Line unrecognized: `ListenPort\\xC2\\xA0=5001'",
        ),
        (&file("FwMark = 7\u{200b}", &[]), "line 3: FwMark = 7\\xE2\\x80\\x8B is not a mark"),
        (
            &file("Address = 10.66.0.2/32\u{1}", &[]),
            "line 3: Address = 10.66.0.2/32\\x01 is not an address",
        ),
        (&file("", &["10.67.0.0/24\u{a0}"]), "10.67.0.0/24\\xC2\\xA0"),
    ] {
        let said = host.refused("up", file);
        assert!(said.contains(shown), "{said}");
        assert!(said.trim_end().bytes().all(|byte| matches!(byte, b' '..=b'~')), "{said}");
    }
    // The command that is named mends it.
    let remedy = "sed -i '1s/^\\xEF\\xBB\\xBF//'";
    let scratch = Scratch::new();
    let path = scratch.join("marked");
    fs::write(&path, &mark).unwrap();
    wgsep_tests::process::run(
        Command::new("sh").args(["-c", &format!("{remedy} {}", path.display())]),
    );
    host.must("up", &fs::read_to_string(&path).unwrap());

    let line = "mkdir -p /etc/wireguard && mount -t tmpfs none /etc/wireguard && umask 077 && \
                printf '[Interface]\\n' | iconv -t UTF-16 >/etc/wireguard/x.conf && exec \"$0\" serve x true";
    let mut command = host.netns.command("unshare");
    let refused = output(command.args(["--mount", "sh", "-c", line]).arg(script()));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("x.conf is UTF-16 text; convert it: "), "{said}");
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
        (
            file("Address = 10.0.0.1/24, fd66::2/64", &peer),
            "cannot set Address = fd66::2/64: ",
            "disable_ipv6",
        ),
        (file("", &["10.66.1.0/24", "192.0.2.0/24", "10.66.2.0/24"]), taken, "set Table = off"),
        (file("", &["fd66:1::/64"]), "cannot add the route fd66:1::/64", "set Table = off"),
    ] {
        for action in ["up", "reload"] {
            let said = host.refused(action, &file);
            let named = format!("wgsep-quick: /etc/wireguard/{}.conf", host.daemon.interface);
            assert!(said.starts_with(&named), "{said}");
            assert!(
                said.contains(step) && said.contains(remedy),
                "no {step:?}, {remedy:?}: {said}"
            );
        }
    }
    // A mistyped key is not for the log.
    let key = KeyPair::generate().private;
    for lines in [format!("PrivatKey = {key}"), format!("PrivateKey = {}", &key[1..])] {
        let said = host.refused("up", &file(&lines, &peer));
        assert!(said.contains("line 3: ") && said.contains("(a key)"), "{said}");
        assert!(!said.contains(&key[1..40]), "{said}");
    }
}

/// The file has a comment and a private key before the line.
#[test]
fn a_wrong_value_of_any_key_is_named_with_its_line_and_what_to_write() {
    require!(Wgsep);
    let host = Host::new();
    let public = KeyPair::generate().public;
    let peer = format!("[Peer]\nPublicKey = {public}");
    for (lines, expected) in [
        ("MTU = auto", "line 4: MTU = auto is not a number of bytes from 68 to 65535; write one"),
        ("MTU = 1420\nMTU = 1", "line 5: MTU = 1 is not a number of bytes"),
        ("MTU = 01420", "line 4: MTU = 01420 is not a number of bytes"),
        ("MTU = 70000", "line 4: MTU = 70000 is not a number of bytes"),
        ("MTU = 1420 bytes", "line 4: MTU = 1420 bytes is not a number of bytes"),
        (
            "Address = 10.0.0.1/24, 10.0.0.256/24",
            "line 4: Address = 10.0.0.256/24 is not an address",
        ),
        ("Address = 10.0.0.1/33", "line 4: Address = 10.0.0.1/33 is not an address"),
        ("Address = 10.0.0.1/", "line 4: Address = 10.0.0.1/ is not an address"),
        ("Address = fd00::1::/64", "line 4: Address = fd00::1::/64 is not an address"),
        ("Address = fd00::1/129", "line 4: Address = fd00::1/129 is not an address"),
        ("Address = *", "line 4: Address = * is not an address"),
        ("Table = OFF", "line 4: Table = OFF is not a routing table; write off, in lower case"),
        ("SaveConfig = maybe", "line 4: SaveConfig = maybe is neither true nor false; remove"),
        ("ListenPort = x", "line 4: ListenPort = x is not a port; write a number from 1 to 65535"),
        ("ListenPort = 70000", "line 4: ListenPort = 70000 is not a port"),
        (
            "FwMark = 0x1ffffffff",
            "line 4: FwMark = 0x1ffffffff is not a mark; write off, or a number",
        ),
        ("FwMark = blue", "line 4: FwMark = blue is not a mark"),
        ("Mtux = 1420", "line 4: wg SET refuses it: Line unrecognized: `Mtux=1420'; correct"),
        ("MTU", "line 4: wg SET refuses it: Line unrecognized: `MTU'; correct that line"),
        ("ListenPort =", "line 4: wg SET refuses it: Line unrecognized: `ListenPort='; correct"),
        ("[Pear]", "line 4: wg SET refuses it: Line unrecognized: `[Pear]'; correct"),
        ("PEER\nMTU = 1420", "line 6: wg SET refuses it: Line unrecognized: `MTU=1420'"),
        ("PEER\nAllowedIPs = 10.0.0.0/8, 10.66.0.0/33", "line 6: wg SET refuses it: AllowedIP"),
        ("PEER\nAllowedIPs = 10.66.0.256", "line 6: wg SET refuses it: Unable to parse IP"),
        ("PEER\nAllowedIPs = fd66::x/64", "line 6: wg SET refuses it: Unable to parse IP"),
        ("PEER\nEndpoint = 192.0.2.1", "line 6: Endpoint = 192.0.2.1 does not end in a port"),
        (
            "PEER\nEndpoint = 192.0.2.1:70000",
            "line 6: Endpoint = 192.0.2.1:70000 does not end in a port",
        ),
        ("PEER\nEndpoint = 192.0.2.1:00", "line 6: Endpoint = 192.0.2.1:00 does not end in a port"),
        (
            "PEER\nEndpoint = 192.0.2.1:udp?",
            "line 6: Endpoint = 192.0.2.1:udp? does not end in a port",
        ),
        ("PEER\nEndpoint = vpn.invalid", "line 6: Endpoint = vpn.invalid does not end in a port"),
        ("PEER\nEndpoint = [fd00::1]", "line 6: Endpoint = [fd00::1] does not end in a port"),
        ("PEER\nEndpoint = [fd00::1", "line 6: wg SET refuses it: Unable to find matching brace"),
        ("PEER\nEndpoint = 192.0.2.300:1", "line 6: Endpoint = 192.0.2.300:1 is not an address"),
        ("PEER\nPersistentKeepalive = x", "line 6: wg SET refuses it: Persistent keepalive"),
        ("PEER\nPresharedKey = abc", "line 6: wg SET refuses it: Key is not the correct length"),
        (
            "PEER\n[Peer]\nAllowedIPs = 10.0.0.0/8\nPEER",
            "line 6: wg SET refuses it: A peer is missing a public key",
        ),
    ] {
        let key = KeyPair::generate().private;
        let lines = lines.replace("PEER", &peer);
        let file = format!("# A test\n[Interface]\nPrivateKey = {key}\n{lines}\n");
        for (action, set) in [("up", "setconf"), ("reload", "syncconf")] {
            let said = host.refused(action, &file);
            let expected = expected.replace("SET", set);
            let expected =
                format!("wgsep-quick: /etc/wireguard/{}.conf: {expected}", host.daemon.interface);
            assert!(said.starts_with(&expected), "no {expected:?}: {said}");
        }
    }
    // What wg(8) and ip(8) take stays: short addresses, masks, marks in any form.
    for lines in [
        "Address = 10.77/16, 10.78.0.1/255.255.255.0\nMTU = 1400\nFwMark = 0xFFFFFFFF",
        "Address = 10.79.0.1, fd79::10.0.0.1, FD7A::1/64, ::ffff:10.0.0.1/128\nFwMark = 4294967295",
        "PEER\nEndpoint = 192.0.2.1:domain\nAllowedIPs = ::/1",
        "PEER\nEndpoint = 192.0.2.1:00051820",
    ] {
        let key = KeyPair::generate().private;
        let lines = lines.replace("PEER", &peer);
        host.must("up", &format!("[Interface]\nPrivateKey = {key}\n{lines}\n"));
    }
}

/// It may be set later, by a line that is added to the unit; wg-quick(8) and wg(8) take such a file.
#[test]
fn a_file_without_a_private_key_is_warned_of_in_one_line() {
    require!(Wgsep);
    let host = Host::new();
    let key = KeyPair::generate().private;
    let peer = format!("[Peer]\nPublicKey = {}\n", KeyPair::generate().public);
    for (action, line, is_warned_of) in [
        ("up", "", true),
        ("reload", "", true),
        ("up", &*format!("PrivateKey = {key}"), false),
        // The key stays.
        ("reload", "", false),
        ("reload", "private key=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", true),
    ] {
        let done = host.configure(action, &format!("[Interface]\n{line}\n{peer}"));
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{said}");
        let interface = &host.daemon.interface;
        let expected = format!(
            "wgsep-quick: /etc/wireguard/{interface}.conf: there is no PrivateKey, so no handshake begins; \
             add it to [Interface], or set one: wg set {interface} private-key FILE\n"
        );
        assert_eq!(said, if is_warned_of { expected } else { String::new() }, "{action} {line}");
    }
}

/// A process for each route would take longer than systemd waits for the start.
#[test]
fn a_thousand_peers_take_as_many_processes_as_three() {
    require!(Wgsep);
    let counted = |peers: u32| {
        let (host, scratch) = (Host::new(), Scratch::new());
        for program in ["ip", "wg", "sed", "awk", "tr", "cut", "timeout", "getent"] {
            let counting = "#!/bin/sh\necho >>${0%/*}/count\nprogram=$(PATH=${PATH#*:}; command -v ${0##*/})\nexec $program \"$@\"\n";
            scratch.write_script(program, counting);
        }
        // Some within the route of the Address, some not, of both families.
        let prefixes = (0..peers).map(|number| {
            let (high, low) = (number / 256, number % 256);
            format!("10.66.{high}.{low}/32, 10.67.{high}.{low}/32, fd66:{number:x}::/64")
        });
        let prefixes: Vec<_> = prefixes.collect();
        let prefixes: Vec<_> = prefixes.iter().map(String::as_str).collect();
        let file = file("Address = 10.66.0.1/16, fd66::1/128", &prefixes);
        for action in ["up", "reload"] {
            let done = output(host.command(action, &file).env("PATH", before_path(&scratch)));
            assert!(done.status.success(), "{action}: {}", String::from_utf8_lossy(&done.stderr));
            let peers = usize::try_from(peers).unwrap();
            assert_eq!(host.routes("-4").len(), 1 + peers, "{action}");
            assert_eq!(host.routes("-6").len(), 1 + peers, "{action}");
        }
        fs::read_to_string(scratch.join("count")).unwrap().lines().count()
    };
    assert_eq!(counted(1000), counted(3));
}

/// As in the unit, whose root has no CAP_DAC_OVERRIDE.
#[test]
fn a_file_that_cannot_be_read_is_named_with_its_owner_and_the_command_that_mends_it() {
    require!(Wgsep);
    let host = Host::new();
    let configure = |spoil: &str, then: &str| {
        let line =
            "mkdir -p /etc/wireguard /run/wgsep-quick && mount -t tmpfs none /run/wgsep-quick
            mount -t tmpfs -o mode=0700 none /etc/wireguard
            chmod 755 /etc/wireguard && umask 077 && printf %s \"$1\" >/etc/wireguard/$2.conf
            configure() { setpriv --bounding-set -dac_override,-dac_read_search \"$@\"; }
            file=/etc/wireguard/$2.conf; eval \"$4\"
            configure $3 apply $2 && exit 9
            eval \"$5\" && configure $3 apply $2";
        let mut command = host.netns.command("unshare");
        let file = file("", &["10.66.0.0/24"]);
        let interface = &host.daemon.interface;
        command.args(["--mount", "bash", "-c", line, "bash", &file, interface]);
        let done = output(command.arg(script()).args([spoil, then]));
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{spoil}: {said}");
        assert_eq!(said.lines().count(), 1, "{spoil}: {said}");
        said
    };
    for (spoil, expected, remedy) in [
        (
            "chown 33 $file",
            "FILE: it belongs to www-data, mode 600",
            "chown root: FILE && chmod 600 FILE",
        ),
        (
            "chown 4242 $file",
            "FILE: it belongs to UNKNOWN, mode 600",
            "chown root: FILE && chmod 600 FILE",
        ),
        ("chmod 0 $file", "FILE: it belongs to root, mode 0", "chown root: FILE && chmod 600 FILE"),
        (
            "chown 33 ${file%/*} && chmod 700 ${file%/*}",
            "FILE: the directory /etc/wireguard belongs to www-data, mode 700",
            "chown root: /etc/wireguard && chmod u=rwx /etc/wireguard",
        ),
        (
            "mv $file $file.old && ln -s /home/nowhere/wg.conf $file",
            "FILE: it is a symbolic link to /home/nowhere/wg.conf",
            "mv FILE.old FILE",
        ),
    ] {
        let name = format!("/etc/wireguard/{}.conf", host.daemon.interface);
        let [expected, remedy] = [expected, remedy].map(|text| text.replace("FILE", &name));
        let said = configure(spoil, &remedy);
        assert!(said.starts_with(&format!("wgsep-quick: cannot read {expected}")), "{said}");
        assert!(remedy.starts_with("mv ") || said.trim_end().ends_with(&remedy), "{said}");
    }
    let said = configure("mv $file $file.old", "mv $file.old $file");
    assert!(said.contains("there is no /etc/wireguard/"), "{said}");
    // A drop-in with User= or DynamicUser=, which no chown(1) mends.
    let as_user =
        "configure() { setpriv --reuid 33 --clear-groups bash /dev/fd/9 serve $3 true 9<$1; }";
    let said = configure(as_user, "configure() { \"$@\"; }");
    assert!(said.contains("the unit runs as user www-data; take out User="), "{said}");
    assert!(!said.contains("chown"), "{said}");
    host.must("up", &file("", &[]));
}

/// Where I is not the capital letter of i: keys are compared without regard to case, but as ASCII.
#[test]
fn the_locale_does_not_change_how_a_file_is_read() {
    require!(Wgsep);
    let locales = Scratch::new();
    let mut localedef = Command::new("localedef");
    localedef.args(["-i", "tr_TR", "-f", "UTF-8"]).arg(locales.join("tr_TR.UTF-8"));
    if !localedef.output().is_ok_and(|done| done.status.success()) {
        return skip("localedef or its tr_TR is missing: run `make deps`");
    }
    let host = Host::new();
    for (file, expected) in [
        (
            file("MTU = 1200\nAddress = 10.66.0.2/24", &["fd66::/64"]),
            "cannot configure fd66::/64 with MTU = 1200: an MTU below 1280 takes no IPv6",
        ),
        (file("LISTENPORT = 70000", &[]), "line 3: ListenPort = 70000 is not a port"),
        (file("SAVECONFIG = I", &[]), "line 3: SaveConfig = I is neither true nor false"),
        (file("POSTUP = exit 1", &[]), "line 3: POSTUP = exit 1: the hook ended with status 1"),
    ] {
        let mut command = host.command("up", &file);
        command.env("LOCPATH", &*locales).env("LC_ALL", "tr_TR.UTF-8");
        let refused = output(&mut command);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{file}: {said}");
        assert!(said.contains(expected), "no {expected:?}: {said}");
    }
    assert!(host.routes("-4").is_empty());
    let mut serve = host.command("serve", &file("", &["0.0.0.0/0"]));
    let served = output(serve.env("LOCPATH", &*locales).env("LC_ALL", "tr_TR.UTF-8"));
    assert!(served.stdout.starts_with(b"--fwmark 0xca00/0xffffff00 "), "{served:?}");
}

/// wg(8) removes the blanks of a line, also those within a key or a value.
#[test]
fn blanks_within_a_line_count_for_the_keys_of_wg_as_little_as_for_wg() {
    require!(Wgsep);
    for (allowed, address) in [
        ("AllowedIPs = 0.0.0.0/ 0", "203.0.113.1"),
        ("AllowedIPs = 10.0.0.0/8, ::\t/\t0", "2001:db8::1"),
        ("Allowed IPs = 0.0.0.0/0", "203.0.113.1"),
        ("A llowed\tIP s = 0 . 0 . 0 . 0 / 0 0", "203.0.113.1"),
        ("AllowedIPs = 1.2.3.4/00", "203.0.113.1"),
    ] {
        let host = Host::new();
        let key = KeyPair::generate().public;
        let peer = format!("[Peer]\nPublicKey = {key}\n{allowed}");
        let file = file("Address = 10.66.0.2/32, fd66::2/128", &[]) + &peer;
        assert!(host.serve(&file).starts_with("--fwmark 0xca00/0xffffff00 "), "{allowed}");
        for action in ["up", "reload"] {
            host.must(action, &file);
            assert!(host.is_routed(address), "{allowed}");
            let mark = host.netns.run(format!("wg show {} fwmark", host.daemon.interface));
            assert_eq!(mark.trim(), "0xca6c", "{action}: {allowed}");
        }
    }
    let host = Host::new();
    let said = host.refused("up", &file("Listen Port = 7 0000", &[]));
    assert!(said.contains("line 3: ListenPort = 70000 is not a port"), "{said}");
    // What is wg-quick(8)'s alone has no blank within the key.
    for line in ["Ta ble = off", "Post Up = true"] {
        let said = host.refused("up", &file(line, &[]));
        assert!(said.contains("line 3: wg setconf refuses it: Line unrecognized"), "{said}");
    }

    for (lines, granted) in [
        ("Listen Port = 5001", "--listen-port 5001 --fwmark 0"),
        ("ListenPort = 50 01\nFw Mark = 7", "--listen-port 5001 --fwmark 7"),
        ("FwMark = 0x 7", "--fwmark 0x7"),
        ("Listen\tPort\t=\t5001", "--listen-port 5001 --fwmark 0"),
    ] {
        let served = host.serve(&file(lines, &[]));
        assert_eq!(served.trim_end(), format!("{granted} {}", host.daemon.interface), "{lines}");
    }
}

/// Whatever the file was taken for: with what wg(8) reports, before a route is set.
#[test]
fn a_default_route_that_only_wg_sees_in_the_file_is_not_set() {
    require!(Wgsep);
    let (host, stubs) = (Host::new(), Scratch::new());
    for prefix in ["0.0.0.0/0", "::/0"] {
        let wg = format!(
            "#!/bin/sh\ncase \"$*\" in\n*allowed-ips) printf 'key\\t10.67.0.0/24 {prefix}\\n' ;;\n\
             *) PATH=${{PATH#*:}}; exec wg \"$@\" ;;\nesac\n"
        );
        stubs.write_script("wg", &wg);
        let mut command = host.command("up", &file("", &["10.67.0.0/24"]));
        let refused = output(command.env("PATH", before_path(&stubs)));
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{said}");
        let expected = format!("AllowedIPs = {prefix}, a default route, is not what the file says");
        assert!(said.contains(&expected), "{said}");
        assert!(host.routes("-4").is_empty() && host.routes("-6").is_empty());
    }
}

/// It is in another namespace after `ip link set wg0 netns NAME`; and then another one may have its name.
#[test]
fn an_interface_that_was_moved_away_is_noticed_before_anything_is_set() {
    require!(Wgsep);
    let (mut host, elsewhere) = (Host::new(), Netns::new());
    let here = Arc::clone(&host.netns);
    host.must("up", &file("Address = 10.66.0.2/24", &["10.66.0.0/24"]));
    let interface = host.daemon.interface.clone();
    let peers = || here.run(format!("wg show {interface} allowed-ips"));
    let before = peers();
    host.daemon.move_interface(&elsewhere);
    let changed = file("Address = 10.77.0.2/24", &["10.77.0.0/24"]);
    for action in ["reload", "up"] {
        let said = host.refused(action, &changed);
        assert!(said.contains("is not in this network namespace"), "{said}");
        assert_eq!(peers(), before);
    }
    here.run(format!("ip link add {interface} type veth peer name lan1"));
    let said = host.refused("reload", &changed);
    assert!(said.contains("is not in this network namespace"), "{said}");
    assert_eq!(peers(), before);
    assert!(!here.run(format!("ip address show {interface}")).contains("10.77.0.2"));

    // The line's way of keys and peers alone.
    let alone = "mkdir -p /etc/wireguard && mount -t tmpfs none /etc/wireguard && umask 077 && \
                 printf %s \"$0\" >/etc/wireguard/$1.conf && wg syncconf $1 <(wg-quick strip $1)";
    let mut command = here.command("unshare");
    command.args(["--mount", "bash", "-c", alone, &changed, &interface]);
    wgsep_tests::process::run(&mut command);
    assert!(peers().contains("10.77.0.0/24"), "{}", peers());
}

/// From wherever it is typed, if the namespace has a name, or else in a shell of it.
#[test]
fn the_way_back_of_a_moved_interface_that_is_named_leads_back() {
    require!(Wgsep);
    let (host, elsewhere) = (Host::new(), Netns::new());
    let interface = &host.daemon.interface;
    let file = file("Address = 10.66.0.2/24", &["10.66.0.0/24"]);
    host.must("up", &file);
    for (before, expected) in
        [("true", host.netns.name()), ("mount -t tmpfs none /run/netns", "$$")]
    {
        host.netns.run(format!("ip link set {interface} netns {}", elsewhere.name()));
        let mut command = host.netns.command("unshare");
        let line = format!("{before} && exec unshare \"$@\"");
        command.args(["--mount", "sh", "-c", &line, "sh"]);
        let refused = output(command.args(host.command("reload", &file).get_args()));
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{said}");
        let (_, way) = said.split_once("move it back: ").unwrap();
        let (way, _) = way.split_once("; or set addresses").unwrap();
        assert!(way.ends_with(&format!(" netns {expected}")), "{said}");
        let mut shell =
            if expected == "$$" { host.netns.command("sh") } else { Command::new("sh") };
        let way = way.replace("NAME", elsewhere.name());
        wgsep_tests::process::run(shell.args(["-c", &way]));
        host.must("reload", &file);
        assert!(host.is_routed("10.66.0.7"));
    }
}

/// The MTU of the file is refused with IPv6 where it is too low; so are the one of the path, which the start takes
/// without one, and the one that the interface has, which a reload leaves.
#[test]
fn an_mtu_that_the_path_gives_is_refused_where_it_takes_no_ipv6() {
    require!(Wgsep);
    let host = Host::new().with_lan(&["192.0.2.1/24"]);
    host.netns.run("ip link set lan0 mtu 1350");
    let with = |lines: &str, allowed_ips: &str| {
        format!("{}Endpoint = 192.0.2.2:51820\n", file(lines, &[allowed_ips]))
    };
    for (lines, allowed_ips, named) in [
        ("Address = 10.66.0.2/24, fd66::2/64", "10.66.0.0/24", "fd66::2/64"),
        ("Address = 10.66.0.2/24", "10.66.0.0/24, fd67::/64", "fd67::/64"),
    ] {
        let said = host.refused("up", &with(lines, allowed_ips));
        let path = format!("cannot configure {named} with MTU 1270, which is derived from");
        assert!(said.contains(&path) && said.contains("write MTU = 1280 into the file"), "{said}");
        assert!(said.contains("or take out what is IPv6"), "{said}");
        assert!(!host.netns.run("ip address show").contains("10.66.0.2"));
    }
    host.must("up", &with("Address = 10.66.0.2/24", "10.66.0.0/24"));
    assert!(host.link().contains("mtu 1270"), "{}", host.link());
    let said = host.refused("reload", &with("Address = 10.66.9.2/24, fd66::2/64", "10.69.0.0/24"));
    let interface = &host.daemon.interface;
    assert!(said.contains(&format!("fd66::2/64 with MTU 1270, which {interface} has: ")), "{said}");
    assert!(said.contains("write MTU = 1280 or more into the file"), "{said}");
    let peers = host.netns.run(format!("wg show {interface} allowed-ips"));
    assert!(!peers.contains("10.69.0.0/24"), "{peers}");
    // The remedy.
    let raised = with("Address = 10.66.0.2/24, fd66::2/64\nMTU = 1280", "fd67::/64");
    host.must("reload", &raised);
    assert_eq!(host.routes("-6"), ["fd66::/64", "fd67::/64"]);
}

/// As an instance of the unit may have it; printf(1), sed(1), awk(1) and ip(8) would read more into some of them.
#[test]
fn a_name_is_refused_that_another_program_would_change() {
    require!(Wgsep);
    let netns = Netns::new();
    let configure = |name: &str, action: &str| {
        let line = "mkdir -p /etc/wireguard && mount -t tmpfs none /etc/wireguard && umask 077 && \
                    printf '[Interface]\\nAddress = 10.66.0.2/24\\n' >\"/etc/wireguard/$1.conf\" && \
                    shift && exec \"$@\"";
        let mut command = netns.command("unshare");
        command.args(["--mount", "sh", "-c", line, "sh", name]).arg(script()).args([action, name]);
        if action == "serve" {
            command.arg("echo");
        }
        output(&mut command)
    };
    for name in [
        "wg\\x2dlan",
        "wg\\x231",
        "wg#1",
        "wg%d",
        "wg*",
        "wg 1",
        "wg\u{e9}",
        "-wg",
        "interfaces",
        "wg45678901234567",
    ] {
        for action in ["serve", "apply", "reload"] {
            let refused = configure(name, action);
            let said = String::from_utf8_lossy(&refused.stderr);
            assert_eq!(refused.status.code(), Some(1), "{name}: {said}");
            assert!(said.starts_with("wgsep-quick: cannot use the interface name "), "{said}");
            assert!(said.contains("wgsep@wg-lan") && said.lines().count() == 1, "{said}");
        }
    }
    for name in ["wg0", "wg-lan", "wg_1=a+b.c", ".wg", "wg4567890123456"] {
        let served = configure(name, "serve");
        let said = String::from_utf8_lossy(&served.stdout);
        assert_eq!(said.trim_end(), format!("--fwmark 0 {name}"), "{served:?}");
    }
}

/// A dot of a name stands for itself.
#[test]
fn an_endpoint_is_looked_for_in_the_tunnel_of_that_very_name() {
    require!(Wgsep);
    let netns = Netns::new();
    let name = format!("{}.", unique_interface());
    let daemon = Daemon::start_on(&name, Wgsep, &netns, |_command| {});
    let host = Host { netns, daemon };
    let other = format!("{}x", name.trim_end_matches('.'));
    host.netns.run(format!("ip link add {other} type veth peer name lan1"));
    host.netns.run(format!("ip link set {other} up"));
    host.netns.run("ip link set lan1 up");
    host.netns.run(format!("ip address add 192.0.2.1/24 dev {other}"));
    let peer = file("Address = 10.66.0.2/24", &["10.66.0.0/24"]);
    let done = host.configure("up", &format!("{peer}Endpoint = 192.0.2.2:51820\n"));
    assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
    assert!(host.netns.run(format!("ip address show dev {name}")).contains("10.66.0.2/24"));
}

/// awk(1) would interpret them.
#[test]
fn a_line_with_backslashes_is_found() {
    require!(Wgsep);
    let host = Host::new();
    for (line, expected) in [
        ("MTU = 14\\t20", "line 3: MTU = 14\\t20 is not a number of bytes"),
        ("Foo = a\\tb", "line 3: wg setconf refuses it: Line unrecognized: `Foo=a\\tb'"),
    ] {
        let said = host.refused("up", &file(line, &[]));
        assert!(said.contains(expected), "no {expected:?}: {said}");
    }
}

/// As with ipv6.disable=1, where ip(8) fails when it is asked for an IPv6 route.
#[test]
fn a_kernel_without_ipv6_starts_what_has_none_and_says_what_it_refuses() {
    require!(Wgsep);
    let (host, stubs) = (Host::new(), Scratch::new());
    let ip = "#!/bin/sh\ncase \" $* \" in\n\
              *\" -6 \"*) echo 'RTNETLINK answers: Operation not supported' >&2; exit 2 ;;\nesac\n\
              PATH=${PATH#*:}; exec ip \"$@\"\n";
    stubs.write_script("ip", ip);
    let configure = |action: &str, file: &str| {
        output(host.command(action, file).env("PATH", before_path(&stubs)))
    };
    for action in ["up", "reload"] {
        let done = configure(action, &file("Address = 10.66.0.2/24", &["10.67.0.0/24"]));
        assert!(done.status.success() && done.stderr.is_empty(), "{action}: {done:?}");
        let refused = configure(action, &file("Address = 10.66.0.2/24", &["fd67::/64"]));
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{action}: {said}");
        assert!(said.contains("cannot add the route"), "{action}: {said}");
        assert!(said.contains("not supported; take it out") && said.lines().count() == 1, "{said}");
    }
}

/// As where a program is killed, or the limit on processes is reached.
#[test]
fn no_program_that_fails_silently_ends_the_script_without_a_line() {
    require!(Wgsep);
    let host = Host::new();
    let file = file("Address = 10.66.0.2/24", &["10.67.0.0/24"]);
    for (program, failing) in [
        ("tail", "*"),
        ("tr", "*"),
        ("sed", "*/default*"),
        ("awk", "*device=*"),
        ("ip", "*link?show"),
    ] {
        let stubs = Scratch::new();
        let text = format!(
            "#!/bin/sh\ncase \"$*\" in {failing}) exit 3 ;; esac\n\
             PATH=${{PATH#*:}}; exec {program} \"$@\"\n"
        );
        stubs.write_script(program, &text);
        let done = output(host.command("up", &file).env("PATH", before_path(&stubs)));
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(3), "{program}: {said}");
        assert!(said.starts_with("wgsep-quick: cannot finish: line "), "{program}: {said}");
        assert!(said.contains("ended with status 3; ") && said.contains("bash -x /"), "{said}");
        assert_eq!(said.lines().count(), 1, "{program}: {said}");
    }
}

/// The first of them is named, and the others do not matter.
#[test]
fn a_thousand_endpoints_in_the_tunnel_are_one_line() {
    require!(Wgsep);
    let host = Host::new();
    let mut file = file("Address = 10.66.0.2/24", &["0.0.0.0/1, 128.0.0.0/1"]);
    for number in 0..1400 {
        // Digits are a key, too.
        let (high, low) = (number / 250, number % 250 + 1);
        file += &format!("[Peer]\nPublicKey={number:042}A=\n");
        file += &format!("Endpoint=198.18.{high}.{low}:1\n");
    }
    let done = host.configure("up", &file);
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    assert!(said.contains("leads into") && said.lines().count() == 1, "{said}");
}
