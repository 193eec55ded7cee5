//! Finding, checking and starting the dataplane.

use crate::error::{Error, Result, Step};
use crate::startup::handled_signals;
use crate::sys::{self, Forked};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::{Mode, SFlag, fstat, stat};
use nix::unistd::{Gid, Pid, Uid, User, chdir, geteuid, pipe2, read, setsid};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use wgsep_ipc::{Channel, REPORT_LAYERS};
use wgsep_policy::user::DYNAMIC_UIDS;
use wgsep_policy::{Layer, Report, State};

const PROGRAM: &str = "wgsep-dataplane";
/// Where packages put it, if not beside the helper.
const LIBEXEC: &str = match option_env!("WGSEP_LIBEXECDIR") {
    Some(directory) => directory,
    None => "/usr/libexec/wgsep",
};
/// Where the dataplane finds the channel; the log is its standard error.
const CHANNEL: i32 = 3;
/// Account of the dataplane, if there is one.
const ACCOUNT: &str = "wgsep";

/// The running dataplane.
pub struct Dataplane {
    /// For signals and for its end.
    pub pidfd: OwnedFd,
    /// To look it up in /proc.
    pub pid: Pid,
    /// Requests.
    pub channel: Channel,
    /// What it logs.
    pub log: OwnedFd,
    /// Whom it runs as.
    pub uid: Uid,
    /// How the layers turned out that close before it is executed.
    pub report: Report,
}

/// What the dataplane is told on its command line.
pub struct Arguments<'a> {
    /// Name of the interface.
    pub interface: &'a str,
    /// Worker threads.
    pub workers: usize,
    /// Whether to send many datagrams at once.
    pub udp_gso: bool,
    /// As `--log-level` takes it.
    pub log_level: &'a str,
    /// UDP port to start with, 0 for any.
    pub port: u16,
    /// The lowest and the highest port it may ask for.
    pub ports: (u16, u16),
    /// Mark to start with, 0 for none.
    pub mark: u32,
}

impl Arguments<'_> {
    fn to_strings(&self) -> Result<Vec<CString>> {
        let pairs = [
            ("--interface", self.interface.to_owned()),
            ("--workers", self.workers.to_string()),
            ("--udp-gso", if self.udp_gso { "on" } else { "off" }.to_owned()),
            ("--log-level", self.log_level.to_owned()),
            ("--listen-port", self.port.to_string()),
            ("--ports", format!("{}-{}", self.ports.0, self.ports.1)),
            ("--fwmark", self.mark.to_string()),
        ];
        let mut words = vec![PROGRAM.to_owned()];
        words.extend(pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
        words
            .into_iter()
            .map(|word| {
                CString::new(word).map_err(|_| Error::new("NUL in an argument; leave it out"))
            })
            .collect()
    }
}

/// Whom the dataplane is to run as; `None` if we may not choose.
///
/// # Errors
/// If the account does not exist, or is one that the dataplane must not share.
pub fn choose_user(name: Option<&str>) -> Result<Option<(Uid, Gid)>> {
    if !geteuid().is_root() {
        return match name {
            Some(name) => {
                Err(Error::new(format!("--user {name} needs root; leave it out or run as root")))
            }
            None => Ok(None),
        };
    }
    let account = User::from_name(name.unwrap_or(ACCOUNT)).step("look up the account")?;
    match (account, name) {
        (Some(user), _) if user.uid.is_root() => Err(Error::new(format!(
            "--user {}: the dataplane must not be root; create an account: useradd --system wgsep",
            user.name
        ))),
        (Some(user), Some("nobody")) => Err(Error::new(format!(
            "--user {}: shared by other services; create an account: useradd --system wgsep",
            user.name
        ))),
        (Some(user), _) => Ok(Some((user.uid, user.gid))),
        (None, Some(name)) => {
            Err(Error::new(format!("no account {name:?}; create it: useradd --system {name}")))
        }
        (None, None) => unallocated_user().map(Some),
    }
}

/// An unused uid of the range meant for services without an account. Each daemon starts to look at
/// another, so that two of them hardly ever share one.
fn unallocated_user() -> Result<(Uid, Gid)> {
    let (first, last) = (*DYNAMIC_UIDS.start(), *DYNAMIC_UIDS.end());
    let start = first + std::process::id() % (last - first + 1);
    for uid in (start..=last).chain(first..start) {
        if matches!(User::from_uid(Uid::from_raw(uid)), Ok(None)) {
            return Ok((Uid::from_raw(uid), Gid::from_raw(uid)));
        }
    }
    Err(Error::new("no unused uid for the dataplane; create an account: useradd --system wgsep"))
}

/// Opens the program once, and checks that nobody but its owner could have written it.
fn open_program() -> Result<OwnedFd> {
    let helper = std::env::current_exe().step("find the helper's own program")?;
    let directory = helper.parent().unwrap_or(Path::new("/"));
    let candidates: [PathBuf; 3] = [
        directory.join(PROGRAM),
        directory.join("../libexec/wgsep").join(PROGRAM),
        PathBuf::from(LIBEXEC).join(PROGRAM),
    ];
    let found = candidates.iter().find_map(|path| {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        open(path, flags, Mode::empty()).ok().map(|program| (path, program))
    });
    let Some((path, program)) = found else {
        let looked: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
        return Err(Error::new(format!(
            "{PROGRAM} not found at {}; install it: make install",
            looked.join(", ")
        )));
    };
    let status = fstat(&program).step("check the dataplane's program")?;
    let helpers_owner = stat(&helper).step("check the helper's program")?.st_uid;
    let is_regular =
        SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFREG;
    let is_owned = status.st_uid == 0 || status.st_uid == helpers_owner;
    if !is_regular || !is_owned || status.st_mode & 0o022 != 0 {
        return Err(Error::new(format!(
            "{} must be a regular file of root or of the helper's owner that nobody else can write: chown root {0}; chmod go-w {0}",
            path.display()
        )));
    }
    Ok(program)
}

/// Starts the dataplane: confined before it is executed, by descriptor, with an empty environment.
///
/// # Errors
/// If the program is missing or unsafe, a mandatory layer is refused, or it cannot be executed.
pub fn start(arguments: &Arguments<'_>, user: Option<(Uid, Gid)>) -> Result<Dataplane> {
    let program = open_program()?;
    let words = arguments.to_strings()?;
    let words: Vec<&CStr> = words.iter().map(CString::as_c_str).collect();
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).step("socketpair")?;
    let (log, log_end) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).step("log pipe")?;
    let (outcome, outcome_end) = pipe2(OFlag::O_CLOEXEC).step("pipe")?;
    let pid = match sys::fork().step("fork")? {
        Forked::Parent(pid) => pid,
        Forked::Child => {
            let errno = become_dataplane(&program, &theirs, &log_end, &outcome_end, user, &words);
            let _parent_is_gone = nix::unistd::write(&outcome_end, &(errno as i32).to_ne_bytes());
            sys::exit(127)
        }
    };
    drop((theirs, log_end, outcome_end));
    let pidfd = sys::pidfd_open(pid).step("pidfd_open")?;
    let report = read_outcome(&outcome)?;
    let changed = user.filter(|_| report.state(Layer::User) == State::Applied);
    let uid = changed.map_or_else(geteuid, |(uid, _)| uid);
    let channel = Channel::new(ours).map_err(|error| {
        Error::new(format!("channel: {error}; this is a fault, please report it"))
    })?;
    Ok(Dataplane { pidfd, pid, channel, log, uid, report })
}

/// What the child does: arranges descriptors, confines itself, says how that went, and executes the
/// program. Returns only if that fails.
fn become_dataplane(
    program: &OwnedFd,
    channel: &OwnedFd,
    log: &OwnedFd,
    outcome: &OwnedFd,
    user: Option<(Uid, Gid)>,
    words: &[&CStr],
) -> nix::Error {
    let prepared = || -> nix::Result<(OwnedFd, OwnedFd)> {
        let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
        // Out of the way of the numbers that the dataplane expects.
        let [channel, log, program, outcome] =
            [channel, log, program, outcome].map(|descriptor| move_up(descriptor.as_fd()));
        let (program, outcome) = (program?, outcome?);
        sys::place_descriptor(null.as_fd(), 0)?;
        sys::place_descriptor(null.as_fd(), 1)?;
        sys::place_descriptor(log?.as_fd(), 2)?;
        sys::place_descriptor(channel?.as_fd(), CHANNEL)?;
        // These are for the helper, though a service manager may send them to every process: it ends
        // the dataplane in order, with SIGKILL.
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&handled_signals()), None)?;
        setsid()?;
        chdir("/")?;
        Ok((program, outcome))
    };
    let (program, outcome) = match prepared() {
        Ok(both) => both,
        Err(errno) => return errno,
    };
    let kept = [CHANNEL, program.as_raw_fd(), outcome.as_raw_fd()].map(i32::cast_unsigned);
    if let Err(errno) = wgsep_policy::close_inherited_descriptors(&kept) {
        return errno;
    }
    let report = wgsep_policy::prepare_dataplane(user);
    if let Err(errno) = nix::unistd::write(&outcome, &report.to_bytes().concat()) {
        return errno;
    }
    sys::execute(program.as_fd(), words)
}

fn move_up(descriptor: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    const FREE: i32 = 10;
    let raw = fcntl(descriptor, FcntlArg::F_DUPFD_CLOEXEC(FREE))?;
    sys::take_descriptor(raw)
}

/// The child's report; then nothing if it was executed, or the errno if it was not.
fn read_outcome(outcome: &OwnedFd) -> Result<Report> {
    let mut bytes = [0; REPORT_LAYERS * 3 + 4];
    let mut len = 0;
    while let Some(place) = bytes.get_mut(len..).filter(|place| !place.is_empty()) {
        match read(outcome, place).step("start the dataplane")? {
            0 => break,
            more => len += more,
        }
    }
    let (layers, errno) = bytes.split_at(REPORT_LAYERS * 3);
    if len == bytes.len() {
        let errno = errno.first_chunk().map_or(0, |errno| i32::from_ne_bytes(*errno));
        return Err(not_executed(nix::Error::from_raw(errno)));
    }
    if len < layers.len() {
        let errno = bytes.first_chunk().map_or(0, |errno| i32::from_ne_bytes(*errno));
        return Err(Error::call("prepare the dataplane", nix::Error::from_raw(errno)));
    }
    let mut wire = [[0; 3]; REPORT_LAYERS];
    for (layer, bytes) in wire.iter_mut().zip(layers.chunks_exact(3)) {
        layer.copy_from_slice(bytes);
    }
    Report::from_bytes(&wire).ok_or_else(|| {
        Error::new("the child's report makes no sense; this is a fault, please report it")
    })
}

fn not_executed(errno: nix::Error) -> Error {
    match errno {
        nix::Error::ENOENT => Error::new(format!(
            "cannot execute {PROGRAM} in its empty root: it must be linked statically; build it with: make"
        )),
        nix::Error::EACCES => Error::new(format!(
            "cannot execute {PROGRAM}: its user may not; make it executable by everybody: chmod a+rx"
        )),
        errno => Error::call(&format!("execute {PROGRAM}"), errno),
    }
}

/// Blocks the signals that the monitor reads from a descriptor, before any child exists.
///
/// # Errors
/// As sigprocmask(2).
pub fn block(signals: &SigSet) -> Result<()> {
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(signals), None).step("block signals")
}

/// Descriptor of the channel, as the dataplane's program knows it.
#[must_use]
pub const fn channel_number() -> i32 {
    CHANNEL
}
