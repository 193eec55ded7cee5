//! A virtual machine on a tap device in a namespace of the test's. The machine has the addresses of the
//! right side of a link, and the namespace those of the left. Its processor is emulated: nothing here has
//! hardware virtualisation to give.

mod image;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use self::image::Image;
use crate::implementation::in_path;
use crate::link::{Family, Side};
use crate::netns::Netns;
use crate::process::Process;
use crate::scratch::Scratch;
use crate::wait;

pub(crate) use self::image::{config, with_libraries};

/// The namespace's end of the link to the machine.
pub const DEVICE: &str = "vm0";

/// How long the machine may take to boot, and to answer a line: it is translated, and others work
/// on the same cores.
const LIMIT: Duration = Duration::from_secs(400);

/// How often a line may lose characters on its way.
const MOST_GARBLED: u32 = 10;

/// What a machine is, and what it boots.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The emulator.
    pub qemu: &'static str,
    /// Its arguments: machine, processor and memory.
    pub machine: &'static [&'static str],
    /// Whether it has a generation id, which is another in each copy of the machine.
    pub has_generation_id: bool,
    /// How the emulator connects `port`, to the character device `shell`.
    pub shell: &'static [&'static str],
    /// The kernel's command line.
    pub append: &'static str,
    /// A kernel package of Debian's, unpacked.
    pub package: PathBuf,
    /// What the kernel lacks without modules. They bring others along.
    pub modules: &'static [&'static str],
    /// Where the machine reads the lines that it runs, but for the console.
    pub port: &'static str,
    /// Files, and where the machine has them; `bin/busybox` is among them.
    pub files: Vec<(PathBuf, String)>,
}

/// What it takes to boot a machine, and is not there: what to do.
///
/// # Errors
///
/// For the first program that is missing.
pub fn has_programs(qemu: &str) -> Result<(), String> {
    for needed in [&in_path(qemu), &in_path("cpio"), &in_path("modinfo")] {
        if !needed.is_file() {
            return Err(format!("{} is missing: run `make deps`", needed.display()));
        }
    }
    Ok(())
}

/// A running machine; it ends when dropped.
pub struct Guest {
    /// Where the tap device is.
    pub netns: Arc<Netns>,
    process: Process,
    serial: BufReader<UnixStream>,
    plan: Plan,
    image: Image,
    /// How many machines this one is a copy of.
    copies: u32,
    directory: Scratch,
}

impl Guest {
    /// Boots a machine with no interface but its network card.
    ///
    /// # Panics
    ///
    /// When it does not come up; what its kernel said is printed.
    #[track_caller]
    #[must_use]
    pub fn boot(plan: Plan) -> Self {
        let netns = Netns::new();
        netns.run(format!("ip tuntap add {DEVICE} mode tap"));
        netns.run(format!("ip link set {DEVICE} addrgenmode none"));
        for (family, prefix) in [(Family::V4, "24"), (Family::V6, "64 nodad")] {
            let address = Side::Left.outer(family);
            netns.run(format!("ip addr add dev {DEVICE} {address}/{prefix}"));
        }
        netns.run(format!("ip link set {DEVICE} up"));
        let (image, directory) = (Image::build(&plan), Scratch::new());
        let (process, serial) = start(&netns, &plan, &image, &directory, 0);
        let serial = BufReader::new(serial);
        let mut guest = Self { netns, process, serial, plan, image, copies: 0, directory };
        while guest.line() != "ready" {}
        for family in [Family::V4, Family::V6] {
            let prefix = if family == Family::V4 { 24 } else { 64 };
            guest.run(format!("ip addr add {}/{prefix} dev eth0", Side::Right.outer(family)));
        }
        guest
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
        if let Err(error) = writeln!(self.serial.get_mut(), "{line}\t{line}") {
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
        assert!(!line.contains(['\n', '\t']), "one line at a time, without a tab: {line:?}");
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

    /// Waits until one echo request of the machine's is answered.
    #[track_caller]
    pub fn until_ping(&mut self, to: IpAddr) {
        let tries = "for i in $(seq 30); do ping -q -c 1 -W 1 {} && exit 0; done; exit 1";
        self.run(tries.replace("{}", &to.to_string()));
    }

    /// Saves the machine's state, ends it, and starts a copy from that state, with another generation id.
    ///
    /// # Panics
    ///
    /// When the emulator does not do it in time.
    #[track_caller]
    pub fn continue_in_a_copy(&mut self) {
        let state = self.directory.join("state");
        // Otherwise the machine runs on while it is saved, and on a busy host what it changes is never all written.
        self.monitor("migrate_set_parameter downtime-limit 10000");
        // The command returns when all is written.
        self.monitor(&format!("migrate \"exec:cat >{}\"", state.display()));
        self.monitor("quit");
        let _ended = self.process.exit_within(LIMIT);
        self.copies += 1;
        let Self { netns, plan, image, directory, copies, .. } = self;
        let (process, serial) = start(netns, plan, image, directory, *copies);
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

    /// What its kernel and the emulator have said.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.log()
    }
}

/// Starts the emulator: a new machine, or the `copy`th copy of the one whose state is in `directory`.
#[track_caller]
fn start(
    netns: &Arc<Netns>,
    plan: &Plan,
    image: &Image,
    directory: &Scratch,
    copy: u32,
) -> (Process, UnixStream) {
    let [serial, monitor] = ["serial", "monitor"].map(|name| directory.join(name));
    let mut command = netns.command(plan.qemu);
    command.args(plan.machine).args(["-accel", "tcg", "-nodefaults"]);
    command.args(["-display", "none", "-no-reboot"]);
    command.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initramfs);
    command.args(["-append", plan.append]);
    command.args(["-netdev", &format!("tap,id=net,ifname={DEVICE},script=no,downscript=no")]);
    command.args(["-device", "virtio-net-pci,netdev=net,romfile="]);
    // The first serial port is the kernel's console.
    command.args(["-serial", "stdio", "-chardev"]);
    command.arg(format!("socket,id=shell,path={},server=on,wait=on", serial.display()));
    command.args(plan.shell);
    command.args(["-monitor", &format!("unix:{},server=on,wait=off", monitor.display())]);
    if plan.has_generation_id {
        command.args(["-device", &format!("vmgenid,guid=00000000-0000-0000-0000-{copy:012}")]);
    }
    if copy > 0 {
        command.args(["-incoming", &format!("exec:cat {}", directory.join("state").display())]);
    }
    // Those of the machine before would be connected to without success.
    for socket in [&serial, &monitor] {
        let _none = fs::remove_file(socket);
    }
    (Process::spawn(command, "the virtual machine"), connect(&serial))
}

#[track_caller]
fn connect(socket: &PathBuf) -> UnixStream {
    let stream = wait::poll(LIMIT, || UnixStream::connect(socket).ok());
    let Some(stream) = stream else { panic!("the emulator does not start") };
    let limited = stream.set_read_timeout(Some(LIMIT));
    assert!(limited.is_ok(), "{limited:?}");
    stream
}
