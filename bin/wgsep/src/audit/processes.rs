//! Which two processes serve an interface. The kernel names them: the process that made the socket listen, and the
//! child that it holds a pidfd of, or its only child where its descriptors cannot be read. A process that merely looks
//! like them is not found.

use crate::uapi;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::stat::Mode;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use wgsep_policy::{ThreadStatus, check_proc};

/// How long the daemon may take to have room for one more client, and its dataplane to have the listener.
const PATIENCE: Duration = Duration::from_secs(1);
/// The flag of a socket that listens, in /proc/net/unix (linux/net.h).
const SO_ACCEPTCON: u32 = 1 << 16;

/// The kernel keeps 15 bytes of a process's name.
const DATAPLANE: &str = "wgsep-dataplan";
/// What the kernel calls a process that the PID namespace of this one does not have.
const NO_NUMBER: i32 = 0;

/// The processes of a daemon.
pub(super) struct Processes {
    pub(super) helper: i32,
    pub(super) dataplane: i32,
    /// The helper itself, whose number may become another process's; before Linux 6.5 there is none.
    pub(super) pidfd: Option<OwnedFd>,
}

impl Processes {
    /// Asks the interface's socket who serves it.
    pub(super) fn find(interface: &str) -> Result<Self, String> {
        let step = format!("find the daemon of {interface}");
        let there = format!(
            "run this where the daemon is, or on the host: nsenter --target PID --pid --mount wgsep audit {interface}"
        );
        check_proc(&step, &fs::read_link("/proc/self")).map_err(|line| {
            format!("{line}; if the daemon is in another PID namespace, {there}")
        })?;
        let path = uapi::path(interface);
        let refusal = |errno| uapi::refusal(interface, errno);
        // What is looked at is what is connected to, though the name may become another file's.
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let file = File::from(open(&*path, flags, Mode::empty()).map_err(refusal)?);
        let status = file.metadata().map_err(|error| format!("{path}: {error}; run as root"))?;
        let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
        let client = uapi::connect_until(&opened, Instant::now() + PATIENCE).map_err(refusal)?;
        let (helper, pidfd) = listener(&client, &path)?;
        if helper == NO_NUMBER {
            return Err(format!(
                "{step}: it is in another PID namespace, as of another container; {there}"
            ));
        }
        let name = name(helper).map_err(|error| {
            format!("{interface} is served by process {helper}, which cannot be looked at: {error}; it has ended, or /proc hides it (hidepid=): ask again as root with CAP_SYS_PTRACE")
        })?;
        // The program may have been installed by another name.
        let has_dataplane = || children(helper).is_ok_and(|all| all.into_iter().any(is_dataplane));
        if name != "wgsep" && !has_dataplane() {
            return Err(format!(
                "{interface} is served by process {helper}, {name:?}, which is not wgsep; ask about another interface"
            ));
        }
        let owner = status.uid();
        if owner != 0 && effective_uid(helper) != Some(owner) {
            return Err(format!(
                "{path} is uid {owner}'s, and wgsep, process {helper}, runs as another user; find out who made it, remove it, and start wgsep again"
            ));
        }
        let children =
            children(helper).map_err(|error| format!("process {helper}: {error}; run as root"))?;
        // There are others where the launcher had children of its own before it executed wgsep, and where orphans
        // are adopted by the first process of a container.
        let dataplane = match (watched(helper), &children[..]) {
            (Ok(watched), _) => watched.into_iter().find(|pid| children.contains(pid)),
            (Err(_), [dataplane]) => Some(*dataplane),
            (Err(_), []) => None,
            (Err(error), _) => {
                return Err(format!(
                    "the helper {helper} has several children, and which is its dataplane cannot be read: {error}; run as root"
                ));
            }
        };
        let Some(dataplane) = dataplane else {
            return Err(format!(
                "the helper {helper} has no dataplane, or is just starting one; ask again, or see its log"
            ));
        };
        // One that is just starting receives it in a moment.
        let holds = || holds_listener(dataplane, helper, &status) != Some(false);
        let deadline = Instant::now() + PATIENCE;
        while !holds() {
            if Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
            return Err(format!(
                "the dataplane {dataplane} does not hold {path}, which another process serves, or is just starting; ask again, and else see who serves it: ss -xlp src {path}"
            ));
        }
        Ok(Self { helper, dataplane, pidfd })
    }

    /// Refuses what was read if it may be that of other processes, which have these numbers now.
    pub(super) fn check_alive(&self, interface: &str) -> Result<(), String> {
        let Self { helper, dataplane, pidfd } = self;
        let is_helper = pidfd.as_ref().is_none_or(|pidfd| is_alive(pidfd, *helper));
        if is_helper && children(*helper).is_ok_and(|children| children.contains(dataplane)) {
            return Ok(());
        }
        Err(format!("the daemon of {interface} ended while it was audited; ask again"))
    }
}

/// The process that made the socket listen.
fn listener(client: &UnixStream, path: &str) -> Result<(i32, Option<OwnedFd>), String> {
    let unnamed = |errno: Errno| format!("who serves {path}: {}; run as root", errno.desc());
    let pid = getsockopt(client, sockopt::PeerCredentials).map_err(unnamed)?.pid();
    if pid == NO_NUMBER {
        return Ok((pid, None));
    }
    let pidfd = match getsockopt(client, sockopt::PeerPidfd) {
        Err(Errno::ENOPROTOOPT) => return Ok((pid, None)),
        // Until Linux 6.15 there is none of a process that has ended.
        Err(Errno::EINVAL | Errno::ESRCH) => None,
        pidfd => Some(pidfd.map_err(unnamed)?),
    };
    let alive = pidfd.filter(|pidfd| is_alive(pidfd, pid)).ok_or_else(|| {
        format!("process {pid}, which made {path}, has ended, and another process holds it; see which, and end it: ss -xlp src {path}")
    })?;
    Ok((pid, Some(alive)))
}

/// Whether the process of a pidfd has that number and has not ended.
fn is_alive(pidfd: &OwnedFd, pid: i32) -> bool {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()));
    let mut ended = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    poll(&mut ended, PollTimeout::ZERO) == Ok(0)
        && info.is_ok_and(|info| pid_of(&info) == Some(pid))
}

fn children(pid: i32) -> io::Result<Vec<i32>> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    Ok(children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect())
}

fn effective_uid(pid: i32) -> Option<u32> {
    let status = ThreadStatus::read(Path::new(&format!("/proc/{pid}"))).ok()?;
    status.field("Uid")?.split_whitespace().nth(1)?.parse().ok()
}

/// Whether the dataplane holds a listening socket that is bound to this file; `None` if its descriptors cannot be read.
fn holds_listener(dataplane: i32, helper: i32, socket: &Metadata) -> Option<bool> {
    let entries = fs::read_dir(format!("/proc/{dataplane}/fd")).ok()?;
    let mut held = Vec::new();
    for entry in entries {
        match entry.and_then(|entry| fs::read_link(entry.path())) {
            Ok(link) => held.extend(link.to_str().and_then(inode)),
            // Closed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(_) => return None,
        }
    }
    // A socket that the launcher made may be of its network namespace.
    let tables = [format!("/proc/{helper}/net/unix"), "/proc/net/unix".to_owned()];
    let tables: Vec<_> = tables.iter().filter_map(|path| fs::read_to_string(path).ok()).collect();
    let mut bound = tables.iter().flat_map(|table| table.lines()).filter_map(listening);
    Some(bound.any(|(inode, path)| held.contains(&inode) && may_be_bound_to(path, helper, socket)))
}

/// Whether a socket that `helper` made and bound to `path` may be bound to this file. The kernel keeps that path when
/// the file is renamed: it says nothing once it names no file, or the file of a socket that another process made or that was closed.
fn may_be_bound_to(path: &str, helper: i32, socket: &Metadata) -> bool {
    let Ok(file) = fs::metadata(path) else { return true };
    if (file.dev(), file.ino()) == (socket.dev(), socket.ino()) {
        return true;
    }
    match uapi::connect_until(path, Instant::now()) {
        Ok(client) => {
            let maker = getsockopt(&client, sockopt::PeerCredentials);
            maker.is_ok_and(|maker| maker.pid() != helper)
        }
        Err(errno) => errno == Errno::ECONNREFUSED,
    }
}

/// The inode in a descriptor's link, `socket:[INODE]`.
fn inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Inode and path of a line of /proc/net/unix, if it is of a listening socket with a path.
fn listening(line: &str) -> Option<(u64, &str)> {
    let mut columns = line.split_whitespace().skip(3);
    let flags = u32::from_str_radix(columns.next()?, 16).ok()?;
    let (inode, path) = (columns.nth(2)?.parse().ok()?, columns.next()?);
    (flags & SO_ACCEPTCON != 0).then_some((inode, path))
}

/// The processes that a process holds pidfds of.
fn watched(holder: i32) -> std::io::Result<Vec<i32>> {
    let mut watched = Vec::new();
    for entry in fs::read_dir(format!("/proc/{holder}/fdinfo"))? {
        let info = fs::read_to_string(entry?.path()).unwrap_or_default();
        watched.extend(pid_of(&info));
    }
    Ok(watched)
}

/// The process of a pidfd, by its file in fdinfo.
fn pid_of(info: &str) -> Option<i32> {
    info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok())
}

fn is_dataplane(pid: i32) -> bool {
    name(pid).is_ok_and(|name| name.starts_with(DATAPLANE))
}

fn name(pid: i32) -> io::Result<String> {
    fs::read_to_string(format!("/proc/{pid}/comm")).map(|name| name.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listening_socket_has_a_line_with_inode_and_path() {
        let line = |flags: &str| {
            format!("0000000000000000: 00000002 00000000 {flags} 0001 01   417 /run/a.sock")
        };
        assert_eq!(listening(&line("00010000")), Some((417, "/run/a.sock")));
        assert_eq!(listening(&line("00000000")), None, "connected");
        assert_eq!(listening("Num       RefCount Protocol Flags    Type St Inode Path"), None);
        assert_eq!(inode("socket:[417]"), Some(417));
        assert_eq!(inode("pipe:[417]"), None);
    }

    /// As before Linux 6.5.
    #[test]
    fn without_a_pidfd_the_helper_is_known_by_its_child() {
        let mut sleep = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        // A thread's children are those that it started.
        let this = fs::read_link("/proc/thread-self").unwrap();
        let helper = this.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let dataplane = i32::try_from(sleep.id()).unwrap();
        let processes = Processes { helper, dataplane, pidfd: None };
        assert_eq!(processes.check_alive("wg0"), Ok(()));
        sleep.kill().unwrap();
        sleep.wait().unwrap();
        assert!(processes.check_alive("wg0").is_err());
    }
}
