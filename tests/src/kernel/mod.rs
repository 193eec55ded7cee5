//! The kernel's own WireGuard as a peer: Debian's kernel in a virtual machine, on a tap device
//! in a namespace of the test's. The machine has the addresses of the right side of a link, and the
//! namespace those of the left.

mod image;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use self::image::Image;
use crate::link::{Family, Side};
use crate::netns::Netns;
use crate::process::Process;
use crate::scratch::Scratch;
use crate::tunnel::{End, PORT};
use crate::wait;
use crate::wg::KeyPair;

/// The namespace's end of the link to the machine.
pub const DEVICE: &str = "vm0";

/// How long the machine may take to boot, and to answer a line: it is translated, and others work
/// on the same cores.
const LIMIT: Duration = Duration::from_secs(90);

/// A machine that runs the kernel's WireGuard on its interface `wg0`; it ends when dropped.
pub struct KernelPeer {
    /// Its static key.
    pub key: KeyPair,
    /// Where the tap device is.
    pub netns: Arc<Netns>,
    process: Process,
    serial: BufReader<UnixStream>,
    image: Image,
    /// How many machines this one is a copy of.
    copies: u32,
    directory: Scratch,
}

/// Whether a machine can be booted here; says so when not, and the test returns.
#[must_use]
pub fn is_available_or_skips() -> bool {
    if !crate::skip::is_root_or_skips() {
        return false;
    }
    match image::package() {
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
    let has_driver = image::package().is_ok_and(|package| image::config(&package).contains(DRIVER));
    if !has_driver {
        crate::skip::skip(&format!("the kernel in the cache was built without {DRIVER}"));
    }
    has_driver
}

/// How often a line may lose characters on its way.
const MOST_GARBLED: u32 = 10;

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
        let netns = Netns::new();
        netns.run(format!("ip tuntap add {DEVICE} mode tap"));
        netns.run(format!("ip link set {DEVICE} addrgenmode none"));
        for (family, prefix) in [(Family::V4, "24"), (Family::V6, "64 nodad")] {
            let address = Side::Left.outer(family);
            netns.run(format!("ip addr add dev {DEVICE} {address}/{prefix}"));
        }
        netns.run(format!("ip link set {DEVICE} up"));
        let package = match image::package() {
            Ok(package) => package,
            Err(reason) => panic!("{reason}"),
        };
        let (image, directory) = (Image::build(&package, programs), Scratch::new());
        let (process, serial) = start(&netns, &image, &directory, 0);
        let mut peer = Self {
            key: KeyPair::generate(),
            netns,
            process,
            serial: BufReader::new(serial),
            image,
            copies: 0,
            directory,
        };
        peer.until_ready();
        for family in [Family::V4, Family::V6] {
            let prefix = if family == Family::V4 { 24 } else { 64 };
            peer.run(format!("ip addr add {}/{prefix} dev eth0", Side::Right.outer(family)));
        }
        peer
    }

    #[track_caller]
    fn until_ready(&mut self) {
        while self.line() != "ready" {}
    }

    #[track_caller]
    fn line(&mut self) -> String {
        let mut line = String::new();
        match self.serial.read_line(&mut line) {
            Ok(1..) => line.trim_end_matches(['\r', '\n']).to_owned(),
            Ok(0) => panic!("the machine ended"),
            Err(error) => panic!("the machine is silent: {error}"),
        }
    }

    #[track_caller]
    fn send(&mut self, line: &str) {
        if let Err(error) = writeln!(self.serial.get_mut(), "{} {line}", line.len()) {
            panic!("the machine takes no line: {error}");
        }
    }

    /// Runs a line of shell in the machine and returns what it printed.
    ///
    /// # Panics
    ///
    /// When it fails.
    #[track_caller]
    pub fn run(&mut self, line: impl AsRef<str>) -> String {
        let line = line.as_ref().trim();
        assert!(!line.contains('\n'), "one line at a time: {line:?}");
        self.send(line);
        let (mut printed, mut garbled) = (Vec::new(), 0);
        let status = loop {
            let answer = self.line();
            if answer == "garbled" {
                garbled += 1;
                assert!(garbled < MOST_GARBLED, "the machine does not get {line:?}");
                printed.clear();
                self.send(line);
            } else if let Some(status) = answer.strip_prefix("status ") {
                break status.to_owned();
            } else {
                printed.push(answer);
            }
        };
        // The end of the output is a line of its own, whether or not the output had one.
        printed.pop_if(|last| last.is_empty());
        let printed = printed.join("\n");
        assert_eq!(status, "0", "in the machine, {line:?} failed: {printed}");
        printed
    }

    /// Saves the machine's state, ends it, and starts a copy from that state, with another generation id.
    ///
    /// # Panics
    ///
    /// When the emulator does not do it in time.
    #[track_caller]
    pub fn continue_in_a_copy(&mut self) {
        let state = self.directory.join("state");
        // The command returns when all is written.
        self.monitor(&format!("migrate \"exec:cat >{}\"", state.display()));
        self.monitor("quit");
        let _ended = self.process.exit_within(LIMIT);
        self.copies += 1;
        let (process, serial) = start(&self.netns, &self.image, &self.directory, self.copies);
        (self.process, self.serial) = (process, BufReader::new(serial));
    }

    /// Has the emulator do something, and waits until it takes the next command or is gone.
    #[track_caller]
    fn monitor(&self, command: &str) {
        const PROMPT: &[u8] = b"(qemu) ";
        let mut stream = connect(&self.directory.join("monitor"));
        let mut said = Vec::new();
        let mut until_prompt = |stream: &mut UnixStream| {
            let mut byte = [0];
            while !said.ends_with(PROMPT) && stream.read(&mut byte).is_ok_and(|len| len == 1) {
                said.push(byte[0]);
            }
            core::mem::take(&mut said)
        };
        until_prompt(&mut stream);
        let sent = writeln!(stream, "{command}");
        assert!(sent.is_ok(), "{command}: {sent:?}");
        let answer = until_prompt(&mut stream);
        let answer = String::from_utf8_lossy(&answer);
        assert!(!answer.contains("Error") && !answer.contains("unknown"), "{command}: {answer}");
    }

    /// Makes an interface, with the inner addresses of the right side, and its one peer.
    #[track_caller]
    pub fn configure(&mut self, peer: &str, endpoint: Option<SocketAddr>, psk: Option<&str>) {
        let endpoint = endpoint.map_or(String::new(), |endpoint| format!("endpoint {endpoint}"));
        let psk = psk.map_or(String::new(), |psk| {
            self.run(format!("echo {psk} >/tmp/psk"));
            "preshared-key /tmp/psk".to_owned()
        });
        self.run(format!("echo {} >/tmp/key", self.key.private));
        self.run("ip link del wg0 2>/dev/null; ip link add wg0 type wireguard");
        let (v4, v6) = (Side::Left.inner(Family::V4), Side::Left.inner(Family::V6));
        let allowed = format!("allowed-ips {v4}/32,{v6}/128");
        self.run(format!("wg set wg0 private-key /tmp/key listen-port {PORT}"));
        self.run(format!("wg set wg0 peer {peer} {psk} {endpoint} {allowed}"));
        let (v4, v6) = (Side::Right.inner(Family::V4), Side::Right.inner(Family::V6));
        self.run(format!("ip addr add {v4}/24 dev wg0; ip addr add {v6}/64 dev wg0"));
        self.run("ip link set wg0 up");
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

    /// Waits until one echo request of the machine's is answered.
    #[track_caller]
    pub fn until_ping(&mut self, to: IpAddr) {
        let tries = "for i in $(seq 30); do ping -n -q -c 1 -W 1 {} && exit 0; done; exit 1";
        self.run(tries.replace("{}", &to.to_string()));
    }

    /// One column of `wg show wg0 dump` about the only peer, numbered from 0 as wg(8) has them.
    #[track_caller]
    pub fn peer_column(&mut self, column: usize) -> String {
        let dump = self.run("wg show wg0 dump");
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

    /// What its kernel and the emulator have said.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.log()
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

/// Starts the emulator: a new machine, or the `copy`th copy of the one whose state is in `directory`.
#[track_caller]
fn start(
    netns: &Arc<Netns>,
    image: &Image,
    directory: &Scratch,
    copy: u32,
) -> (Process, UnixStream) {
    let [serial, monitor] = ["serial", "monitor"].map(|name| directory.join(name));
    let mut command = netns.command(image::QEMU);
    command.args(["-M", "pc", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults"]);
    command.args(["-display", "none", "-no-reboot"]);
    command.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initramfs);
    command.args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]);
    command.args(["-netdev", &format!("tap,id=net,ifname={DEVICE},script=no,downscript=no")]);
    command.args(["-device", "virtio-net-pci,netdev=net,romfile="]);
    command.args(["-device", &format!("vmgenid,guid=00000000-0000-0000-0000-{copy:012}")]);
    // The first serial port is the kernel's console, and the second the shell.
    command.args(["-serial", "stdio", "-serial"]);
    command.arg(format!("unix:{},server=on,wait=on", serial.display()));
    command.args(["-monitor", &format!("unix:{},server=on,wait=off", monitor.display())]);
    if copy > 0 {
        command.args(["-incoming", &format!("exec:cat {}", directory.join("state").display())]);
    }
    // Those of the machine before would be connected to without success.
    for socket in [&serial, &monitor] {
        let _none = std::fs::remove_file(socket);
    }
    (Process::spawn(command, "the kernel's machine"), connect(&serial))
}

#[track_caller]
fn connect(socket: &PathBuf) -> UnixStream {
    let stream = wait::poll(LIMIT, || UnixStream::connect(socket).ok());
    let Some(stream) = stream else { panic!("the emulator does not start") };
    let limited = stream.set_read_timeout(Some(LIMIT));
    assert!(limited.is_ok(), "{limited:?}");
    stream
}
