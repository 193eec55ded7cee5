//! A booted machine whose `wgsep@wg0` serves one end of a tunnel; the other end is a wgsep outside of it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::daemon::Daemon;
use crate::implementation::Implementation::Wgsep;
use crate::link::{self, Family, Side};
use crate::machine::{Machine, write_configuration};
use crate::netns::Netns;
use crate::scratch::Scratch;
use crate::traffic::until_ping;
use crate::tunnel::{End, PORT};
use crate::wg::KeyPair;

/// The machine, both ends and the file.
#[derive(Debug)]
pub struct Unit {
    /// The machine, on which the package is to be installed.
    pub machine: Machine,
    /// Its network.
    pub netns: Arc<Netns>,
    /// The other end.
    pub other: End,
    /// The machine's /etc/wireguard/wg0.conf.
    pub file: PathBuf,
    _scratch: Scratch,
}

impl Unit {
    /// Boots a machine with the file of the tunnel and these besides, as [`Machine::boot`] has them.
    #[track_caller]
    #[must_use]
    pub fn boot(image: &Path, files: &[(&Path, &str)]) -> Self {
        let (scratch, (netns, right)) = (Scratch::new(), link::joined());
        let key = KeyPair::generate();
        let other = End::new(Side::Right, Daemon::start(Wgsep, &right));
        other.configure(&key.public, None, None);
        let file = scratch.join("wg0.conf");
        let (inner, theirs) = (Side::Left.inner(Family::V4), Side::Right.inner(Family::V4));
        write_configuration(
            &file,
            &format!(
                "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\nAddress = {inner}/32, fd77::1/128\nMTU = 1400\n\
                 \n[Peer]\nPublicKey = {}\nAllowedIPs = {theirs}/32, 198.51.100.0/24, fd78::/64\nEndpoint = {}\n",
                key.private,
                other.key.public,
                other.endpoint(Family::V4)
            ),
        );
        let mut seen = vec![(&*file, "/etc/wireguard/wg0.conf")];
        seen.extend(files);
        let machine = Machine::boot(image, &netns, &seen);
        Self { machine, netns, other, file, _scratch: scratch }
    }

    /// Starts the unit, and waits until traffic flows.
    #[track_caller]
    pub fn start(&self) {
        self.machine.run("systemctl start wgsep@wg0");
        until_ping(&self.netns, self.theirs());
    }

    /// The address of the other end in the tunnel.
    #[must_use]
    pub fn theirs(&self) -> IpAddr {
        self.other.side.inner(Family::V4)
    }

    /// A property of the unit, as systemctl(1) shows it.
    #[track_caller]
    #[must_use]
    pub fn show(&self, what: &str) -> String {
        let line = format!("systemctl show --value --property {what} wgsep@wg0");
        self.machine.run(&line).trim().to_owned()
    }

    /// Index, settings, addresses and routes of the interface.
    #[track_caller]
    #[must_use]
    pub fn state(&self) -> String {
        let shown = ["-o link", "-o addr", "-4 route", "-6 route"].map(|what| {
            let (option, object) = what.split_at(2);
            self.netns.run(format!("ip {option} {object} show dev wg0"))
        });
        shown.concat()
    }

    /// Whether there is an interface.
    #[must_use]
    pub fn has_interface(&self) -> bool {
        self.netns.output("ip link show wg0").status.success()
    }
}
