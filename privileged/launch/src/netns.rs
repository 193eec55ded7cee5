//! Network namespaces by name, as ip-netns(8) keeps them.

use crate::{netlink, sys};
use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, setns};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use wgsep_monitor::{Error, Result, Step};

/// Where ip-netns(8) keeps one file for each.
const DIRECTORY: &str = "/run/netns";

const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
const IFLA_NET_NS_FD: u16 = 28;

/// A network namespace.
pub struct Netns {
    file: File,
    name: String,
}

impl Netns {
    /// Finds a namespace. If the name is that of a FIFO or a device, nothing is waited for.
    ///
    /// # Errors
    /// If there is none of this name, or it may not be opened.
    pub fn open(name: &str) -> Result<Self> {
        if name.is_empty() || name.starts_with('.') || name.contains('/') {
            return Err(Error::new(format!(
                "bad network namespace name {name:?}; ip netns lists them"
            )));
        }
        let mut open = OpenOptions::new();
        let open = open.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let file = open.open(format!("{DIRECTORY}/{name}")).advise(
            &format!("open network namespace {name}"),
            &[
                (
                    &[Errno::ENOENT],
                    &format!("there is no network namespace {name}; make it: ip netns add {name}"),
                ),
                (&[Errno::ENXIO], &another_file(name)),
            ],
        )?;
        Ok(Self { file, name: name.to_owned() })
    }

    /// The namespace this process is in.
    ///
    /// # Errors
    /// If /proc is missing.
    pub fn current() -> Result<Self> {
        let file = File::open("/proc/self/ns/net").advise(
            "own network namespace",
            &[(
                &[Errno::ENOENT],
                "/proc/self/ns/net is missing; mount it: mount -t proc proc /proc",
            )],
        )?;
        Ok(Self { file, name: "of the launcher".to_owned() })
    }

    /// Whether this is the namespace that an open file refers to.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn is(&self, other: &File) -> io::Result<bool> {
        let identity = |file: &File| file.metadata().map(|file| (file.dev(), file.ino()));
        Ok(identity(&self.file)? == identity(other)?)
    }

    /// The namespace that a socket is in.
    ///
    /// # Errors
    /// Without CAP_NET_ADMIN there.
    pub fn of_socket(socket: &OwnedFd) -> Result<Self> {
        let file =
            sys::netns_of_socket(socket.as_fd()).step("network namespace of the running wgsep")?;
        Ok(Self { file, name: "of the running wgsep".to_owned() })
    }

    /// Moves this process there: what it opens from now on belongs there.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN, and if it is no network namespace.
    pub fn enter(&self) -> Result<()> {
        let name = &self.name;
        setns(&self.file, CloneFlags::CLONE_NEWNET).advise(
            &format!("enter network namespace {name}"),
            &[
                (&[Errno::EPERM], &format!("no permission to enter network namespace {name}: CAP_SYS_ADMIN is missing; run as root")),
                (&[Errno::EINVAL], &another_file(name)),
            ],
        )
    }

    /// Runs `work` there, and returns to the namespace of before.
    ///
    /// # Errors
    /// As [`Self::enter`], and those of `work`.
    pub fn inside<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let home = Self::current()?;
        self.enter()?;
        let done = work();
        home.enter()?;
        done
    }

    /// The number that this one has in the namespace of this process, in rtnetlink messages; `None`
    /// if it is that itself.
    ///
    /// # Errors
    /// If the kernel gives it none.
    pub fn number(&self) -> Result<Option<i32>> {
        const STEP: &str = "number a network namespace";
        if self.is(&Self::current()?.file).step(STEP)? {
            return Ok(None);
        }
        let (this, any) = (self.file.as_raw_fd().to_ne_bytes(), (-1i32).to_ne_bytes());
        match netlink::request(RTM_NEWNSID, &[0; 4], &[(NETNSA_FD, &this), (NETNSA_NSID, &any)]) {
            Err(Errno::EEXIST) => {}
            made => drop(made.advise(STEP, &[(&[Errno::EINVAL], &another_file(&self.name))])?),
        }
        let answer = netlink::request(RTM_GETNSID, &[0; 4], &[(NETNSA_FD, &this)]).step(STEP)?;
        let attribute = answer.get(4..12).filter(|a| a[2..4] == NETNSA_NSID.to_ne_bytes());
        let number = attribute.and_then(|a| a[4..].first_chunk()).map(|n| i32::from_ne_bytes(*n));
        let none = || {
            Error::new(format!(
                "{STEP}: the kernel gave {} none; this is a bug, please report it",
                self.name
            ))
        };
        number.filter(|number| *number >= 0).map(Some).ok_or_else(none)
    }

    /// Moves an interface of the namespace of this process here, and names it.
    ///
    /// # Errors
    /// EEXIST if the name is taken here.
    pub fn take_in(&self, ifindex: u32, name: &str) -> nix::Result<()> {
        let this = self.file.as_raw_fd().to_ne_bytes();
        let name = [name.as_bytes(), &[0]].concat();
        netlink::set_link(ifindex, &[(IFLA_NET_NS_FD, &this), (libc::IFLA_IFNAME, &name)])
    }
}

fn another_file(name: &str) -> String {
    format!("{DIRECTORY}/{name} is no network namespace; remove it, then: ip netns add {name}")
}

/// The first port that any process may bind in the network namespace of this process; `None` if it cannot be
/// read, as in a unit with ProcSubset=pid.
pub fn first_unprivileged_port() -> Option<u16> {
    let first = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").ok()?;
    first.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_name_and_no_path() {
        for name in ["", ".", "..", "../proc/1/ns/net", "/proc/1/ns/net"] {
            let error = Netns::open(name).err().unwrap().to_string();
            assert!(error.starts_with("bad network namespace name"), "{error}");
        }
        let error = Netns::open("wgsep-no-such").err().unwrap().to_string();
        assert!(error.contains("ip netns add wgsep-no-such"), "{error}");
    }
}
