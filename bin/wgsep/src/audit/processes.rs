//! Which two processes serve an interface. The kernel names them: the process that made the socket listen, and the
//! child that it holds a pidfd of, or its only child where its descriptors cannot be read. A process that merely looks
//! like them is not found.

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket, sockopt,
};
use std::fs;
use std::os::fd::AsRawFd;

/// Where the sockets of all implementations are.
pub(super) const DIRECTORY: &str = "/var/run/wireguard";

/// The processes of a daemon.
pub(super) struct Processes {
    pub(super) helper: i32,
    pub(super) dataplane: i32,
}

impl Processes {
    /// Asks the interface's socket who serves it.
    pub(super) fn find(interface: &str) -> Result<Self, String> {
        let path = format!("{DIRECTORY}/{interface}.sock");
        let helper = listener(&path).map_err(|errno| match errno {
            nix::Error::ENOENT | nix::Error::ECONNREFUSED => {
                format!("no daemon serves {interface}: no process listens on {path}; start it: wgsep {interface}")
            }
            errno => format!("{path}: {}; run as root or as its owner", errno.desc()),
        })?;
        if name(helper) != "wgsep" {
            return Err(format!(
                "{interface} is served by process {helper}, {:?}, which is not wgsep; ask about another interface",
                name(helper)
            ));
        }
        let children = format!("/proc/{helper}/task/{helper}/children");
        let children =
            fs::read_to_string(&children).map_err(|e| format!("{children}: {e}; run as root"))?;
        let children: Vec<i32> =
            children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
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
        dataplane.map(|dataplane| Self { helper, dataplane }).ok_or_else(|| {
            format!(
                "the helper {helper} has no dataplane, or is just starting one; ask again, or see its log"
            )
        })
    }
}

fn listener(path: &str) -> nix::Result<i32> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let client = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(client.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(getsockopt(&client, sockopt::PeerCredentials)?.pid())
}

/// The processes that a process holds pidfds of.
fn watched(holder: i32) -> std::io::Result<Vec<i32>> {
    let mut watched = Vec::new();
    for entry in fs::read_dir(format!("/proc/{holder}/fdinfo"))? {
        let info = fs::read_to_string(entry?.path()).unwrap_or_default();
        let pid =
            info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<i32>().ok());
        watched.extend(pid);
    }
    Ok(watched)
}

fn name(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
}
