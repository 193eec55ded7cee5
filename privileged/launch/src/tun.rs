//! The TUN device.

use crate::autoconf;
use crate::netlink;
use crate::netns::Netns;
use crate::notify_socket::{self, Store};
use crate::{Offload, Options, sys};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::unistd::write;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};
use wgsep_ipc::TunOffload;
use wgsep_journal::{Level, ServiceManager};
use wgsep_monitor::{Error, Result, Step};
use wgsep_policy::{Capability, capabilities, filters};

const DEVICE: &str = "/dev/net/tun";
/// Longest interface name, in bytes.
const MAX_NAME_LEN: usize = libc::IFNAMSIZ - 1;
/// Queues that the kernel spreads the machine's flows over. A flow that fills its own waits there, and
/// those of the other queues pass it.
const FLOW_QUEUES: usize = 16;
/// Of the interface at its birth: what fits into 1500 with IPv6 outside.
const DEFAULT_MTU: u32 = 1420;
/// TCP's longest super-packet, in bytes, so that it fits into one send of as many datagrams: with the
/// MTU of 1420, 45 segments of 1452 bytes.
const GSO_MAX_SIZE: u32 = 62_000;
const IFLA_GSO_MAX_SIZE: u16 = 41;
/// How long the kernel may take to remove the interface of a daemon that was killed.
const REMOVAL: Duration = Duration::from_secs(1);
/// Length of the struct virtio_net_hdr before each packet; the kernel's own choice for a new interface.
const VNET_HDR_LEN: libc::c_int = 10;
/// Temporary name of an interface until it is moved to the namespace where its own name is free.
const TEMP_NAME: &str = "wgsep%d";

/// The interface.
pub struct TunDevice {
    /// Where its packets are written, and read if there are no flow queues.
    queue: OwnedFd,
    /// Where its packets are read. It goes when all its queues are closed everywhere.
    flow_queues: Vec<OwnedFd>,
    /// Its real name.
    pub name: String,
    /// Its index, in the network namespace it was made in.
    pub ifindex: u32,
    /// What its queues do besides single packets.
    pub offload: TunOffload,
    /// Whether it is that of a daemon that crashed.
    pub is_restored: bool,
    /// Lines of the log: what the kernel still does on it by itself, and what became of stored queues.
    pub notes: Vec<(Level, String)>,
}

/// Checks a name as an operator typed it.
///
/// # Errors
/// If the kernel would refuse it, or it could not be the name of a socket file.
pub fn check_name(name: &str) -> Result<()> {
    let bad = |why: &str| {
        Err(Error::new(format!("bad interface name {name:?}: {why}; choose one such as wg0")))
    };
    if name.is_empty() || name.len() > MAX_NAME_LEN {
        return bad("it must have 1 to 15 bytes");
    }
    if name == "." || name == ".." {
        return bad("it names a directory");
    }
    if name == "all" || name == "default" {
        return bad("the kernel keeps it for settings of all interfaces");
    }
    if let Some(odd) =
        name.chars().find(|c| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':'))
    {
        return bad(&format!("{odd:?} is not allowed"));
    }
    if name.contains('%') && (name.matches('%').count() > 1 || !name.contains("%d")) {
        return bad("the only use of % is one %d, for the first free number");
    }
    Ok(())
}

impl TunDevice {
    /// Has the interface that an operator asks for: `adopted` (WG_TUN_FD); or that of a daemon that crashed, whose
    /// queues the service manager has stored; or a new one where it is to be. The number of its network
    /// namespace in that of the UDP sockets, in which this process is from now on; `None` if they are the same.
    ///
    /// # Errors
    /// If it cannot be had, or a namespace cannot be entered.
    pub fn open(
        options: &Options,
        adopted: Option<OwnedFd>,
        store: Store,
        manager: &ServiceManager,
    ) -> Result<(Self, Option<i32>)> {
        let Options { interface, without, tun_netns, socket_netns, .. } = options;
        let adopt = |queue| Self::adopt(queue, Vec::new(), "WG_TUN_FD", without);
        let adopted = adopted.map(adopt).transpose()?;
        let netns = match tun_netns {
            Some(_) if adopted.is_some() => {
                return Err(Error::new(
                    "--tun-netns does not go with WG_TUN_FD; leave one of them out",
                ));
            }
            Some(name) => {
                let netns = Netns::open(name)?;
                // Before anything is done to it: CAP_NET_ADMIN suffices to number a namespace and to move
                // an interface into it, but not to come after.
                netns.inside(|| Ok(()))?;
                netns
            }
            None => Netns::current()?,
        };
        if let Some(name) = socket_netns {
            // For good: UDP sockets are opened later, too.
            Netns::open(name)?.enter()?;
        }
        let number = netns.number()?;
        let (is_new, mut notes) = (adopted.is_none(), Vec::new());
        if !store.queues.is_empty() {
            let restore = || Self::restore(store.queues, &netns, options);
            let restored = match number {
                _ if !is_new => {
                    Err(Error::new("WG_TUN_FD is set; unset it to keep that interface"))
                }
                None => restore(),
                Some(_) => netns.inside(restore),
            };
            match restored {
                Ok(device) => return Ok((device, number)),
                Err(error) => notes.push((
                    Level::Warn,
                    format!("the interface that the service manager stored is given up: {error}"),
                )),
            }
            // With its last queue the interface goes, and leaves its name.
            manager.remove_queues();
        }
        let device = match (adopted, number) {
            (Some(device), _) => device,
            (None, None) => Self::create(interface, without)?,
            (None, Some(_)) => Self::create_in(&netns, interface, without)?,
        };
        let switch_off = || Ok(autoconf::switch_off(&device.name, device.ifindex));
        let not_switched_off = match number {
            None => switch_off()?,
            Some(_) => netns.inside(switch_off)?,
        };
        notes.extend(not_switched_off.map(|line| (Level::Debug, line)));
        if is_new {
            let queues: Vec<_> = device.queues().map(AsRawFd::as_raw_fd).collect();
            let not_stored = notify_socket::store(manager, store.capacity, &queues);
            notes.extend(not_stored.map(|line| (Level::Warn, line)));
        }
        Ok((Self { notes, ..device }, number))
    }

    /// Takes over the interface of a daemon that crashed, as it is, by the queues that it had: a single one, or
    /// those that are read and one that is detached. If some of the former were not stored, the kernel has
    /// removed them.
    ///
    /// # Errors
    /// If these are not such queues, or of another interface than is asked for.
    fn restore(stored: Vec<OwnedFd>, netns: &Netns, options: &Options) -> Result<Self> {
        const LABEL: &str = "a stored queue";
        let (mut flow_queues, mut detached) = (Vec::new(), Vec::new());
        for queue in stored {
            let (name, flags) = identity(&queue, LABEL)?;
            let is_here = netns.is(&sys::tun_netns(queue.as_fd()).step(LABEL)?).step(LABEL)?;
            if !is_here || !(options.interface == name || options.interface.contains('%')) {
                return Err(Error::new(format!(
                    "{LABEL} is of {name}, which was renamed or moved to another network namespace; start wgsep with its name and --tun-netns to keep it"
                )));
            }
            let is_read = flags & libc::IFF_DETACH_QUEUE == 0;
            if is_read { &mut flow_queues } else { &mut detached }.push(queue);
        }
        let (written, read) = (detached.len(), flow_queues.len());
        let queue = match (written, read) {
            (0, 1) => flow_queues.pop(),
            (1, 1..=FLOW_QUEUES) => detached.pop(),
            _ => None,
        };
        let queue = queue.ok_or_else(|| {
            Error::new(format!(
                "{written} stored queues are detached and {read} are not; wgsep has one and up to {FLOW_QUEUES}"
            ))
        })?;
        let mut device = Self::adopt(queue, flow_queues, LABEL, &options.without)?;
        device.is_restored = true;
        device.notes.push((
            Level::Info,
            format!(
                "took over the interface as it was, with {} queues that the service manager stored",
                written + read
            ),
        ));
        Ok(device)
    }

    /// Creates the interface, which goes when its queues are closed.
    ///
    /// # Errors
    /// If there is no /dev/net/tun, no permission, or the name is taken.
    fn create(name: &str, without: &[Offload]) -> Result<Self> {
        let queue = open_device()?;
        let unless = |offload, flag| if without.contains(&offload) { 0 } else { flag };
        let header = unless(Offload::VnetHdr, libc::IFF_VNET_HDR);
        let queues = unless(Offload::FlowQueues, libc::IFF_MULTI_QUEUE);
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | header | queues;
        let name = attach_new(queue.as_fd(), name, flags).advise(
            &format!("create interface {name}"),
            &[
                (&TAKEN, &name_taken(name)),
                (&[Errno::ENOTTY, Errno::EOPNOTSUPP], &another_file()),
                (&[Errno::EPERM], &format!("no permission to create interface {name}; {}", if capabilities::has(Capability::CAP_NET_ADMIN) {
                    "a filter of system calls refuses ioctl(2), or CAP_NET_ADMIN is not of this network namespace; allow it in the container or unit"
                } else {
                    NO_NET_ADMIN
                })),
            ],
        )?;
        // Without it, an address is generated only after a move.
        let _kernels_choice = sys::set_link_type(queue.as_fd(), autoconf::LINK_TYPE);
        let mut device = Self::of(queue, name);
        let set_up = device.set_up(flags, without);
        set_up.map_err(|error| device.deleted_or(error)).map(|()| device)
    }

    /// Sets up an interface that was just created with these flags.
    fn set_up(&mut self, flags: libc::c_int, without: &[Offload]) -> Result<()> {
        self.identify(flags, without)?;
        if flags & libc::IFF_MULTI_QUEUE != 0 {
            self.add_flow_queues(flags)?;
        }
        let set = |attribute, value: u32| {
            netlink::set_link(self.ifindex, &[(attribute, &value.to_ne_bytes())])
        };
        set(libc::IFLA_MTU, DEFAULT_MTU).step("set the MTU")?;
        // Where the kernel refuses, such a packet takes two sends.
        let _slower = set(IFLA_GSO_MAX_SIZE, GSO_MAX_SIZE);
        Ok(())
    }

    /// The orderly end if the interface was deleted meanwhile, which is the cause of `error`; otherwise `error`.
    fn deleted_or(&self, error: Error) -> Error {
        match sys::tun_identity(self.queue.as_fd()) {
            Err(Errno::EBADFD) => Error {
                line: "ended: the interface was deleted, before the dataplane was ready".to_owned(),
                status: 0,
            },
            _ => error,
        }
    }

    /// Creates the interface in another network namespace. It is made here and moved there: the
    /// descriptor of a device would keep the namespace alive that it was opened in.
    ///
    /// # Errors
    /// As [`Self::create`].
    fn create_in(netns: &Netns, name: &str, without: &[Offload]) -> Result<Self> {
        let mut made = Self::create(TEMP_NAME, without)?;
        let moved = made.move_to(netns, name);
        moved.map_err(|error| made.deleted_or(error)).map(|()| made)
    }

    fn move_to(&mut self, netns: &Netns, name: &str) -> Result<()> {
        let step = format!("move interface {name} to its namespace");
        netns.take_in(self.ifindex, name).advise(&step, &[(&TAKEN, &name_taken(name))])?;
        (self.name, _) = sys::tun_identity(self.queue.as_fd()).step("name of the interface")?;
        self.ifindex = netns.inside(|| index_of(&self.name))?;
        Ok(())
    }

    /// Takes over an interface by a queue that was opened before this process: WG_TUN_FD, or as `label` says; and by
    /// those that are read instead of it, if any.
    ///
    /// # Errors
    /// If the descriptor is no TUN queue, not open for reading and writing, or never has a packet to read.
    fn adopt(
        queue: OwnedFd,
        flow_queues: Vec<OwnedFd>,
        label: &str,
        without: &[Offload],
    ) -> Result<Self> {
        let (name, flags) = identity(&queue, label)?;
        if flow_queues.is_empty() && flags & libc::IFF_DETACH_QUEUE != 0 {
            return Err(Error::new(format!(
                "{label} is a detached queue of {name}, which the kernel gives no packets; attach it (TUNSETQUEUE with IFF_ATTACH_QUEUE), or hand over one that is attached"
            )));
        }
        let vnet_hdr = flags & libc::IFF_VNET_HDR != 0;
        if vnet_hdr {
            // It may have been set up for longer headers, and for more than is wanted.
            sys::set_vnet_header_len(queue.as_fd(), VNET_HDR_LEN)
                .step(&format!("set the length of virtio_net_hdr of {label}"))?;
            let none = sys::set_offload(queue.as_fd(), 0);
            none.step(&format!("take back the offloads of {label}"))?;
        }
        let mut device = Self { flow_queues, ..Self::of(queue, name) };
        device.identify(flags, without)?;
        if has_packet_information(device.queue.as_fd(), vnet_hdr) {
            return Err(other_flags(label));
        }
        Ok(device)
    }

    /// A device of which no more than this is known.
    fn of(queue: OwnedFd, name: String) -> Self {
        let (flow_queues, offload) = (Vec::new(), TunOffload::default());
        let (is_restored, notes) = (false, Vec::new());
        Self { queue, flow_queues, name, ifindex: 0, offload, is_restored, notes }
    }

    fn identify(&mut self, flags: libc::c_int, without: &[Offload]) -> Result<()> {
        self.ifindex = index_of(&self.name)?;
        if flags & libc::IFF_VNET_HDR != 0 {
            self.offload = set_offload(self.queue.as_fd(), without);
        }
        Ok(())
    }

    /// Adds queues to read, as many as the kernel gives, and keeps the first for writing only. Once it is detached,
    /// writing to it no longer makes the kernel put the packets of the opposite direction into one queue (tun.c,
    /// tun_flow_update). Where the kernel refuses to detach it, it stays the only one.
    fn add_flow_queues(&mut self, flags: libc::c_int) -> Result<()> {
        for _ in 0..FLOW_QUEUES {
            let queue = open_device()?;
            if sys::attach_tun(queue.as_fd(), &self.name, flags).is_err() {
                break;
            }
            self.flow_queues.push(queue);
        }
        if !self.flow_queues.is_empty() && sys::detach_tun(self.queue.as_fd()).is_err() {
            self.flow_queues.clear();
        }
        Ok(())
    }

    fn queues(&self) -> impl Iterator<Item = &OwnedFd> {
        [&self.queue].into_iter().chain(&self.flow_queues)
    }

    /// Moves its queues as the function [`out_of_reach`] does.
    ///
    /// # Errors
    /// As that.
    pub fn out_of_reach(self) -> Result<Self> {
        let flow_queues = self.flow_queues.into_iter().map(out_of_reach).collect::<Result<_>>()?;
        Ok(Self { queue: out_of_reach(self.queue)?, flow_queues, ..self })
    }

    /// All its queues, as the dataplane expects them.
    pub fn into_queues(self) -> Vec<OwnedFd> {
        [vec![self.queue], self.flow_queues].into_iter().flatten().collect()
    }

    /// What its queues should do and do not, for the log.
    pub fn missing(&self) -> Option<Offload> {
        let TunOffload { vnet_hdr, tso, uso } = self.offload;
        // In the order of the enum, whose first four are those of a queue: a later one needs the first.
        let has = [vnet_hdr, tso, uso, !self.flow_queues.is_empty()];
        Offload::ALL.into_iter().zip(has).find(|(_, has)| !has).map(|(offload, _)| offload)
    }
}

/// Creates the interface that a queue is to be of. While there is another one of that name, tries again
/// for a second: its daemon may have been killed, and the kernel be removing it.
fn attach_new(queue: BorrowedFd<'_>, name: &str, flags: libc::c_int) -> nix::Result<String> {
    let began = Instant::now();
    loop {
        match sys::attach_tun(queue, name, flags | libc::IFF_TUN_EXCL) {
            Err(Errno::EBUSY) if began.elapsed() < REMOVAL => sys::pause(Duration::from_millis(5)),
            outcome => return outcome,
        }
    }
}

/// Name and flags of the interface of a TUN queue that was opened before this process, which no longer blocks.
fn identity(queue: &OwnedFd, label: &str) -> Result<(String, libc::c_int)> {
    let (name, flags) = sys::tun_identity(queue.as_fd()).advise(
        &format!("identify {label}"),
        &[
            (&[Errno::EBADFD], &format!("{label} is a queue of no interface: that was deleted, or the queue was never attached to one (TUNSETIFF); hand over one that is")),
            (&[Errno::ENOTTY, Errno::EINVAL, Errno::EBADF], &format!("{label} is not a TUN device; hand over a descriptor of /dev/net/tun that is attached to an interface")),
        ],
    )?;
    if flags & libc::IFF_TUN == 0 {
        return Err(other_flags(label));
    }
    let mode = fcntl(queue, FcntlArg::F_GETFL).step(label)? & libc::O_ACCMODE;
    if mode != libc::O_RDWR {
        return Err(Error::new(format!(
            "{label} is open for reading or for writing alone; open it with O_RDWR"
        )));
    }
    fcntl(queue, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).step(label)?;
    Ok((name, flags))
}

fn other_flags(label: &str) -> Error {
    Error::new(format!("{label} is opened with other flags; open it with IFF_TUN and IFF_NO_PI"))
}

/// By a socket of this process: if_nametoindex(3) hides why it has none.
fn index_of(name: &str) -> Result<u32> {
    const STEP: &str = "index of the interface";
    let socket = UnixDatagram::unbound().step(STEP)?;
    sys::interface_index(name, socket.as_fd()).advise(
        STEP,
        &[(
            &[Errno::ENODEV],
            &format!(
                "interface {name} is not in this network namespace; start wgsep in the namespace of WG_TUN_FD"
            ),
        )],
    )
}

/// Moves a queue to a number at which this process can neither read nor write it once it is locked down. What is opened
/// later has the numbers below.
///
/// # Errors
/// As fcntl(2).
pub fn out_of_reach(queue: OwnedFd) -> Result<OwnedFd> {
    let moved = fcntl(queue, FcntlArg::F_DUPFD_CLOEXEC(filters::FIRST_QUEUE.cast_signed()));
    moved.and_then(sys::take_descriptor).step("move a TUN queue")
}

const NO_NET_ADMIN: &str = "CAP_NET_ADMIN is missing; run as root, in a container or unit that has it (--cap-add NET_ADMIN); or, as another user: setcap cap_net_admin+ep wgsep";
/// What the kernel says where a name is in use.
const TAKEN: [Errno; 3] = [Errno::EBUSY, Errno::EINVAL, Errno::EEXIST];

fn name_taken(name: &str) -> String {
    format!(
        "interface {name} already exists, or is another name of one (ip link show {name}); choose another name, or delete it if it is not in use"
    )
}

/// Whether a packet of this queue begins with `struct tun_pi`, i.e. it was opened without IFF_NO_PI.
/// TUNGETIFF does not show it, because the kernel sets the same bit as IFF_NOFILTER (tun.c). So this writes
/// one byte of an IPv4 packet after the headers that the queue should have. With the longer headers it
/// would be too short (EINVAL); otherwise the interface is down (EIO), or IP drops it as truncated.
fn has_packet_information(queue: BorrowedFd<'_>, vnet_hdr: bool) -> bool {
    const FIRST_BYTE: u8 = 0x45;
    let mut packet = vec![0; if vnet_hdr { VNET_HDR_LEN as usize } else { 0 }];
    packet.push(FIRST_BYTE);
    write(queue, &packet) == Err(Errno::EINVAL)
}

/// Has the kernel exchange super-packets where it can: UDP's since Linux 6.2.
fn set_offload(queue: BorrowedFd<'_>, without: &[Offload]) -> TunOffload {
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    let has = |offload, bits| !without.contains(&offload) && sys::set_offload(queue, bits).is_ok();
    let tso = has(Offload::Tso, tcp);
    let uso = tso && has(Offload::Uso, tcp | udp);
    TunOffload { vnet_hdr: true, tso, uso }
}

/// What is said of something else in the place of the device.
fn another_file() -> String {
    format!(
        "{DEVICE} is another file or device; make it anew: rm -r {DEVICE}; mknod {DEVICE} c 10 200"
    )
}

fn open_device() -> Result<OwnedFd> {
    let mut open = OpenOptions::new();
    let opened = open.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE);
    let is_admin = capabilities::has(Capability::CAP_NET_ADMIN);
    let device = opened.advise(
        &format!("open {DEVICE}"),
        &[
            (
                &[Errno::ENOENT, Errno::ENXIO, Errno::ENODEV],
                &format!("{DEVICE} is missing; load it: modprobe tun (in a container, pass the device in)"),
            ),
            (&[Errno::EISDIR, Errno::ELOOP, Errno::ENOTDIR], &another_file()),
            (
                &[Errno::EACCES, Errno::EPERM],
                &format!(
                    "no permission to open {DEVICE}; {}",
                    if is_admin {
                        "allow this user to open the device: its mode, a mount without nodev, DeviceAllow= of a unit, --device of a container"
                    } else {
                        NO_NET_ADMIN
                    }
                ),
            ),
        ],
    );
    device.map(OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_not_be_interfaces_or_files_are_refused() {
        for good in ["wg0", "a", "abcdefghijklmno", "wg%d", "wg-home.1", "ünï"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "abcdefghijklmnop",
            ".",
            "..",
            "all",
            "default",
            "a/b",
            "../x",
            "a b",
            "a\tb",
            "a\nb",
            "a:b",
            "%",
            "%s",
            "%d%d",
            "\0",
        ] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
