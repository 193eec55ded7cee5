//! The kernel neither configures the interface by itself nor talks through it: no generated address, no
//! router solicitation, nothing taken from a router advertisement, no ICMP redirect. All of it is so where
//! the interface was made and after what makes Linux forget the settings.
#![allow(clippy::unwrap_used)]

use std::io::ErrorKind;
use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, bind, sendto,
    setsockopt, socket, sockopt,
};
use wgsep_tests::daemon::{Daemon, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::Process;
use wgsep_tests::traffic::{ping, until_ping};
use wgsep_tests::tunnel::{End, PORT};
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{require, uapi, wait};

const LIMIT: Duration = Duration::from_secs(10);
/// The kernel's first solicitation comes within a second of link-up, and the next after four more.
const QUIET: Duration = Duration::from_secs(3);
/// The router's address, at the peer.
const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

/// What Linux shows of the interface: its line of flags, and its details.
fn shown(daemon: &Daemon) -> String {
    daemon.netns.run(format!("ip -d link show {}", daemon.interface))
}

fn ipv6_addresses(daemon: &Daemon) -> String {
    daemon.netns.run(format!("ip -6 -o addr show dev {}", daemon.interface))
}

/// A client all of whose traffic goes to one peer, which sends it router advertisements.
struct Client {
    /// Where the daemon's sockets are.
    _sockets: Arc<Netns>,
    daemon: Daemon,
    router: End,
}

impl Client {
    /// Configured, with the interface down.
    fn new(start: impl FnOnce(&Arc<Netns>) -> Daemon) -> Self {
        let (left, right) = link::joined();
        let daemon = start(&left);
        let router = End::new(Side::Right, Daemon::start(Wgsep, &right));
        let key = KeyPair::generate();
        daemon.wg_conf(
            "setconf",
            &format!(
                "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\n\
                 [Peer]\nPublicKey = {}\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = {}\n",
                key.private,
                router.key.public,
                router.endpoint(Family::V4),
            ),
        );
        let allowed = "AllowedIPs = 192.168.77.1/32, fd77::1/128, fe80::/10, ff02::/16";
        let text = format!(
            "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\n[Peer]\nPublicKey = {}\n{allowed}\n",
            router.key.private, key.public,
        );
        router.daemon.wg_conf("setconf", &text);
        Self { _sockets: left, daemon, router }
    }

    /// Takes the interface up where it is; not one datagram reaches the peer's machine.
    #[track_caller]
    fn is_quiet(&self) {
        let Daemon { netns, interface, .. } = &self.daemon;
        let sent = self.daemon.peer().sent;
        let router = &self.router.daemon;
        router.netns.run(format!("ip link set {} down", router.interface));
        let bind = || UdpSocket::bind(self.router.endpoint(Family::V4)).ok();
        let peer = router.netns.inside(|| wait::poll(LIMIT, bind)).unwrap();
        peer.set_read_timeout(Some(QUIET)).unwrap();
        netns.run(format!("ip link set {interface} up"));
        let received = peer.recv_from(&mut [0; 2048]);
        assert_eq!(received.unwrap_err().kind(), ErrorKind::WouldBlock, "the interface is quiet");
        assert_eq!(self.daemon.peer().sent, sent);
        let addresses = ipv6_addresses(&self.daemon);
        assert!(addresses.is_empty(), "generated: {addresses}");
    }

    /// The peer's advertisements reach the daemon and no further. Takes the interface up.
    #[track_caller]
    fn takes_no_advertisement(&self) {
        let Daemon { netns, interface, .. } = &self.daemon;
        netns.run(format!("ip addr replace fd77::1/64 dev {interface} nodad"));
        netns.run(format!("ip link set {interface} up"));
        let peer = &self.router.daemon;
        peer.netns.run(format!("ip addr replace fd77::2/64 dev {} nodad", peer.interface));
        peer.netns.run(format!("ip addr replace {ROUTER}/64 dev {} nodad", peer.interface));
        peer.netns.run(format!("ip link set {} up", peer.interface));
        until_ping(netns, self.router.side.inner(Family::V6));
        let before = self.daemon.drops("router_advertisement");
        for destination in ["fd77::1", "ff02::1"] {
            advertise(peer, destination.parse().unwrap());
        }
        wait::until("both advertisements were dropped", LIMIT, || {
            self.daemon.drops("router_advertisement") >= before + 2
        });
        // What the daemon let through before is through by now.
        until_ping(netns, self.router.side.inner(Family::V6));
        let addresses = ipv6_addresses(&self.daemon);
        assert!(!addresses.contains("2001:db8:bad") && !addresses.contains("fe80"), "{addresses}");
        let routes = netns.run(format!("ip -6 route show dev {interface}"));
        assert!(!routes.contains("default") && !routes.contains("2001:db8:bad"), "{routes}");
    }
}

/// Sends a router advertisement through a daemon's interface: a default route, and a prefix to take an
/// address of.
fn advertise(daemon: &Daemon, destination: Ipv6Addr) {
    let mut advertisement = vec![134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    advertisement.extend([3, 4, 64, 0xc0]);
    advertisement.extend(86_400_u32.to_be_bytes().repeat(2));
    advertisement.extend([0; 4]);
    advertisement.extend("2001:db8:bad::".parse::<Ipv6Addr>().unwrap().octets());
    daemon.netns.inside(|| {
        let flags = SockFlag::SOCK_CLOEXEC;
        let protocol = SockProtocol::IcmpV6;
        let router = socket(AddressFamily::Inet6, SockType::Raw, flags, protocol).unwrap();
        setsockopt(&router, sockopt::Ipv6Ttl, &255).unwrap();
        setsockopt(&router, sockopt::Ipv6MulticastHops, &255).unwrap();
        let index = if_nametoindex(&*daemon.interface).unwrap();
        let address = |address| SockaddrIn6::from(SocketAddrV6::new(address, 0, 0, index));
        bind(router.as_raw_fd(), &address(ROUTER)).unwrap();
        let to = address(destination);
        sendto(router.as_raw_fd(), &advertisement, &to, MsgFlags::empty()).unwrap();
    });
}

#[test]
fn the_interface_looks_as_the_kernels_wireguard_does() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    daemon.netns.run(format!("ip link set {} up", daemon.interface));
    let shown = shown(&daemon);
    assert!(shown.contains("<POINTOPOINT,NOARP,UP,LOWER_UP>"), "{shown}");
    assert!(shown.contains("addrgenmode none"), "{shown}");
    let setting = |name: &str| daemon.netns.run(format!("sysctl -n net.{name}")).trim().to_owned();
    for name in ["ipv6.conf.IF.accept_ra", "ipv6.conf.IF.autoconf", "ipv4.conf.IF.send_redirects"] {
        assert_eq!(setting(&name.replace("IF", &daemon.interface)), "0", "{name}");
    }
    assert_eq!(setting("ipv4.conf.all.send_redirects"), "0");
}

#[test]
fn after_link_up_without_traffic_not_one_datagram_leaves() {
    require!(Wgsep);
    let client = Client::new(|netns| Daemon::start(Wgsep, netns));
    client.is_quiet();
    client.takes_no_advertisement();
    let configuration = client.daemon.wg("showconf", "");
    assert!(!configuration.contains("fe80"), "{configuration}");
}

#[test]
fn an_interface_made_in_another_namespace_is_quiet_there() {
    require!(Wgsep);
    let tun = Netns::new();
    let mut client = Client::new(|netns| {
        Daemon::start_with(Wgsep, netns, |command| {
            command.args(["--tun-netns", tun.name()]);
        })
    });
    client.daemon.netns = Arc::clone(&tun);
    client.is_quiet();
    let shown = shown(&client.daemon);
    assert!(
        shown.contains("<POINTOPOINT,NOARP,UP") && shown.contains("addrgenmode none"),
        "{shown}"
    );
    client.takes_no_advertisement();
}

/// Linux makes the interface's IPv6 settings anew there, from those of the namespace, and back at home.
#[test]
fn a_moved_interface_is_quiet_wherever_it_is() {
    require!(Wgsep);
    let (home, elsewhere) = (Netns::new(), Netns::new());
    let mut client = Client::new(|netns| {
        Daemon::start_with(Wgsep, &home, |command| {
            command.args(["--socket-netns", netns.name()]);
        })
    });
    client.daemon.netns = Arc::clone(&home);
    for next in [&elsewhere, &home] {
        client.daemon.move_interface(next);
        let accept_ra = format!("sysctl -n net.ipv6.conf.{}.accept_ra", client.daemon.interface);
        assert_eq!(next.run(accept_ra).trim(), "1", "the namespace's own setting");
        client.is_quiet();
        let shown = shown(&client.daemon);
        assert!(shown.contains("<POINTOPOINT,NOARP,UP"), "{shown}");
        client.takes_no_advertisement();
        next.run(format!("ip link set {} down", client.daemon.interface));
    }
}

/// Below 1280 there is no IPv6 on an interface, and above it Linux makes its settings anew.
#[test]
fn a_low_mtu_and_a_higher_one_bring_no_address_and_no_solicitation() {
    require!(Wgsep);
    let client = Client::new(|netns| Daemon::start(Wgsep, netns));
    let Daemon { netns, interface, .. } = &client.daemon;
    for mtu in [1200, 1420] {
        netns.run(format!("ip link set {interface} mtu {mtu}"));
    }
    client.is_quiet();
    client.takes_no_advertisement();
}

const READ_ONLY: &str =
    "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec \"$@\"";

/// As in a container: what rtnetlink takes is set, and one line, at `debug`, says what could not be.
#[test]
fn a_read_only_proc_sys_is_one_line_and_the_interface_is_quiet_all_the_same() {
    require!(Wgsep);
    let client = Client::new(|netns| {
        started_by(netns, &["unshare", "--mount", "sh", "-c", READ_ONLY, "sh"])
    });
    let log = client.daemon.process.log();
    let mut lines = log.lines().filter(|line| line.contains("the kernel's own settings stay"));
    let [Some(line), None] = [lines.next(), lines.next()] else { panic!("{log}") };
    assert!(line.contains(" DEBUG "), "{line}");
    assert!(log.contains("accept_ra (Read-only file system"), "{log}");
    let shown = shown(&client.daemon);
    assert!(shown.contains("<POINTOPOINT,NOARP>") && shown.contains("addrgenmode none"), "{shown}");
    client.is_quiet();
    client.takes_no_advertisement();
}

#[test]
fn what_a_read_only_proc_sys_has_off_already_is_not_mentioned() {
    require!(Wgsep);
    let netns = Netns::new();
    netns.run("sysctl -qw net.ipv4.conf.all.send_redirects=0");
    netns.run("sysctl -qw net.ipv6.conf.default.accept_ra=0 net.ipv6.conf.default.autoconf=0");
    let daemon = started_by(&netns, &["unshare", "--mount", "sh", "-c", READ_ONLY, "sh"]);
    let log = daemon.process.log();
    assert!(!log.contains("the kernel's own settings stay"), "{log}");
}

#[test]
fn without_ipv6_there_is_nothing_to_say() {
    require!(Wgsep);
    let netns = Netns::new();
    let hidden =
        "mount -t tmpfs none /proc/sys/net && mkdir -p /proc/sys/net/ipv4/conf/all && exec \"$@\"";
    netns.run("sysctl -qw net.ipv6.conf.default.disable_ipv6=1");
    let daemon = started_by(&netns, &["unshare", "--mount", "sh", "-c", hidden, "sh"]);
    let log = daemon.process.log();
    assert!(!log.contains("the kernel's own settings stay"), "{log}");
    netns.run(format!("ip link set {} up", daemon.interface));
    assert!(ipv6_addresses(&daemon).is_empty());
}

/// A daemon that another program executes, with a log of all levels.
fn started_by(netns: &Arc<Netns>, launcher: &[&str]) -> Daemon {
    let interface = unique_interface();
    let mut command = netns.command(launcher[0]);
    command.args(&launcher[1..]).arg(wgsep_program("wgsep")).args([&interface, "--foreground"]);
    command.args(["--log-level", "debug"]);
    let mut process = Process::spawn(command, launcher.join(" "));
    wait::until("the daemon answers", LIMIT, || {
        assert_eq!(process.try_exit(), None);
        uapi::is_answering(&interface)
    });
    Daemon { process, interface, netns: Arc::clone(netns) }
}

/// A number of /proc/net/snmp.
fn icmp_counter(netns: &Netns, name: &str) -> u64 {
    let text = netns.run("cat /proc/net/snmp");
    let lines: Vec<Vec<_>> = text
        .lines()
        .filter(|line| line.starts_with("Icmp: "))
        .map(|line| line.split(' ').collect())
        .collect();
    let [names, values] = &lines[..] else { panic!("{text}") };
    let at = names.iter().position(|known| *known == name).unwrap();
    values[at].parse().unwrap()
}

/// Two peers that talk through a third: for the kernel, packets leave by the interface that they came by.
#[test]
fn a_hub_sends_its_spokes_no_redirects() {
    require!(Wgsep);
    for moved in [false, true] {
        let middle = Netns::new();
        let hub_netns = if moved { Netns::new() } else { Arc::clone(&middle) };
        let mut hub = Daemon::start(Wgsep, &middle);
        if moved {
            hub.move_interface(&hub_netns);
        }
        let spokes = [Netns::new(), Netns::new()];
        let hub_key = KeyPair::generate();
        let mut configuration =
            format!("[Interface]\nPrivateKey = {}\nListenPort = {PORT}\n", hub_key.private);
        let daemons: Vec<_> = (2..)
            .zip(&spokes)
            .map(|(number, netns)| {
                let mut daemon = Daemon::start(Wgsep, &middle);
                daemon.move_interface(netns);
                let key = KeyPair::generate();
                daemon.wg_conf("setconf", &format!(
                "[Interface]\nPrivateKey = {}\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.9.0.0/24\n\
                 Endpoint = 127.0.0.1:{PORT}\nPersistentKeepalive = 25\n",
                key.private, hub_key.public
            ));
                configuration += &format!(
                    "[Peer]\nPublicKey = {}\nAllowedIPs = 10.9.0.{number}/32\n",
                    key.public
                );
                (daemon, format!("10.9.0.{number}/24"))
            })
            .collect();
        hub.wg_conf("setconf", &configuration);
        hub.netns.run("sysctl -qw net.ipv4.ip_forward=1");
        for (daemon, address) in daemons
            .iter()
            .map(|(daemon, address)| (daemon, &**address))
            .chain([(&hub, "10.9.0.1/24")])
        {
            daemon.netns.run(format!("ip addr add {address} dev {}", daemon.interface));
            daemon.netns.run(format!("ip link set {} up", daemon.interface));
        }
        let other = "10.9.0.3".parse().unwrap();
        until_ping(&spokes[0], other);
        assert_eq!(ping(&spokes[0], other, 5).received, 5);
        assert_eq!(icmp_counter(&spokes[0], "InRedirects"), 0, "moved: {moved}");
        if moved {
            assert!(hub.drops("solicitation_or_redirect") > 0, "the kernel sends them there");
        } else {
            assert_eq!(icmp_counter(&hub.netns, "OutRedirects"), 0);
        }
    }
}
