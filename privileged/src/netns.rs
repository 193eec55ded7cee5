//! Network namespaces by name, as ip-netns(8) keeps them.

use crate::error::{Error, Result, Step};
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use nix::sys::stat::{Mode, fstat, stat};
use std::os::fd::{AsRawFd, OwnedFd};

/// Where ip-netns(8) keeps one file for each.
const DIRECTORY: &str = "/run/netns";

const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
const IFLA_NET_NS_FD: u16 = 28;

/// A network namespace.
pub struct Netns {
    handle: OwnedFd,
    name: String,
}

impl Netns {
    /// Finds a namespace.
    ///
    /// # Errors
    /// If there is none of this name, or it may not be opened.
    pub fn open(name: &str) -> Result<Self> {
        if name.is_empty() || name.starts_with('.') || name.contains('/') {
            return Err(Error::new(format!(
                "bad network namespace name {name:?}; ip netns lists them"
            )));
        }
        let path = format!("{DIRECTORY}/{name}");
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let opened = open(path.as_str(), flags, Mode::empty());
        let handle = opened.map_err(|errno| match errno {
            nix::Error::ENOENT => Error::new(format!(
                "there is no network namespace {name}; make it: ip netns add {name}"
            )),
            errno => Error::call(&format!("open network namespace {name}"), errno),
        })?;
        Ok(Self { handle, name: name.to_owned() })
    }

    /// The namespace this process is in.
    ///
    /// # Errors
    /// If /proc is missing.
    pub fn current() -> Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let handle =
            open("/proc/self/ns/net", flags, Mode::empty()).step("own network namespace")?;
        Ok(Self { handle, name: "of the launcher".to_owned() })
    }

    /// Moves this process there: what it opens from now on belongs there.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN, and if it is no network namespace.
    pub fn enter(&self) -> Result<()> {
        let name = &self.name;
        setns(&self.handle, CloneFlags::CLONE_NEWNET).map_err(|errno| match errno {
            nix::Error::EPERM => Error::new(format!(
                "no permission to enter network namespace {name}: CAP_SYS_ADMIN is missing; run as root"
            )),
            nix::Error::EINVAL => {
                Error::new(format!("{DIRECTORY}/{name} is no network namespace; remove it, then: ip netns add {name}"))
            }
            errno => Error::call(&format!("enter network namespace {name}"), errno),
        })
    }

    /// Runs `work` there, and comes back.
    ///
    /// # Errors
    /// As [`Self::enter`], and those of `work`.
    pub fn inside<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let home = Self::current()?;
        self.enter()?;
        let done = work();
        setns(&home.handle, CloneFlags::CLONE_NEWNET).step("return from a network namespace")?;
        done
    }

    /// The number by which the namespace of this process knows this one in rtnetlink messages; `None`
    /// if it is that itself.
    ///
    /// # Errors
    /// If the kernel gives it none.
    pub fn number(&self) -> Result<Option<i32>> {
        const STEP: &str = "number a network namespace";
        let own = stat("/proc/self/ns/net").step(STEP)?;
        let this = fstat(&self.handle).step(STEP)?;
        if (own.st_dev, own.st_ino) == (this.st_dev, this.st_ino) {
            return Ok(None);
        }
        let handle = (NETNSA_FD, self.handle.as_raw_fd().to_ne_bytes());
        let any = (NETNSA_NSID, (-1i32).to_ne_bytes());
        match ask(RTM_NEWNSID, &[0; 4], &[(handle.0, &handle.1), (any.0, &any.1)]) {
            Ok(_) | Err(nix::Error::EEXIST) => {}
            Err(errno) => return Err(Error::call(STEP, errno)),
        }
        let answer = ask(RTM_GETNSID, &[0; 4], &[(handle.0, &handle.1)]).step(STEP)?;
        let attribute = answer.get(4..12).filter(|a| a[2..4] == NETNSA_NSID.to_ne_bytes());
        let number = attribute.and_then(|a| a[4..].first_chunk()).map(|n| i32::from_ne_bytes(*n));
        number.filter(|number| *number >= 0).map(Some).ok_or_else(|| {
            Error::new(format!(
                "{STEP}: the kernel gave {} none; this is a fault, please report it",
                self.name
            ))
        })
    }

    /// Moves an interface of the namespace of this process here, and names it.
    ///
    /// # Errors
    /// EEXIST if the name is taken here.
    pub fn take_in(&self, ifindex: u32, name: &str) -> nix::Result<()> {
        let mut fixed = [0; 16];
        fixed[4..8].copy_from_slice(&ifindex.to_ne_bytes());
        let handle = self.handle.as_raw_fd().to_ne_bytes();
        let name = [name.as_bytes(), &[0]].concat();
        let attributes = [(IFLA_NET_NS_FD, &handle[..]), (libc::IFLA_IFNAME, &name)];
        ask(libc::RTM_SETLINK, &fixed, &attributes).map(drop)
    }
}

/// Sends one rtnetlink request: a fixed header and attributes. Returns the answer after its own
/// netlink header, or the error that it is.
fn ask(kind: u16, fixed: &[u8], attributes: &[(u16, &[u8])]) -> nix::Result<Vec<u8>> {
    const HEADER: usize = 16;
    let mut request = vec![0; HEADER];
    request.extend_from_slice(fixed);
    for (attribute, value) in attributes {
        request.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
        request.extend_from_slice(&attribute.to_ne_bytes());
        request.extend_from_slice(value);
        request.resize(request.len().next_multiple_of(4), 0);
    }
    let len = request.len() as u32;
    let ack = if kind == RTM_GETNSID { 0 } else { libc::NLM_F_ACK };
    request[..4].copy_from_slice(&len.to_ne_bytes());
    request[4..6].copy_from_slice(&kind.to_ne_bytes());
    request[6..8].copy_from_slice(&((libc::NLM_F_REQUEST | ack) as u16).to_ne_bytes());

    let flags = SockFlag::SOCK_CLOEXEC;
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    send(netlink.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut answer = vec![0; 4096];
    let len = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    answer.truncate(len);
    let is_error = answer.get(4..6) == Some(&(libc::NLMSG_ERROR as u16).to_ne_bytes());
    let body = answer.split_off(HEADER.min(len));
    match body.first_chunk().map(|errno| i32::from_ne_bytes(*errno)) {
        Some(errno) if is_error && errno != 0 => Err(nix::Error::from_raw(-errno)),
        _ => Ok(body),
    }
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
