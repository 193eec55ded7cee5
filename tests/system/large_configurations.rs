//! Configurations that do not fit one message or one buffer, through wg(8) and back, to the last entry.

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::require;
use wgsep_tests::uapi::{Uapi, errno};
use wgsep_tests::wg::{KeyPair, hex};

/// The allowed IPs of each peer, as `wg show allowed-ips` lists them.
fn allowed_ips(daemon: &Daemon) -> Vec<(String, Vec<String>)> {
    let listing = daemon.wg("show", "allowed-ips");
    let peers = listing.lines().map(|line| {
        let mut words = line.split_whitespace().map(str::to_owned);
        (words.next().unwrap_or_default(), words.collect())
    });
    peers.collect()
}

/// An `[Interface]` section with a fresh key.
fn interface() -> String {
    format!("[Interface]\nPrivateKey = {}\n", KeyPair::generate().private)
}

/// A `[Peer]` section with a fresh key and one line for each allowed IP.
fn peer(allowed: impl IntoIterator<Item = String>) -> String {
    let mut text = format!("[Peer]\nPublicKey = {}\n", KeyPair::generate().public);
    for address in allowed {
        text.push_str(&format!("AllowedIPs = {address}\n"));
    }
    text
}

fn daemon() -> Daemon {
    Daemon::start(Wgsep, &Netns::new())
}

#[test]
fn one_peer_has_130560_allowed_ips() {
    require!(Wgsep);
    let daemon = daemon();
    let networks = (1..=255).flat_map(|high| (0..=255).map(move |low| (high, low)));
    let both = networks.flat_map(|(high, low)| {
        [format!("{high}.{low}.0.0/16"), format!("2{high:02x}:{low:x}::/32")]
    });
    daemon.wg_conf("setconf", &(interface() + &peer(both)));
    let reported = allowed_ips(&daemon);
    assert_eq!(reported.len(), 1);
    assert_eq!(reported[0].1.len(), 130_560);
    let mut different = reported[0].1.clone();
    different.sort_unstable();
    different.dedup();
    assert_eq!(different.len(), 130_560, "some are reported twice");
}

#[test]
fn forty_peers_have_fifty_two_allowed_ips_each() {
    require!(Wgsep);
    let daemon = daemon();
    let of_peer = |high| peer((1..=52).map(move |low| format!("{high}.{low}.0.0/16")));
    let text = interface() + &(1..=40).map(of_peer).collect::<String>();
    daemon.wg_conf("setconf", &text);
    let reported = allowed_ips(&daemon);
    assert_eq!(reported.len(), 40);
    let counts: Vec<_> = reported.iter().map(|(_key, allowed)| allowed.len()).collect();
    assert!(counts.iter().all(|count| *count == 52), "{counts:?}");
}

#[test]
fn thirty_peers_of_which_only_the_last_has_allowed_ips_are_shown_as_they_were_set() {
    require!(Wgsep);
    let daemon = daemon();
    let last = ["255.2.3.4/32", "abcd::255/128"].map(str::to_owned);
    let text = (0..29).map(|_number| peer([])).collect::<String>() + &peer(last.clone());
    daemon.wg_conf("setconf", &text);
    let shown = daemon.wg("showconf", "");
    let keys = |text: &str| -> Vec<String> {
        text.lines().filter(|line| line.starts_with("PublicKey")).map(str::to_owned).collect()
    };
    assert_eq!(keys(&shown), keys(&text), "in the order they were set");
    let reported = allowed_ips(&daemon);
    let (_key, of_last) = &reported[29];
    assert!(last.iter().all(|address| of_last.contains(address)), "{of_last:?}");
    assert!(reported[..29].iter().all(|(_key, allowed)| *allowed == ["(none)"]), "{reported:?}");
}

#[test]
fn one_command_line_sets_197_allowed_ips() {
    require!(Wgsep);
    let daemon = daemon();
    let [first, second] = [(), ()].map(|()| KeyPair::generate().public);
    let all: Vec<_> = (1..=197).map(|number| format!("abcd::{number}")).collect();
    daemon.wg_set(format!("peer {first}"));
    daemon.wg_set(format!("peer {second} allowed-ips {}", all.join(",")));
    let reported = allowed_ips(&daemon);
    assert_eq!(reported[0], (first, vec!["(none)".to_owned()]));
    assert_eq!(reported[1].0, second);
    assert_eq!(reported[1].1.len(), 197);
}

#[test]
fn prefixes_within_prefixes_come_and_go() {
    require!(Wgsep);
    let daemon = daemon();
    let key = KeyPair::generate().public;
    for set in [
        "0.0.0.0/0,10.0.0.0/8,100.0.0.0/10,172.16.0.0/12,192.168.0.0/16",
        "0.0.0.0/0",
        "::/0,1700::/111,5000::/4,e000::/37,9000::/75",
        "::/0",
    ] {
        daemon.wg_set(format!("peer {key} allowed-ips {set}"));
        let mut reported = allowed_ips(&daemon).remove(0).1;
        let mut expected: Vec<_> = set.split(',').map(str::to_owned).collect();
        reported.sort_unstable();
        expected.sort_unstable();
        assert_eq!(reported, expected);
    }
}

/// Newer wg(8) than Debian's takes single addresses from a peer and gives them back.
#[test]
fn single_allowed_ips_are_taken_away() {
    require!(Wgsep);
    let daemon = daemon();
    let [one, other] = [(), ()].map(|()| KeyPair::generate().public);
    let base = "allowed_ip=192.168.0.0/24\nallowed_ip=192.168.0.1/32\nallowed_ip=fd00::/64";
    let mut uapi = match Uapi::connect(&daemon.interface) {
        Ok(uapi) => uapi,
        Err(error) => panic!("cannot connect: {error}"),
    };
    let mut set = |key: &str, lines: &str| {
        let key = hex(key);
        let answer = uapi.transact(&format!("set=1\npublic_key={key}\n{lines}\n\n"));
        assert_eq!(answer.ok().as_deref().and_then(errno), Some(0), "{lines}");
        let mut reported = allowed_ips(&daemon).remove(0).1;
        reported.sort_unstable();
        reported.join(" ")
    };
    assert_eq!(set(&one, base), "192.168.0.0/24 192.168.0.1/32 fd00::/64");
    assert_eq!(set(&one, "allowed_ip=-192.168.0.1/32"), "192.168.0.0/24 fd00::/64");
    // What is not there, has another length, or is another peer's, stays as it is.
    assert_eq!(set(&one, "allowed_ip=-192.168.0.1/32"), "192.168.0.0/24 fd00::/64");
    assert_eq!(set(&one, "allowed_ip=-192.168.0.0/25"), "192.168.0.0/24 fd00::/64");
    assert_eq!(set(&other, "allowed_ip=-192.168.0.0/24"), "192.168.0.0/24 fd00::/64");
    assert_eq!(
        set(&one, "allowed_ip=-fd00::/64\nallowed_ip=10.0.0.0/8"),
        "10.0.0.0/8 192.168.0.0/24"
    );
    let rest = "allowed_ip=-10.0.0.0/8\nallowed_ip=-192.168.0.0/24";
    assert_eq!(set(&one, rest), "(none)");
}
