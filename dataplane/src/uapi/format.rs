//! The answer to a `get`, key by key as the protocol has them.

use super::secret_text::SecretText;
use crate::drops::Drops;
use std::fmt::Write;
use wgsep_proto::{AllowedIp, DeviceStatus, PeerStatus};
use wgsep_status::{Counters, write_counters};

/// Most bytes of a peer without its allowed IPs, of an allowed IP, or of the end.
pub(super) const LONGEST_ITEM: usize = 512;

/// Writes the beginning of the reply to a `get`, before the peers.
///
/// It has keys of our own, which wg(8) skips: `drop_CAUSE`, packets dropped so far. Like port and mark they are left out
/// when 0.
pub(super) fn device(device: &DeviceStatus, drops: Drops<'_>) -> SecretText {
    let mut text = SecretText::with_capacity(4096);
    // Writing to memory cannot fail.
    let _infallible = write_device(&mut text, device, drops);
    text
}

/// Adds a peer without its allowed IPs, which follow.
pub(super) fn peer(text: &mut SecretText, peer: &PeerStatus) {
    // Writing to memory cannot fail.
    let _infallible = write_peer(text, peer);
}

/// Adds an allowed IP of the last peer.
pub(super) fn allowed_ip(text: &mut SecretText, allowed_ip: AllowedIp) {
    // Writing to memory cannot fail.
    let _infallible = writeln!(text, "allowed_ip={}/{}", allowed_ip.address(), allowed_ip.cidr());
}

/// Adds the end of a reply, with the blank line.
pub(super) fn end(text: &mut SecretText, errno: i32) {
    // Writing to memory cannot fail.
    let _infallible = write!(text, "errno={errno}\n\n");
}

/// Writes the whole reply to `get=statistics`, with the lines that the status socket has.
pub(super) fn statistics(counters: &Counters) -> SecretText {
    let mut text = SecretText::with_capacity(2048);
    // Writing to memory cannot fail.
    let _infallible = write_counters(&mut text, counters);
    end(&mut text, 0);
    text
}

fn write_device(
    text: &mut SecretText,
    device: &DeviceStatus,
    drops: Drops<'_>,
) -> std::fmt::Result {
    if let Some(private_key) = &device.private_key {
        write_key(text, "private_key", private_key.as_bytes());
    }
    if device.listen_port != 0 {
        writeln!(text, "listen_port={}", device.listen_port)?;
    }
    if device.fwmark != 0 {
        writeln!(text, "fwmark={}", device.fwmark)?;
    }
    for (name, count) in drops.counts().filter(|(_, count)| *count > 0) {
        writeln!(text, "drop_{name}={count}")?;
    }
    Ok(())
}

fn write_peer(text: &mut SecretText, peer: &PeerStatus) -> std::fmt::Result {
    write_key(text, "public_key", peer.public_key.as_bytes());
    write_key(text, "preshared_key", peer.preshared_key.as_bytes());
    text.write_str("protocol_version=1\n")?;
    if let Some(endpoint) = peer.endpoint {
        // The scope of a link-local address by its number: the name is unknown in another network
        // namespace, which wg(8) may well run in and which it does not survive (1.0.20210914). Where the
        // name is known, wg(8) shows it.
        writeln!(text, "endpoint={endpoint}")?;
    }
    writeln!(text, "last_handshake_time_sec={}", peer.last_handshake.as_secs())?;
    writeln!(text, "last_handshake_time_nsec={}", peer.last_handshake.subsec_nanos())?;
    writeln!(text, "tx_bytes={}", peer.tx_bytes)?;
    writeln!(text, "rx_bytes={}", peer.rx_bytes)?;
    writeln!(text, "persistent_keepalive_interval={}", peer.persistent_keepalive_interval)
}

fn write_key(text: &mut SecretText, name: &str, key: &[u8; 32]) {
    text.push(name.as_bytes());
    text.push(b"=");
    text.push_hex(key);
    text.push(b"\n");
}

#[cfg(test)]
mod tests {
    use super::super::Operation;
    use super::super::parse::{parse, tests::Eth0};
    use super::*;
    use crate::drops::of_protocol;
    use std::net::SocketAddrV6;
    use std::time::Duration;
    use wgsep_proto::{DropCause, DropCounters};
    use wgsep_proto::{PresharedKey, PrivateKey, PublicKey};
    use wgsep_status::Udp;

    /// The whole reply to a `get`.
    fn format(
        status: &DeviceStatus,
        drops: Drops<'_>,
        peers: impl Iterator<Item = PeerStatus>,
    ) -> SecretText {
        let mut text = device(status, drops);
        for status in peers {
            peer(&mut text, &status);
            status.allowed_ips.iter().for_each(|one| allowed_ip(&mut text, *one));
        }
        end(&mut text, 0);
        text
    }

    /// The part of an answer in which an item begins has room for it.
    #[test]
    fn no_item_is_longer_than_the_longest() {
        let ones = std::net::Ipv6Addr::from(u128::MAX);
        let longest = PeerStatus {
            endpoint: Some(SocketAddrV6::new(ones, u16::MAX, 0, u32::MAX).into()),
            last_handshake: Duration::new(u64::MAX, 999_999_999),
            rx_bytes: u64::MAX,
            tx_bytes: u64::MAX,
            persistent_keepalive_interval: u16::MAX,
            ..example()
        };
        let mut text = SecretText::default();
        peer(&mut text, &longest);
        let len = text.as_bytes().len();
        assert!((400..=LONGEST_ITEM).contains(&len), "{len} bytes");
        allowed_ip(&mut text, AllowedIp::new(ones.into(), 128).unwrap());
        let len = text.as_bytes().len() - len;
        assert!(len < LONGEST_ITEM, "{len} bytes");
    }

    fn example() -> PeerStatus {
        PeerStatus {
            public_key: PublicKey::from_bytes([0xab; 32]),
            preshared_key: PresharedKey::default(),
            endpoint: Some("[fe80::1%7]:51820".parse().unwrap()),
            last_handshake: Duration::new(1_795_000_000, 5),
            rx_bytes: 1372,
            tx_bytes: 1428,
            persistent_keepalive_interval: 25,
            allowed_ips: vec![AllowedIp::new("10.0.0.0".parse().unwrap(), 24).unwrap()],
        }
    }

    #[test]
    fn the_reply_is_as_the_protocol_has_it() {
        let device = DeviceStatus {
            private_key: PrivateKey::from_bytes([0xff; 32]),
            listen_port: 51820,
            fwmark: 0,
        };
        let drops = DropCounters::default();
        drops.add(DropCause::NoPeer, 2);
        let text = format(&device, of_protocol(&drops), std::iter::once(example()));
        let expected = format!(
            "private_key=f8{}7f\nlisten_port=51820\ndrop_no_peer=2\npublic_key={}\npreshared_key={}\n\
             protocol_version=1\nendpoint=[fe80::1%7]:51820\nlast_handshake_time_sec=1795000000\n\
             last_handshake_time_nsec=5\ntx_bytes=1428\nrx_bytes=1372\n\
             persistent_keepalive_interval=25\nallowed_ip=10.0.0.0/24\nerrno=0\n\n",
            "ff".repeat(30),
            "ab".repeat(32),
            "00".repeat(32),
        );
        assert_eq!(std::str::from_utf8(text.as_bytes()).unwrap(), expected);
        let empty = DeviceStatus { private_key: None, listen_port: 0, fwmark: 0 };
        assert_eq!(
            format(&empty, of_protocol(&DropCounters::default()), std::iter::empty()).as_bytes(),
            b"errno=0\n\n"
        );
    }

    #[test]
    fn statistics_have_every_counter_and_no_key() {
        let drops = DropCounters::default();
        drops.add(DropCause::Replayed, 3);
        let counters = Counters {
            drops: of_protocol(&drops).counts().collect(),
            udp: Udp { port: 51820, ipv4: true, ipv6: false, errno: 98, missing: Vec::new() },
            offloads: vec![("udp-gso", true), ("uso", false)],
            peers_without_gso: 2,
        };
        let text = statistics(&counters);
        let text = std::str::from_utf8(text.as_bytes()).unwrap();
        let count = text.lines().filter(|line| line.starts_with("drop_")).count();
        assert_eq!(count, of_protocol(&drops).counts().count());
        assert!(text.contains("drop_replay=3\n") && text.contains("drop_no_peer=0\n"), "{text}");
        assert!(
            text.ends_with(
                "offload_udp_gso=1\noffload_uso=0\npeers_without_udp_gso=2\nerrno=0\n\n"
            ),
            "{text}"
        );
        assert!(text.contains("udp_port=51820\nudp_ipv4=1\nudp_ipv6=0\nudp_errno=98\n"), "{text}");
        let known = ["drop_", "udp_", "offload_", "peers_without_udp_gso=", "errno="];
        let other = |line: &&str| !known.iter().any(|key| line.starts_with(key));
        assert_eq!(text.trim_end().lines().find(other), None);
    }

    #[test]
    fn what_is_got_can_be_set_again() {
        let device = DeviceStatus {
            private_key: PrivateKey::from_bytes([7; 32]),
            listen_port: 1,
            fwmark: u32::MAX,
        };
        let text =
            format(&device, of_protocol(&DropCounters::default()), std::iter::once(example()));
        let settable: String = std::str::from_utf8(text.as_bytes())
            .unwrap()
            .lines()
            .filter(|line| {
                !["errno", "last_", "tx_", "rx_"].iter().any(|key| line.starts_with(key))
            })
            .fold("set=1\n".to_owned(), |text, line| text + line + "\n");
        let Ok(Operation::Set(set)) = parse(settable.trim_end().as_bytes(), &Eth0) else {
            panic!()
        };
        assert!(set.private_key.flatten() == device.private_key);
        assert_eq!((set.listen_port, set.fwmark), (Some(1), Some(u32::MAX)));
        let [parsed] = &set.peers[..] else { panic!() };
        assert_eq!(parsed.endpoint, example().endpoint);
        assert_eq!(parsed.allowed_ips.len(), 1);
    }
}
