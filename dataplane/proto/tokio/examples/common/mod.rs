//! What the examples share: a file as wg-quick(8) has it, and no more of that than they need.

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use wgsep_tokio::proto::{
    AllowedIp, AllowedIpChange, Configuration, PeerConfiguration, PresharedKey, PrivateKey,
    PublicKey,
};

/// What WireGuard leaves of 1,500 bytes, over IPv6 as well.
pub const MTU: u16 = 1420;

/// What a file says.
pub struct Tunnel {
    /// Addresses of our end in the tunnel.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Where the socket is to be bound.
    pub bind: SocketAddr,
    /// The rest, which is the protocol's.
    pub configuration: Configuration,
}

/// Prints the error that a program ends with.
#[allow(clippy::print_stderr)]
pub fn exit(result: Result<(), Box<dyn Error>>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    eprintln!("{error}");
    ExitCode::FAILURE
}

/// Reads the file of the name that is the program's argument number `number`.
pub fn read(number: usize) -> Result<Tunnel, Box<dyn Error>> {
    let name = argument(number, "a configuration file, as for wg-quick(8)")?;
    let text =
        std::fs::read_to_string(&name).map_err(|error| format!("cannot read {name}: {error}"))?;
    parse(&text).map_err(|error| format!("{name}: {error}").into())
}

/// An argument of the program.
pub fn argument(number: usize, what: &str) -> Result<String, Box<dyn Error>> {
    std::env::args()
        .nth(number)
        .ok_or_else(|| format!("argument {number} is missing: {what}").into())
}

fn parse(text: &str) -> Result<Tunnel, Box<dyn Error>> {
    let (mut addresses, mut port, mut configuration) = (Vec::new(), 0, Configuration::default());
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() || line.eq_ignore_ascii_case("[Interface]") {
            continue;
        }
        if line.eq_ignore_ascii_case("[Peer]") {
            // Its key comes with its lines.
            configuration.peers.push(PeerConfiguration::new(PublicKey::from_bytes([0; 32])));
            continue;
        }
        let (name, value) = line.split_once('=').ok_or(format!("line {number} has no `=`"))?;
        let (name, value) = (name.trim().to_ascii_lowercase(), value.trim());
        let done = match configuration.peers.last_mut() {
            Some(peer) => set_peer(peer, &name, value),
            None => match name.as_str() {
                "privatekey" => value
                    .parse::<PrivateKey>()
                    .map(|key| configuration.private_key = Some(Some(key)))
                    .map_err(Into::into),
                "listenport" => value.parse().map(|value| port = value).map_err(Into::into),
                "address" => self::addresses(value).map(|more| addresses.extend(more)),
                _ => Ok(()),
            },
        };
        done.map_err(|error: Box<dyn Error>| format!("line {number}: {error}"))?;
    }
    if configuration.peers.iter().any(|peer| *peer.public_key.as_bytes() == [0; 32]) {
        return Err("a peer has no PublicKey".into());
    }
    // For peers of both families, unless all that are known are of one.
    let mut endpoints = configuration.peers.iter().filter_map(|peer| peer.endpoint).peekable();
    let only_v4 = endpoints.peek().is_some() && endpoints.all(|endpoint| endpoint.is_ipv4());
    let any: IpAddr = if only_v4 { [0; 4].into() } else { [0; 16].into() };
    Ok(Tunnel { addresses, bind: SocketAddr::new(any, port), configuration })
}

fn set_peer(peer: &mut PeerConfiguration, name: &str, value: &str) -> Result<(), Box<dyn Error>> {
    match name {
        "publickey" => peer.public_key = value.parse()?,
        "presharedkey" => peer.preshared_key = Some(value.parse::<PresharedKey>()?),
        "endpoint" => peer.endpoint = Some(value.parse()?),
        "persistentkeepalive" => peer.persistent_keepalive_interval = Some(value.parse()?),
        "allowedips" => {
            for text in value.split(',') {
                let allowed_ip = text.trim().parse()?;
                peer.allowed_ips.push(AllowedIpChange { allowed_ip, remove: false });
            }
        }
        _ => {}
    }
    Ok(())
}

/// Addresses with the lengths of their prefixes, as in `192.0.2.1/24, 2001:db8::1/64`; one alone is a host's.
fn addresses(value: &str) -> Result<Vec<(IpAddr, u8)>, Box<dyn Error>> {
    let address = |text: &str| -> Result<(IpAddr, u8), Box<dyn Error>> {
        // The prefix has no host bits.
        let prefix: AllowedIp = text.parse()?;
        Ok((text.split('/').next().unwrap_or_default().parse()?, prefix.cidr()))
    };
    value.split(',').map(|text| address(text.trim())).collect()
}
