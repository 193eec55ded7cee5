//! What the descriptors of a process are, by kind; and descriptors that a child is given.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::unistd::Pid;

use crate::procfs;

/// Leaves a descriptor open in the program of a command, and returns its number there.
///
/// The child clears its own close-on-exec flag: were it cleared in this process, children that other tests start
/// meanwhile would inherit the descriptor too.
///
/// # Panics
///
/// When it cannot be duplicated.
#[track_caller]
pub fn give(command: &mut Command, descriptor: impl AsFd) -> RawFd {
    // The command has a duplicate to itself, however long it is kept.
    let given = match descriptor.as_fd().try_clone_to_owned() {
        Ok(given) => given,
        Err(error) => panic!("cannot duplicate a descriptor: {error}"),
    };
    let number = given.as_raw_fd();
    let keep = move || match fcntl(&given, FcntlArg::F_SETFD(FdFlag::empty())) {
        Ok(_) => Ok(()),
        Err(errno) => Err(io::Error::from(errno)),
    };
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are allowed: it makes one
    // bare system call on what it owns, and allocates nothing.
    unsafe {
        command.pre_exec(keep);
    }
    number
}

/// The kind of each descriptor of a process: a short name, or the kernel's own where it is nothing that
/// a daemon has. `netns_of` is a process in the network namespace that its sockets were made in.
///
/// # Panics
///
/// When the kernel does not show it.
#[track_caller]
#[must_use]
pub fn kinds(process: Pid, netns_of: Pid) -> BTreeMap<i32, String> {
    let sockets = sockets_seen_by(netns_of);
    let kinds = procfs::descriptors(process).into_iter();
    kinds.map(|(number, target)| (number, kind(process, &sockets, &target))).collect()
}

/// How many descriptors of each kind there are; 0, 1 and 2 apart, which are the launcher's or null.
#[track_caller]
#[must_use]
pub fn count(process: Pid, netns_of: Pid) -> BTreeMap<String, usize> {
    let mut held = BTreeMap::new();
    for (_, kind) in kinds(process, netns_of).into_iter().filter(|(number, _)| *number > 2) {
        *held.entry(kind).or_default() += 1;
    }
    held
}

fn kind(pid: Pid, sockets: &BTreeMap<String, String>, target: &str) -> String {
    if let Some(inode) = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) {
        return sockets.get(inode).cloned().unwrap_or_else(|| format!("unknown socket of {pid}"));
    }
    let names = [
        ("/dev/net/tun", "tun"),
        ("/dev/null", "null"),
        ("anon_inode:[eventpoll]", "epoll"),
        ("anon_inode:[timerfd]", "timer"),
        ("anon_inode:[eventfd]", "event"),
        ("anon_inode:[pidfd]", "pidfd"),
        ("anon_inode:[signalfd]", "signalfd"),
        ("anon_inode:inotify", "inotify"),
    ];
    let known = names.into_iter().find(|(name, _)| *name == target).map(|(_, kind)| kind);
    let prefixes = [("pipe:[", "pipe"), ("/secretmem", "secret memory"), ("pidfd:[", "pidfd")];
    let prefixed = prefixes.into_iter().find(|(name, _)| target.starts_with(name));
    known.or(prefixed.map(|(_, kind)| kind)).unwrap_or(target).to_owned()
}

/// The sockets that exist in a process's network namespace, by inode.
#[track_caller]
fn sockets_seen_by(pid: Pid) -> BTreeMap<String, String> {
    // The column of the inode in each table, counted from 0.
    let tables = [("udp", 9), ("udp6", 9), ("unix", 6), ("netlink", 9), ("raw", 9), ("tcp", 9)];
    let mut found = BTreeMap::new();
    for (table, column) in tables {
        let path = format!("/proc/{pid}/net/{table}");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) => panic!("cannot read {path}: {error}"),
        };
        for line in text.lines().skip(1) {
            let columns: Vec<_> = line.split_whitespace().collect();
            let (Some(inode), Some(fifth)) = (columns.get(column), columns.get(4)) else {
                continue;
            };
            // A unix socket's type is its fifth column: 1 stream, 2 datagram, 5 packets.
            let kind = match (table, *fifth) {
                ("unix", "0005") => "helper's socket",
                ("unix", "0001") if line.ends_with(".status") => "status socket",
                ("unix", "0001") if line.ends_with(".psk") => "psk socket",
                ("unix", "0001") => "UAPI socket",
                ("unix", _) => "unix datagram socket",
                (other, _) => other,
            };
            found.insert((*inode).to_owned(), kind.to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{output, run};
    use std::fs::File;

    #[test]
    fn a_descriptor_is_given_to_one_child_and_no_other() {
        let Ok(file) = File::open("/dev/full") else { panic!("no /dev/full") };
        let mut given = Command::new("readlink");
        let number = give(&mut given, &file);
        let path = format!("/proc/self/fd/{number}");
        assert_eq!(run(given.arg(&path)), "/dev/full\n");
        let other = output(Command::new("readlink").arg(&path));
        assert!(!other.status.success(), "{other:?}");
    }
}
