//! Parses a transaction into an [`Operation`], or refuses it as a whole with an errno and a line.
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use super::{Operation, Scopes};
use nix::errno::Errno;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use wgsep_proto::encoding::from_hex;
use wgsep_proto::secret::Secret;
use wgsep_proto::{
    AllowedIp, AllowedIpChange, Configuration, KEY_LEN, PeerConfiguration, PresharedKey,
    PrivateKey, PublicKey,
};

/// Why a transaction was refused. It never holds the value after `=`, which may be a key.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// The errno of the reply: negative for a `set`, positive for a `get`.
    pub(super) errno: i32,
    /// Number of the line, from 1.
    pub(super) line: usize,
    /// What is wrong.
    pub(super) reason: &'static str,
}

impl Refusal {
    /// Refuses a transaction that starts as `text` does, which decides the sign of the errno.
    pub(super) fn new(text: &[u8], errno: Errno, line: usize, reason: &'static str) -> Self {
        let number = errno as i32;
        let errno = if text.starts_with(b"get=") { number } else { number.saturating_neg() };
        Self { errno, line, reason }
    }
}

/// What a line sets, or why it is refused.
type Parsed<T> = Result<T, &'static str>;

/// Parses a transaction. `EPROTO` refuses what is not the protocol at all, `EINVAL` a key or value.
pub(super) fn parse(text: &[u8], scopes: &dyn Scopes) -> Result<Operation, Refusal> {
    let mut lines = (1..).zip(text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()));
    let operation = match lines.next() {
        Some((_, b"get=1")) => alone(lines, Operation::Get),
        Some((_, b"get=statistics")) => alone(lines, Operation::Statistics),
        Some((_, b"set=1")) => parse_set(lines, scopes).map(Operation::Set),
        _ => Err((Errno::EPROTO, 1, "a transaction starts with get=1, get=statistics or set=1")),
    };
    operation.map_err(|(errno, line, reason)| Refusal::new(text, errno, line, reason))
}

fn alone<'a>(
    mut lines: impl Iterator<Item = (usize, &'a [u8])>,
    operation: Operation,
) -> Result<Operation, (Errno, usize, &'static str)> {
    match lines.next() {
        None => Ok(operation),
        Some((line, _)) => Err((Errno::EINVAL, line, "a get takes no more lines")),
    }
}

fn parse_set<'a>(
    lines: impl Iterator<Item = (usize, &'a [u8])> + Clone,
    scopes: &dyn Scopes,
) -> Result<Configuration, (Errno, usize, &'static str)> {
    let peers = lines.clone().filter(|(_, line)| names_peer(line)).count();
    let mut configuration =
        Configuration { peers: Vec::with_capacity(peers), ..Configuration::default() };
    for (number, line) in lines {
        let (key, value) = split(line).map_err(|reason| (Errno::EPROTO, number, reason))?;
        set(&mut configuration, key, value, scopes)
            .map_err(|reason| (Errno::EINVAL, number, reason))?;
    }
    Ok(configuration)
}

/// Whether a line has the form of a peer's name. All of them are counted before any is taken: peers
/// hold preshared keys, of which a `Vec` that grows would leave copies behind.
pub(super) fn names_peer(line: &[u8]) -> bool {
    const NAME: &[u8] = b"public_key=";
    line.starts_with(NAME) && line.len() == KEY_LEN.saturating_mul(2).saturating_add(NAME.len())
}

pub(super) fn split(line: &[u8]) -> Parsed<(&str, &str)> {
    let line = core::str::from_utf8(line).map_err(|_| "not text")?;
    line.split_once('=').ok_or("not of the form key=value")
}

fn set(
    configuration: &mut Configuration,
    key: &str,
    value: &str,
    scopes: &dyn Scopes,
) -> Parsed<()> {
    if key == "public_key" {
        let public_key = PublicKey::from_bytes(*hex_key(value)?);
        configuration.peers.push(PeerConfiguration::new(public_key));
        return Ok(());
    }
    match configuration.peers.last_mut() {
        None => device_line(configuration, key, value),
        Some(peer) => peer_line(peer, key, value, scopes),
    }
}

fn device_line(configuration: &mut Configuration, key: &str, value: &str) -> Parsed<()> {
    match key {
        "private_key" => configuration.private_key = Some(PrivateKey::from_bytes(*hex_key(value)?)),
        "listen_port" => {
            configuration.listen_port = Some(number(value).ok_or("listen_port is 0 to 65535")?);
        }
        "fwmark" => configuration.fwmark = Some(mark(value).ok_or("fwmark is a 32-bit number")?),
        "replace_peers" => configuration.replace_peers = boolean(value)?,
        _ => return Err("no such key for the device"),
    }
    Ok(())
}

fn peer_line(
    peer: &mut PeerConfiguration,
    key: &str,
    value: &str,
    scopes: &dyn Scopes,
) -> Parsed<()> {
    match key {
        "remove" => peer.remove = boolean(value)?,
        "update_only" => peer.update_only = boolean(value)?,
        "preshared_key" => peer.preshared_key = Some(PresharedKey::from_bytes(*hex_key(value)?)),
        "endpoint" => peer.endpoint = Some(endpoint(value, scopes)?),
        "persistent_keepalive_interval" => {
            let seconds = number(value).ok_or("persistent_keepalive_interval is 0 to 65535")?;
            peer.persistent_keepalive_interval = Some(seconds);
        }
        "replace_allowed_ips" => peer.replace_allowed_ips = boolean(value)?,
        "allowed_ip" => peer.allowed_ips.push(allowed_ip(value)?),
        "protocol_version" if value == "1" => {}
        "protocol_version" => return Err("the only protocol_version is 1"),
        _ => return Err("no such key for a peer"),
    }
    Ok(())
}

pub(super) fn boolean(value: &str) -> Parsed<bool> {
    if value == "true" { Ok(true) } else { Err("the only value is true") }
}

/// Decimal digits and nothing else: no sign, no space.
fn number<N: core::str::FromStr>(value: &str) -> Option<N> {
    let is_digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    is_digits.then(|| value.parse().ok()).flatten()
}

/// Decimal, or hexadecimal after 0x.
fn mark(value: &str) -> Option<u32> {
    match value.strip_prefix("0x") {
        Some(digits) if digits.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            u32::from_str_radix(digits, 16).ok()
        }
        Some(_) => None,
        None => number(value),
    }
}

pub(super) fn hex_key(value: &str) -> Parsed<Secret> {
    const BAD: &str = "a key is 64 hexadecimal digits";
    from_hex(value).ok_or(BAD)
}

/// `1.2.3.4:5`, `[2001:db8::1]:5` or `[fe80::1%eth0]:5`.
fn endpoint(value: &str, scopes: &dyn Scopes) -> Parsed<SocketAddr> {
    const BAD: &str = "endpoint is ADDRESS:PORT or [ADDRESS]:PORT, without names";
    let (host, port) = value.rsplit_once(':').ok_or(BAD)?;
    let port: u16 = number(port).ok_or(BAD)?;
    let Some(bracketed) = host.strip_prefix('[') else {
        let address: std::net::Ipv4Addr = host.parse().map_err(|_| BAD)?;
        return Ok((address, port).into());
    };
    let inside = bracketed.strip_suffix(']').ok_or(BAD)?;
    let (address, scope) = match inside.split_once('%') {
        Some((address, scope)) => {
            (address, scopes.index_of(scope).ok_or("no interface has the endpoint's scope")?)
        }
        None => (inside, 0),
    };
    let address: Ipv6Addr = address.parse().map_err(|_| BAD)?;
    Ok(SocketAddrV6::new(address, port, 0, scope).into())
}

/// ADDRESS/CIDR, after `-` to remove it.
fn allowed_ip(value: &str) -> Parsed<AllowedIpChange> {
    const BAD: &str = "allowed_ip is ADDRESS/CIDR";
    let (remove, prefix) = match value.strip_prefix('-') {
        Some(prefix) => (true, prefix),
        None => (false, value),
    };
    let (address, cidr) = prefix.split_once('/').ok_or(BAD)?;
    let address: IpAddr = address.parse().map_err(|_| BAD)?;
    let allowed_ip = number(cidr).and_then(|cidr| AllowedIp::new(address, cidr)).ok_or(BAD)?;
    Ok(AllowedIpChange { allowed_ip, remove })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
pub(super) mod tests {
    use super::*;
    use nix::libc;

    pub(crate) struct Eth0;

    impl Scopes for Eth0 {
        fn index_of(&self, name: &str) -> Option<u32> {
            if name == "eth0" { Some(7) } else { name.parse().ok() }
        }
    }

    const KEY: &str = "0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1F20";

    fn set_of(lines: &str) -> Result<Configuration, Refusal> {
        match parse(format!("set=1\n{lines}").as_bytes(), &Eth0)? {
            Operation::Set(configuration) => Ok(configuration),
            Operation::Get | Operation::Statistics => panic!("a set became a get"),
        }
    }

    fn peer(lines: &str) -> Result<PeerConfiguration, Refusal> {
        set_of(&format!("public_key={KEY}\n{lines}")).map(|mut set| set.peers.pop().unwrap())
    }

    #[test]
    fn a_device_takes_its_keys() {
        let parsed = set_of(&format!(
            "private_key={KEY}\nlisten_port=51820\nfwmark=0xca6c\nreplace_peers=true\n"
        ))
        .unwrap();
        assert!(parsed.private_key.unwrap().is_some() && parsed.replace_peers);
        assert_eq!((parsed.listen_port, parsed.fwmark), (Some(51820), Some(51820)));
        let cleared = set_of(&format!("private_key={}\nfwmark=0", "0".repeat(64))).unwrap();
        assert!(cleared.private_key.unwrap().is_none());
        assert_eq!((cleared.listen_port, cleared.fwmark), (None, Some(0)));
    }

    #[test]
    fn a_peer_takes_its_keys_and_each_public_key_starts_afresh() {
        let lines = format!(
            "public_key={KEY}\npreshared_key={KEY}\nendpoint=192.0.2.1:1\n\
             persistent_keepalive_interval=65535\nreplace_allowed_ips=true\nallowed_ip=10.0.0.1/8\n\
             allowed_ip=-fd00::/64\nprotocol_version=1\nupdate_only=true\npublic_key={KEY}\nremove=true"
        );
        let peers = set_of(&lines).unwrap().peers;
        assert_eq!(peers.len(), 2);
        let [first, second] = &peers[..] else { panic!() };
        assert_eq!(first.public_key.as_bytes()[31], 0x20);
        assert!(first.preshared_key.is_some() && first.update_only && first.replace_allowed_ips);
        assert_eq!(first.persistent_keepalive_interval, Some(65535));
        assert_eq!(first.allowed_ips[0].allowed_ip.address(), IpAddr::from([10, 0, 0, 0]));
        assert!(!first.allowed_ips[0].remove && first.allowed_ips[1].remove);
        assert!(second.remove && second.preshared_key.is_none() && !second.update_only);
        assert!(second.endpoint.is_none() && second.allowed_ips.is_empty());
    }

    /// Word for word what wg(8) 1.0.20210914 writes, but for the keys.
    #[test]
    fn all_that_wg_sends_is_understood() {
        let setconf = format!(
            "private_key={KEY}\nlisten_port=51820\nfwmark=51820\nreplace_peers=true\n\
             public_key={KEY}\npreshared_key={KEY}\nendpoint=[fe80::1%eth0]:51820\n\
             persistent_keepalive_interval=25\nreplace_allowed_ips=true\n\
             allowed_ip=10.0.0.1/32\nallowed_ip=fd00::/64\n\
             public_key={KEY}\nreplace_allowed_ips=true\n"
        );
        let parsed = set_of(&setconf).unwrap();
        assert!(parsed.replace_peers && parsed.private_key.flatten().is_some());
        assert_eq!((parsed.listen_port, parsed.fwmark), (Some(51820), Some(51820)));
        let [full, bare] = &parsed.peers[..] else { panic!("two peers") };
        assert_eq!(full.endpoint, Some("[fe80::1%7]:51820".parse().unwrap()));
        assert_eq!(full.persistent_keepalive_interval, Some(25));
        assert_eq!((full.allowed_ips.len(), bare.allowed_ips.len()), (2, 0));
        assert!(full.preshared_key.is_some() && full.replace_allowed_ips);
        assert!(bare.preshared_key.is_none() && bare.replace_allowed_ips && !bare.remove);

        let off_and_removed = format!(
            "private_key={}\nfwmark=0\nlisten_port=0\npublic_key={KEY}\nremove=true\n",
            "0".repeat(64)
        );
        let parsed = set_of(&off_and_removed).unwrap();
        assert!(parsed.private_key.unwrap().is_none() && parsed.peers[0].remove);
        assert_eq!((parsed.listen_port, parsed.fwmark), (Some(0), Some(0)));
        assert!(!parsed.replace_peers);

        let mapped = peer("endpoint=[::ffff:1.2.3.4]:9\n").unwrap();
        assert_eq!(mapped.endpoint, Some("[::ffff:1.2.3.4]:9".parse().unwrap()));
    }

    #[test]
    fn endpoints_and_scopes() {
        for (text, expected) in [
            ("192.0.2.1:51820", "192.0.2.1:51820"),
            ("[2001:db8::1]:0", "[2001:db8::1]:0"),
            ("[fe80::1%eth0]:1", "[fe80::1%7]:1"),
            ("[fe80::1%3]:1", "[fe80::1%3]:1"),
        ] {
            let endpoint = peer(&format!("endpoint={text}")).unwrap().endpoint.unwrap();
            assert_eq!(endpoint, expected.parse().unwrap());
        }
        for bad in [
            "192.0.2.1",
            "192.0.2.1:",
            "192.0.2.1:65536",
            "192.0.2.1:-1",
            "192.0.2.1:+1",
            "host:1",
            "2001:db8::1:1",
            "[2001:db8::1]",
            "[::1:1",
            "[fe80::1%nope]:1",
            "[192.0.2.1]:1",
            "",
            ":1",
        ] {
            assert!(peer(&format!("endpoint={bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_bad_line_refuses_the_whole_with_its_number_and_sign() {
        for bad in [
            "private_key=",
            "private_key=0",
            "listen_port=65536",
            "listen_port=-1",
            "listen_port=+1",
            "listen_port= 1",
            "listen_port=",
            "fwmark=4294967296",
            "fwmark=0x",
            "fwmark=0x+1",
            "fwmark=x",
            "replace_peers=false",
            "replace_peers=1",
            "replace_peers=True",
            "nonsense=1",
            "=",
            "endpoint=192.0.2.1:1",
            "set=1",
            "get=1",
            "errno=0",
            "private_key=\u{ff}",
            " listen_port=1",
            "listen_port=1 ",
            "listen_port=1\r",
        ] {
            let refusal = set_of(&format!("listen_port=1\n{bad}")).err().unwrap();
            assert_eq!((refusal.errno, refusal.line), (-libc::EINVAL, 3), "{bad}");
        }
        for bad in [
            "allowed_ip=10.0.0.0",
            "allowed_ip=fd00::1",
            "allowed_ip=10.0.0.0/33",
            "allowed_ip=fd00::/129",
            "allowed_ip=10.0.0.0/",
            "allowed_ip=/8",
            "allowed_ip=10.0.0/8",
            "allowed_ip=10.0.0.0/-8",
            "allowed_ip=--10.0.0.0/8",
            "remove=yes",
            "persistent_keepalive_interval=65536",
            "persistent_keepalive_interval=off",
            "protocol_version=2",
            "protocol_version=",
            "listen_port=1",
            "preshared_key=zz",
        ] {
            assert_eq!(peer(bad).err().unwrap().errno, -libc::EINVAL, "{bad}");
        }
    }

    #[test]
    fn what_is_not_the_protocol_has_another_errno_and_a_get_the_other_sign() {
        let refused = |text: &[u8]| {
            let refusal = parse(text, &Eth0).err().unwrap();
            (refusal.errno, refusal.line)
        };
        for bad in [
            &b""[..],
            b"set=",
            b"set=2",
            b"set=1 ",
            b"\xff\xfe",
            b"public_key=1",
            b"fwmark=1\nset=1",
        ] {
            assert_eq!(refused(bad), (-libc::EPROTO, 1));
        }
        assert_eq!(refused(b"set=1\nreplace_peers=true\nnonsense"), (-libc::EPROTO, 3));
        assert_eq!(refused(b"set=1\nlisten_port=\xff\xfe"), (-libc::EPROTO, 2));
        assert_eq!(refused(b"get=2"), (libc::EPROTO, 1));
        assert_eq!(refused(b"get=1\nset=1"), (libc::EINVAL, 2));
        assert_eq!(refused(b"get=statistics\nget=1"), (libc::EINVAL, 2));
    }

    #[test]
    fn no_copy_of_a_preshared_key_is_left_by_growing() {
        let lines = format!("public_key={KEY}\npreshared_key={KEY}\n").repeat(100);
        let peers = set_of(&lines).unwrap().peers;
        assert_eq!((peers.len(), peers.capacity()), (100, 100));
    }
}
