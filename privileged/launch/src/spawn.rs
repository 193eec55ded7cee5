//! Finding, checking and starting the dataplane.

use crate::startup::{handled_signals, null, open_path};
use crate::{Grants, Offload, Options, sys};
use core::convert::Infallible;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socketpair,
};
use nix::sys::wait::waitpid;
use nix::unistd::{
    ForkResult, Gid, Pid, Uid, chdir, execveat, getegid, geteuid, pipe2, setsid, write,
};
use std::ffi::CString;
use std::fs::{File, OpenOptions, metadata};
use std::io::{IoSlice, PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use wgsep_ipc::startup::{self, CHANNEL, VM_CLOCK};
use wgsep_ipc::{Channel, Startup};
use wgsep_monitor::{Dataplane, Error, Process, Result, Step};
use wgsep_policy::{Layer, Report, State};

const PROGRAM: &str = "wgsep-dataplane";
/// Where packages put it, if not beside the helper.
const LIBEXEC: &str = match option_env!("WGSEP_LIBEXECDIR") {
    Some(directory) => directory,
    None => "/usr/libexec/wgsep",
};

const UNDER_DEADLINE: &str = "cannot start another process under SCHED_DEADLINE (EAGAIN); start wgsep under another scheduling policy (chrt --other 0), or with the flag that resets it: chrt --reset-on-fork";
const NO_MORE_PROCESSES: &str = "no more processes (EAGAIN); raise the limit on them: ulimit -u, TasksMax= of a unit, --pids-limit of a container";

/// The dataplane's command line.
fn words(options: &Options, grants: &Grants, interface: &str) -> Result<Vec<CString>> {
    let (lowest_port, highest_port) = grants.ports();
    let startup = Startup {
        interface: interface.to_owned(),
        workers: options.workers,
        udp_gso: !options.without.contains(&Offload::UdpGso),
        avx512: !options.without.contains(&Offload::Avx512),
        log_level: options.log_level,
        listen_port: grants.port.unwrap_or(0),
        lowest_port,
        highest_port,
        fwmark: grants.mark.map_or(0, |(value, mask)| value & mask),
        listens_everywhere: options.listen.is_everywhere(),
        bind_device: options.listen.device().unwrap_or_default().to_string_lossy().into_owned(),
    };
    let words = core::iter::once(PROGRAM.to_owned()).chain(startup.encode(options.version));
    let words: core::result::Result<_, _> = words.map(CString::new).collect();
    words.map_err(|_| Error::new("NUL in an argument; leave it out"))
}

/// Opens the program once, and checks that only its owner could have written it; true with it if
/// this process may read it.
fn open_program() -> Result<(OwnedFd, bool)> {
    let helper = std::env::current_exe().step("find the helper's own program")?;
    let directory = helper.parent().unwrap_or(Path::new("/"));
    let candidates = [directory, &directory.join("../libexec/wgsep"), Path::new(LIBEXEC)]
        .map(|directory| directory.join(PROGRAM));
    let found =
        candidates.iter().find_map(|path| Some((path, open_path(path, OFlag::empty()).ok()?)));
    let Some((path, program)) = found else {
        let looked = candidates.map(|path| path.display().to_string()).join(", ");
        return Err(Error::new(format!(
            "{PROGRAM} not found at {looked}; install it: make install"
        )));
    };
    let status = program.metadata().step("check the dataplane's program")?;
    let helpers_owner = metadata(&helper).step("check the helper's program")?.uid();
    let is_owned = [0, helpers_owner].contains(&status.uid());
    if !status.is_file() || !is_owned || status.mode() & 0o022 != 0 {
        return Err(Error::new(format!(
            "{} must be a regular file of root or of the helper's owner that no other user can write; install it again (make install), or: chown root {0}; chmod go-w {0}",
            path.display()
        )));
    }
    let is_readable = File::open(path).is_ok();
    Ok((program.into(), is_readable))
}

/// Starts the dataplane: confined before it is executed, by descriptor, with an empty environment.
///
/// # Errors
/// If the program is missing or unsafe, a mandatory layer is refused, or it cannot be executed.
pub fn start(
    options: &Options,
    grants: &Grants,
    interface: &str,
    user: Option<(Uid, Gid)>,
) -> Result<Dataplane> {
    let words = words(options, grants, interface)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).step("socketpair")?;
    let channel = Channel::new(ours).map_err(|error| {
        Error::new(match error {
            wgsep_ipc::Error::Io(errno) => {
                format!("channel: {error}; {}", wgsep_policy::remedy(errno))
            }
            _ => format!("channel: {error}; this is a bug, please report it"),
        })
    })?;
    let (unread, unread_end) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).step("socketpair")?;
    let (log, log_end) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).step("log pipe")?;
    let (outcome, outcome_end) = std::io::pipe().step("pipe")?;
    let (program, is_readable) = open_program()?;
    let child = Child {
        null: null()?.into(),
        log: log_end,
        vm_clock: vm_clock()?,
        channel: out_of_the_way(theirs)?,
        unread: out_of_the_way(unread_end)?,
        outcome: out_of_the_way(outcome_end.into())?,
        program: out_of_the_way(program)?,
    };
    let pid = match fork()? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let Err(errno) = child.become_dataplane(user, &words);
            let _parent_is_gone = write(&child.outcome, &(errno as i32).to_ne_bytes());
            std::process::exit(127)
        }
    };
    drop(child);
    let (pidfd, mut report) = sys::pidfd_open(pid)
        .step("pidfd_open")
        .and_then(|pidfd| Ok((pidfd, read_outcome(outcome)?)))
        .inspect_err(|_| end(pid))?;
    let changed = user.filter(|_| report.state(Layer::User) == State::Applied);
    let ids = changed.unwrap_or_else(|| (geteuid(), getegid()));
    if changed.is_none() && is_readable {
        // Dumpable from the moment it is executed until it says otherwise, to all processes of this user.
        report.note(Layer::Untraceable, State::degraded(Errno::EPERM));
    }
    let threads = startup::threads(options.workers);
    let process = Process { pidfd, log, unread };
    Ok(Dataplane { process, channel, pid, ids, threads, report })
}

/// Forks this process.
///
/// # Errors
/// If the kernel refuses it.
pub fn fork() -> Result<ForkResult> {
    let forked = sys::fork();
    let is_under_deadline = forked.is_err() && sys::is_under_deadline();
    let why = if is_under_deadline { UNDER_DEADLINE } else { NO_MORE_PROCESSES };
    forked.advise("fork", &[(&[Errno::EAGAIN], why)])
}

/// Ends a child that did not become a dataplane: what it holds of the interface goes with it.
fn end(child: Pid) {
    let _already_gone = kill(child, Signal::SIGKILL);
    let _reaped = waitpid(child, None);
}

/// The page in which the host counts the copies of this virtual machine, where it does.
fn vm_clock() -> Result<Option<OwnedFd>> {
    let device = OpenOptions::new().read(true).open("/dev/vmclock0").ok();
    device.map(|device| out_of_the_way(device.into())).transpose()
}

/// Moves a descriptor out of the way of the numbers that the dataplane expects others at.
fn out_of_the_way(descriptor: OwnedFd) -> Result<OwnedFd> {
    let moved = fcntl(descriptor, FcntlArg::F_DUPFD_CLOEXEC(VM_CLOCK + 1));
    moved.and_then(sys::take_descriptor).step("move a descriptor")
}

/// What the dataplane is given.
struct Child {
    null: OwnedFd,
    log: OwnedFd,
    channel: OwnedFd,
    /// Nobody reads what is sent here.
    unread: OwnedFd,
    /// The page in which the host counts copies of this virtual machine.
    vm_clock: Option<OwnedFd>,
    /// Tells the helper of its preparation.
    outcome: OwnedFd,
    program: OwnedFd,
}

impl Child {
    /// Arranges descriptors, confines itself, says how that went, and executes the program. Returns
    /// only if that fails.
    fn become_dataplane(
        &self,
        user: Option<(Uid, Gid)>,
        words: &[CString],
    ) -> nix::Result<Infallible> {
        let Self { null, log, channel, unread, vm_clock, outcome, program } = self;
        for (number, descriptor) in
            (0..).zip([null, null, log, channel].into_iter().chain(vm_clock))
        {
            sys::place_descriptor(descriptor.as_fd(), number)?;
        }
        // These are for the helper, though a service manager may send them to every process: it ends
        // the dataplane in order, with SIGKILL.
        handled_signals().thread_set_mask()?;
        setsid()?;
        chdir("/")?;
        let mut kept = vec![CHANNEL, unread.as_raw_fd(), outcome.as_raw_fd(), program.as_raw_fd()];
        kept.extend(vm_clock.is_some().then_some(VM_CLOCK));
        let kept: Vec<_> = kept.into_iter().map(i32::cast_unsigned).collect();
        wgsep_policy::close_inherited_descriptors(&kept)?;
        let report = wgsep_policy::prepare_dataplane(user, &|count| send_null(unread, count));
        write(outcome, &report.to_bytes().concat())?;
        let no_environment: [CString; 0] = [];
        execveat(program, c"", words, &no_environment, AtFlags::AT_EMPTY_PATH)
    }
}

/// Sends standard input, which is /dev/null, so many times with one message.
fn send_null(to: &OwnedFd, count: usize) -> nix::Result<()> {
    let descriptors = vec![0; count];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<UnixAddr>(to.as_raw_fd(), &[IoSlice::new(&[0])], &rights, flags, None).map(drop)
}

/// The child's report; then nothing if it was executed, or the errno if it was not.
fn read_outcome(mut outcome: PipeReader) -> Result<Report> {
    let mut bytes = Vec::new();
    outcome.read_to_end(&mut bytes).step("start the dataplane")?;
    let (report, errno) = bytes.split_at_checked(Layer::COUNT * 3).unwrap_or((&[], &bytes));
    if let Some(errno) = errno.first_chunk().map(|errno| i32::from_ne_bytes(*errno)) {
        return Err(Errno::from_raw(errno)).advise(
            if report.is_empty() { "prepare the dataplane" } else { "execute wgsep-dataplane" },
            &[
                (
                    &[Errno::ENOENT],
                    "cannot execute wgsep-dataplane in its empty root: it must be linked statically; build it with: make",
                ),
                // More processes of its user than the limit, which counts only then.
                (&[Errno::EAGAIN], NO_MORE_PROCESSES),
                (
                    &[Errno::EACCES],
                    "cannot execute wgsep-dataplane (EACCES); make it executable by everybody (chmod a+rx), on a file system that is not mounted noexec",
                ),
            ],
        );
    }
    let report = report.as_chunks().0.first_chunk().and_then(Report::from_bytes);
    report.ok_or_else(|| {
        Error::new("the dataplane was not prepared to its end; see the lines of the kernel: dmesg")
    })
}
