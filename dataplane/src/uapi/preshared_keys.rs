//! What a client of the socket for preshared keys may send: `set=1`, and for each peer `public_key=`, `preshared_key=` and,
//! unless the peer must exist, `update_only=true`. Everything else is refused as a whole.
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use super::parse::{Refusal, boolean, hex_key, names_peer, split};
use nix::errno::Errno;
use wgsep_proto::{Configuration, PeerConfiguration, PresharedKey, PublicKey};

/// Why a line is refused.
type Refused = (Errno, &'static str);

/// Parses a transaction. `EPERM` refuses what the UAPI has and this socket has not, `EPROTO` what is not the protocol at
/// all, `EINVAL` a value.
pub(super) fn parse(text: &[u8]) -> Result<Configuration, Refusal> {
    let mut lines = (1..).zip(text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()));
    let refusal = |(errno, reason): Refused, line| Refusal::new(text, errno, line, reason);
    match lines.next() {
        Some((_, b"set=1")) => {}
        Some((_, line)) if line.starts_with(b"get=") => {
            return Err(refusal((Errno::EPERM, "nothing is read here; ask the UAPI socket"), 1));
        }
        _ => return Err(refusal((Errno::EPROTO, "a transaction starts with set=1"), 1)),
    }
    let peers = lines.clone().filter(|(_, line)| names_peer(line)).count();
    let mut configuration =
        Configuration { peers: Vec::with_capacity(peers), ..Configuration::default() };
    let mut last = 1;
    for (number, line) in lines {
        set(&mut configuration, line).map_err(|refused| refusal(refused, number))?;
        last = number;
    }
    check_last(&configuration).map_err(|refused| refusal(refused, last))?;
    Ok(configuration)
}

fn set(configuration: &mut Configuration, line: &[u8]) -> Result<(), Refused> {
    let (key, value) = split(line).map_err(|reason| (Errno::EPROTO, reason))?;
    let invalid = |reason| (Errno::EINVAL, reason);
    if key == "public_key" {
        check_last(configuration)?;
        let public_key = PublicKey::from_bytes(*hex_key(value).map_err(invalid)?);
        configuration.peers.push(PeerConfiguration::new(public_key));
        return Ok(());
    }
    let is_known = matches!(key, "preshared_key" | "update_only");
    match configuration.peers.last_mut() {
        _ if !is_known => Err((Errno::EPERM, "only preshared keys of peers are set here")),
        None => Err(invalid("no public_key before it")),
        Some(peer) if key == "update_only" => {
            boolean(value).map(|is| peer.update_only = is).map_err(invalid)
        }
        Some(peer) => {
            peer.preshared_key = Some(PresharedKey::from_bytes(*hex_key(value).map_err(invalid)?));
            Ok(())
        }
    }
}

/// The last peer so far has been given a key.
fn check_last(configuration: &Configuration) -> Result<(), Refused> {
    match configuration.peers.last() {
        Some(peer) if peer.preshared_key.is_none() => {
            Err((Errno::EINVAL, "a peer without preshared_key"))
        }
        _ => Ok(()),
    }
}

/// Keeps what was parsed from making a peer.
///
/// # Errors
/// `ENOENT` if one does not exist that is not merely to be updated.
pub(crate) fn require_peers(
    configuration: &mut Configuration,
    exists: impl Fn(&PublicKey) -> bool,
) -> Result<(), Errno> {
    for peer in &mut configuration.peers {
        if !peer.update_only && !exists(&peer.public_key) {
            return Err(Errno::ENOENT);
        }
        peer.update_only = true;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    const KEY: &str = "0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1F20";

    fn refused(text: &str) -> (i32, usize) {
        let refusal = parse(text.as_bytes()).err().unwrap();
        (refusal.errno, refusal.line)
    }

    #[test]
    fn preshared_keys_of_peers_are_taken() {
        let text = format!(
            "set=1\npublic_key={KEY}\npreshared_key={KEY}\npublic_key={KEY}\nupdate_only=true\npreshared_key={KEY}\n\n"
        );
        let parsed = parse(text.as_bytes()).unwrap();
        let is_update: Vec<_> = parsed.peers.iter().map(|peer| peer.update_only).collect();
        assert_eq!(is_update, [false, true]);
        assert!(parsed.peers.iter().all(|peer| peer.preshared_key.is_some()));
        assert_eq!(parsed.peers.capacity(), 2, "no copy of a key is left by growing");
        assert!(parse(b"set=1\n\n").unwrap().peers.is_empty());
    }

    #[test]
    fn every_other_line_of_the_uapi_is_refused_with_its_number() {
        let peer = format!("public_key={KEY}\npreshared_key={KEY}\n");
        for line in [
            format!("private_key={KEY}"),
            "listen_port=1".to_owned(),
            "fwmark=1".to_owned(),
            "replace_peers=true".to_owned(),
            "remove=true".to_owned(),
            "endpoint=192.0.2.1:1".to_owned(),
            "persistent_keepalive_interval=1".to_owned(),
            "replace_allowed_ips=true".to_owned(),
            "allowed_ip=10.0.0.0/8".to_owned(),
            "protocol_version=1".to_owned(),
            "nonsense=1".to_owned(),
            "=".to_owned(),
        ] {
            assert_eq!(refused(&format!("set=1\n{line}\n{peer}\n")), (-1, 2), "{line}");
            assert_eq!(refused(&format!("set=1\n{peer}{line}\n\n")), (-1, 4), "{line}");
        }
    }

    #[test]
    fn a_get_and_what_makes_no_sense_are_refused() {
        let (invalid, protocol) = (-(Errno::EINVAL as i32), -(Errno::EPROTO as i32));
        for (text, expected) in [
            ("get=1\n\n".to_owned(), (1, 1)),
            ("get=statistics\n\n".to_owned(), (1, 1)),
            ("\n".to_owned(), (protocol, 1)),
            ("set=2\n\n".to_owned(), (protocol, 1)),
            ("set=1\nnonsense\n\n".to_owned(), (protocol, 2)),
            (format!("set=1\npublic_key={KEY}\n\n"), (invalid, 2)),
            (format!("set=1\npublic_key={KEY}\npublic_key={KEY}\n\n"), (invalid, 3)),
            (format!("set=1\npreshared_key={KEY}\n\n"), (invalid, 2)),
            (format!("set=1\npublic_key={KEY}0\n\n"), (invalid, 2)),
            (format!("set=1\npublic_key={KEY}\npreshared_key=0\n\n"), (invalid, 3)),
            (format!("set=1\npublic_key={KEY}\nupdate_only=false\n\n"), (invalid, 3)),
        ] {
            assert_eq!(refused(&text), expected, "{text:?}");
        }
    }

    #[test]
    fn no_peer_is_made() {
        let peer = format!("public_key={KEY}\npreshared_key={KEY}\n");
        for (text, exists, expected) in [
            (format!("set=1\n{peer}"), true, Ok(())),
            (format!("set=1\n{peer}"), false, Err(Errno::ENOENT)),
            (format!("set=1\n{peer}update_only=true\n"), false, Ok(())),
        ] {
            let mut parsed = parse(text.as_bytes()).unwrap();
            assert_eq!(require_peers(&mut parsed, |_| exists), expected);
            assert!(expected.is_err() || parsed.peers[0].update_only);
        }
    }
}
