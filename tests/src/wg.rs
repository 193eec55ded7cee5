//! wg(8) on an interface, and keys made with it.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use crate::daemon::Daemon;
use crate::implementation::wgsep_program;
use crate::process::run;

/// A key pair in wg(8)'s base64.
#[derive(Clone, Debug)]
pub struct KeyPair {
    /// What `PrivateKey =` takes.
    pub private: String,
    /// What the peer's `PublicKey =` takes.
    pub public: String,
}

impl KeyPair {
    /// A fresh pair from `wg genkey` and `wg pubkey`.
    #[track_caller]
    #[must_use]
    pub fn generate() -> Self {
        let private = run(Command::new("wg").arg("genkey")).trim().to_owned();
        let public = with_input("wg pubkey", &private).trim().to_owned();
        Self { private, public }
    }

    /// The peer's name in logs.
    #[must_use]
    pub fn name(&self) -> String {
        format!("peer({}…{})", &self.public[..4], &self.public[39..43])
    }
}

/// A fresh preshared key in base64.
#[track_caller]
#[must_use]
pub fn preshared_key() -> String {
    run(Command::new("wg").arg("genpsk")).trim().to_owned()
}

/// A key in the hexadecimal that the UAPI speaks.
///
/// # Panics
///
/// When the text is not base64 as wg(8) writes it.
#[track_caller]
#[must_use]
pub fn hex(base64: &str) -> String {
    let (mut bits, mut held, mut out) = (0_u32, 0, String::new());
    for character in base64.bytes().filter(|byte| *byte != b'=') {
        let digit = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            other => panic!("{other:#x} is no base64 digit"),
        };
        bits = bits << 6 | u32::from(digit);
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push_str(&format!("{:02x}", bits >> held & 0xff));
        }
    }
    out
}

/// Runs a command line with `input` on its stdin and returns its stdout.
///
/// # Panics
///
/// When it fails.
#[track_caller]
pub fn with_input(line: &str, input: &str) -> String {
    let output = output_with_input(line, input);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {}\n{stderr}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command line that may fail with `input` on its stdin.
#[track_caller]
pub fn output_with_input(line: &str, input: &str) -> Output {
    let mut words = line.split_ascii_whitespace();
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let outcome = command.spawn().and_then(|mut child| {
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        child.wait_with_output()
    });
    match outcome {
        Ok(output) => output,
        Err(error) => panic!("{line}: {error}"),
    }
}

/// One line of `wg show IF dump` about a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerState {
    /// Base64.
    pub public_key: String,
    /// Base64, or `(none)`.
    pub preshared_key: String,
    /// `address:port`, or `(none)`.
    pub endpoint: String,
    /// Comma-separated, in the daemon's order, or `(none)`.
    pub allowed_ips: String,
    /// Seconds since the epoch; 0 before the first.
    pub latest_handshake: u64,
    /// Bytes received.
    pub received: u64,
    /// Bytes sent.
    pub sent: u64,
    /// Seconds, or `off`.
    pub keepalive: String,
}

impl Daemon {
    /// `wg COMMAND INTERFACE ARGUMENTS`, which must succeed; returns its stdout.
    #[track_caller]
    pub fn wg(&self, command: &str, arguments: &str) -> String {
        self.netns.run(format!("wg {command} {} {arguments}", self.interface))
    }

    /// `wg set INTERFACE ARGUMENTS`, which must succeed.
    #[track_caller]
    pub fn wg_set(&self, arguments: impl AsRef<str>) {
        self.wg("set", arguments.as_ref());
    }

    /// `wg set INTERFACE ARGUMENTS`, which may fail.
    #[track_caller]
    pub fn try_wg_set(&self, arguments: impl AsRef<str>) -> Output {
        self.netns.output(format!("wg set {} {}", self.interface, arguments.as_ref()))
    }

    /// `wg set INTERFACE private-key`; an empty text clears it.
    #[track_caller]
    pub fn set_private_key(&self, key: &str) {
        with_input(&format!("wg set {} private-key /dev/stdin", self.interface), key);
    }

    /// Gives wg(8) a configuration file's text for `setconf`, `addconf` or `syncconf`.
    #[track_caller]
    pub fn wg_conf(&self, command: &str, text: &str) {
        with_input(&format!("wg {command} {} /dev/stdin", self.interface), text);
    }

    /// The port it listens on.
    ///
    /// # Panics
    ///
    /// When wg(8) prints none.
    #[track_caller]
    #[must_use]
    pub fn listen_port(&self) -> u16 {
        let port = self.wg("show", "listen-port");
        match port.trim().parse() {
            Ok(port) => port,
            Err(error) => panic!("wg show listen-port printed {port:?}: {error}"),
        }
    }

    /// All its peers, in wg(8)'s order.
    ///
    /// # Panics
    ///
    /// When wg(8)'s dump has other columns than its manual says.
    #[track_caller]
    #[must_use]
    pub fn peers(&self) -> Vec<PeerState> {
        self.wg("show", "dump").lines().skip(1).map(peer_state).collect()
    }

    /// How many packets `wgsep stats` counts as dropped for this cause.
    ///
    /// # Panics
    ///
    /// When the daemon has no such cause.
    #[track_caller]
    #[must_use]
    pub fn drops(&self, cause: &str) -> u64 {
        let program = wgsep_program("wgsep");
        let printed =
            self.netns.run(format!("{} stats --json {}", program.display(), self.interface));
        let statistics: Option<serde_json::Value> = serde_json::from_str(&printed).ok();
        let packets = statistics.as_ref().and_then(|all| all["drops"][cause].as_u64());
        let Some(packets) = packets else { panic!("no {cause} in {printed}") };
        packets
    }

    /// Its only peer.
    ///
    /// # Panics
    ///
    /// When it has none or several.
    #[track_caller]
    #[must_use]
    pub fn peer(&self) -> PeerState {
        let mut peers = self.peers();
        assert_eq!(peers.len(), 1, "{peers:?}");
        peers.remove(0)
    }
}

#[track_caller]
fn peer_state(line: &str) -> PeerState {
    let columns: Vec<_> = line.split('\t').collect();
    let [public, preshared, endpoint, allowed, handshake, received, sent, keepalive] = columns[..]
    else {
        panic!("wg show dump printed {line:?}");
    };
    let number = |text: &str| match text.parse() {
        Ok(number) => number,
        Err(error) => panic!("wg show dump printed {line:?}: {error}"),
    };
    PeerState {
        public_key: public.to_owned(),
        preshared_key: preshared.to_owned(),
        endpoint: endpoint.to_owned(),
        allowed_ips: allowed.to_owned(),
        latest_handshake: number(handshake),
        received: number(received),
        sent: number(sent),
        keepalive: keepalive.to_owned(),
    }
}
