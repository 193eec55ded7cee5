//! The kernel's own WireGuard as a peer: Debian's kernel in a virtual machine.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use crate::cache;
use crate::guest::{self, Guest, config, with_libraries};
use crate::implementation::in_path;
use crate::link::{Family, Side};
use crate::netns::Netns;
use crate::tunnel::{End, PORT};
use crate::wg::KeyPair;

pub use crate::guest::DEVICE;

const QEMU: &str = "qemu-system-x86_64";

/// Programs of this machine that the guest has too.
const PROGRAMS: [&str; 3] = ["wg", "ping", "iperf3"];

/// The machine, with some more programs of this one; or why it cannot be booted here.
fn plan(more_programs: &[PathBuf]) -> Result<guest::Plan, String> {
    guest::has_programs(QEMU)?;
    let busybox = in_path("busybox");
    if !busybox.is_file() {
        return Err("busybox is missing: run `make deps`".to_owned());
    }
    let programs = PROGRAMS.map(in_path);
    let programs = programs.iter().chain(more_programs).flat_map(|path| with_libraries(path));
    Ok(guest::Plan {
        qemu: QEMU,
        machine: &["-M", "pc", "-cpu", "max", "-m", "256"],
        has_generation_id: true,
        shell: &["-serial", "chardev:shell"],
        append: "console=ttyS0 quiet panic=-1 mitigations=off",
        package: cache::entry("kernel")?,
        modules: &["virtio_pci", "virtio_net", "wireguard", "tun"],
        port: "/dev/ttyS1",
        files: std::iter::once((busybox, "bin/busybox".to_owned())).chain(programs).collect(),
    })
}

/// A machine that runs the kernel's WireGuard on its interface `wg0`; it ends when dropped.
pub struct KernelPeer {
    /// Its static key.
    pub key: KeyPair,
    /// Where the tap device is.
    pub netns: Arc<Netns>,
    guest: Guest,
}

/// Whether a machine can be booted here; says so when not, and the test returns.
#[must_use]
pub fn is_available_or_skips() -> bool {
    if !crate::skip::is_root_or_skips() {
        return false;
    }
    match plan(&[]) {
        Ok(_) => true,
        Err(reason) => {
            crate::skip::skip(&reason);
            false
        }
    }
}

/// Whether a machine can be booted here whose kernel learns that it was copied; says so when not.
#[must_use]
pub fn learns_of_copies_or_skips() -> bool {
    const DRIVER: &str = "CONFIG_VMGENID=y";
    if !is_available_or_skips() {
        return false;
    }
    let has_driver = cache::entry("kernel").is_ok_and(|package| config(&package).contains(DRIVER));
    if !has_driver {
        crate::skip::skip(&format!("the kernel in the cache was built without {DRIVER}"));
    }
    has_driver
}

impl KernelPeer {
    /// Boots a machine with no interface but its network card.
    ///
    /// # Panics
    ///
    /// When it does not come up; what its kernel said is printed.
    #[track_caller]
    #[must_use]
    pub fn boot() -> Self {
        Self::boot_with(&[])
    }

    /// As [`Self::boot`], with some of the host's programs in the machine.
    #[track_caller]
    #[must_use]
    pub fn boot_with(programs: &[PathBuf]) -> Self {
        let plan = match plan(programs) {
            Ok(plan) => plan,
            Err(reason) => panic!("{reason}"),
        };
        let guest = Guest::boot(plan);
        Self { key: KeyPair::generate(), netns: Arc::clone(&guest.netns), guest }
    }

    /// Runs a line of shell in the machine and returns what it printed.
    ///
    /// # Panics
    ///
    /// When it fails.
    #[track_caller]
    pub fn run(&mut self, line: impl AsRef<str>) -> String {
        self.guest.run(line)
    }

    /// Waits until one echo request of the machine's is answered.
    #[track_caller]
    pub fn until_ping(&mut self, to: IpAddr) {
        self.guest.until_ping(to);
    }

    /// Has the machine go on in a copy of it, see [`Guest::continue_in_a_copy`].
    #[track_caller]
    pub fn continue_in_a_copy(&mut self) {
        self.guest.continue_in_a_copy();
    }

    /// What its kernel and the emulator have said.
    #[must_use]
    pub fn log(&self) -> String {
        self.guest.log()
    }

    /// Makes an interface, with the inner addresses of the right side, and its one peer.
    #[track_caller]
    pub fn configure(&mut self, peer: &str, endpoint: Option<SocketAddr>, psk: Option<&str>) {
        let endpoint = endpoint.map_or(String::new(), |endpoint| format!("endpoint {endpoint}"));
        let psk = psk.map_or(String::new(), |psk| {
            self.guest.run(format!("echo {psk} >/tmp/psk"));
            "preshared-key /tmp/psk".to_owned()
        });
        self.guest.run(format!("echo {} >/tmp/key", self.key.private));
        self.guest.run("ip link del wg0 2>/dev/null; ip link add wg0 type wireguard");
        let (v4, v6) = (Side::Left.inner(Family::V4), Side::Left.inner(Family::V6));
        let allowed = format!("allowed-ips {v4}/32,{v6}/128");
        self.guest.run(format!("wg set wg0 private-key /tmp/key listen-port {PORT}"));
        self.guest.run(format!("wg set wg0 peer {peer} {psk} {endpoint} {allowed}"));
        let (v4, v6) = (Side::Right.inner(Family::V4), Side::Right.inner(Family::V6));
        self.guest.run(format!("ip addr add {v4}/24 dev wg0; ip addr add {v6}/64 dev wg0"));
        self.guest.run("ip link set wg0 up");
    }

    /// Where the other end finds this one.
    #[must_use]
    pub fn endpoint(&self, outer: Family) -> SocketAddr {
        SocketAddr::new(Side::Right.outer(outer), PORT)
    }

    /// Takes a daemon for the other end: each gets the other for its peer, and both are up.
    #[track_caller]
    pub fn join(&mut self, end: &End, plan: Join<'_>) {
        let theirs = self.endpoint(plan.outer);
        let ours = SocketAddr::new(end.side.outer(plan.outer), PORT);
        self.configure(&end.key.public, plan.kernel_begins.then_some(ours), plan.kernel_psk);
        end.configure(&self.key.public, plan.daemon_begins.then_some(theirs), plan.daemon_psk);
    }

    /// One column of `wg show wg0 dump` about the only peer, numbered from 0 as wg(8) has them.
    #[track_caller]
    pub fn peer_column(&mut self, column: usize) -> String {
        let dump = self.guest.run("wg show wg0 dump");
        let peer = dump.lines().nth(1).and_then(|line| line.split('\t').nth(column));
        match peer {
            Some(text) => text.to_owned(),
            None => panic!("wg show dump printed {dump:?}"),
        }
    }

    /// Seconds since the epoch, of the last handshake; 0 before the first.
    #[track_caller]
    pub fn latest_handshake(&mut self) -> u64 {
        self.peer_column(4).parse().unwrap_or(0)
    }
}

/// Who knows what of the other.
#[derive(Clone, Copy, Debug)]
pub struct Join<'a> {
    /// The family of the endpoints.
    pub outer: Family,
    /// The machine knows the daemon's endpoint.
    pub kernel_begins: bool,
    /// The daemon knows the machine's endpoint.
    pub daemon_begins: bool,
    /// The machine's preshared key.
    pub kernel_psk: Option<&'a str>,
    /// The daemon's preshared key.
    pub daemon_psk: Option<&'a str>,
}

impl Join<'_> {
    /// The daemon begins, over IPv4, without a preshared key.
    pub const DAEMON_BEGINS: Self = Self {
        outer: Family::V4,
        kernel_begins: false,
        daemon_begins: true,
        kernel_psk: None,
        daemon_psk: None,
    };

    /// The kernel begins, over IPv4, without a preshared key.
    pub const KERNEL_BEGINS: Self =
        Self { kernel_begins: true, daemon_begins: false, ..Self::DAEMON_BEGINS };
}
