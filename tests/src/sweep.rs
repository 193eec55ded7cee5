//! Removing what tests leave: each namespace at its end, and those of runs that were killed.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::Once;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::daemon::SOCKETS;
use crate::netns::handle_path;

/// Namespaces of tests are called `wgsep-<pid>-<number>`.
pub(crate) const NETNS_PREFIX: &str = "wgsep-";

/// Interfaces of tests are called `wt<pid>n<number>`: at most 2 + 7 + 1 + 5 = 15 bytes.
pub(crate) const INTERFACE_PREFIX: &str = "wt";

/// Directories of tests are called after an interface of theirs.
pub(crate) const DIRECTORY_PREFIX: &str = "wgsep-tests-";

/// Removes what dead runs left, once in the life of this process.
pub(crate) fn once() {
    static SWEPT: Once = Once::new();
    SWEPT.call_once(|| {
        for name in names_in("/run/netns") {
            let owner = name.strip_prefix(NETNS_PREFIX).and_then(|rest| rest.split_once('-'));
            if owner.is_some_and(|(pid, _number)| is_dead(pid)) {
                remove_netns(&name);
            }
        }
        for name in names_in(SOCKETS) {
            if is_interface_of_the_dead(&name) {
                let _ = fs::remove_file(Path::new(SOCKETS).join(&name));
            }
        }
        for name in names_in(env::temp_dir()) {
            if name.strip_prefix(DIRECTORY_PREFIX).is_some_and(is_interface_of_the_dead) {
                let _ = fs::remove_dir_all(env::temp_dir().join(&name));
            }
        }
    });
}

/// Whether a name begins as the interfaces of a test run that is over do.
fn is_interface_of_the_dead(name: &str) -> bool {
    let owner = name.strip_prefix(INTERFACE_PREFIX).and_then(|rest| rest.split_once('n'));
    owner.is_some_and(|(pid, _number)| is_dead(pid))
}

/// Kills all that runs in a namespace and deletes it.
pub(crate) fn remove_netns(name: &str) {
    for pid in processes_in(name) {
        let _ = kill(pid, Signal::SIGKILL);
    }
    let deleted = Command::new("ip").args(["netns", "del", name]).status();
    if !deleted.is_ok_and(|status| status.success()) {
        let _ = writeln!(io::stderr(), "cannot delete the network namespace {name}");
    }
}

/// The processes whose network namespace is the named one.
fn processes_in(name: &str) -> BTreeSet<Pid> {
    let Ok(namespace) = fs::metadata(handle_path(name)) else {
        return BTreeSet::new();
    };
    let is_inside = |pid: &Pid| {
        // Following the link gives the namespace's own device and inode.
        fs::metadata(format!("/proc/{pid}/ns/net"))
            .is_ok_and(|own| (own.dev(), own.ino()) == (namespace.dev(), namespace.ino()))
    };
    let pids = names_in("/proc").into_iter().filter_map(|name| name.parse().ok());
    pids.map(Pid::from_raw).filter(is_inside).collect()
}

fn names_in(directory: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Whether `pid` is a number and no process has it.
fn is_dead(pid: &str) -> bool {
    pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()
}
