//! The system calls that no safe crate offers. All the unsafe code of this crate is here.

use nix::errno::Errno;
use nix::libc::{self, c_int};
use nix::sys::signal::{SigHandler, Signal};
use nix::unistd::{ForkResult, Pid};
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

nix::ioctl_write_ptr_bad!(tunsetiff, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_read_bad!(tungetiff, libc::TUNGETIFF, libc::ifreq);
nix::ioctl_readwrite_bad!(siocgifindex, libc::SIOCGIFINDEX, libc::ifreq);
nix::ioctl_write_ptr_bad!(tunsetvnethdrsz, libc::TUNSETVNETHDRSZ, c_int);
nix::ioctl_write_ptr_bad!(tunsetqueue, libc::TUNSETQUEUE, libc::ifreq);
nix::ioctl_write_int_bad!(tunsetoffload, libc::TUNSETOFFLOAD);
nix::ioctl_write_int_bad!(tunsetlink, libc::TUNSETLINK);
// TUNGETDEVNETNS of linux/if_tun.h.
nix::ioctl_none!(tungetdevnetns, b'T', 227);
// TIOCGDEV of asm-generic/ioctls.h.
nix::ioctl_read!(tiocgdev, b'T', 0x32, libc::c_uint);

/// Calls without an error in their manuals, and getrandom(2), without which no key is safe; each with
/// arguments that change nothing but the umask, which is set at the start in any case.
pub(crate) const INFALLIBLE: [(&str, [libc::c_long; 4]); 6] = [
    ("geteuid", [libc::SYS_geteuid, 0, 0, 0]),
    ("getegid", [libc::SYS_getegid, 0, 0, 0]),
    ("getpid", [libc::SYS_getpid, 0, 0, 0]),
    ("getppid", [libc::SYS_getppid, 0, 0, 0]),
    ("umask", [libc::SYS_umask, 0o077, 0, 0]),
    ("getrandom", [libc::SYS_getrandom, 0, 0, libc::GRND_INSECURE as libc::c_long]),
];

/// Makes a system call of plain integers.
pub(crate) fn try_call([call, first, second, third]: [libc::c_long; 4]) -> nix::Result<()> {
    // SAFETY: none of the calls of the table reads or writes memory: a length of 0 goes with the pointer.
    Errno::result(unsafe { libc::syscall(call, first, second, third) }).map(drop)
}

/// The index of an interface of this process's network namespace.
pub(crate) fn interface_index(name: &str, socket: BorrowedFd<'_>) -> nix::Result<u32> {
    let mut request = request(name.as_bytes());
    // SAFETY: the request is live; SIOCGIFINDEX reads its name and writes the index.
    unsafe { siocgifindex(socket.as_raw_fd(), &raw mut request) }?;
    // SAFETY: SIOCGIFINDEX wrote the index, a plain integer.
    let index = unsafe { request.ifr_ifru.ifru_ifindex };
    u32::try_from(index).map_err(|_| Errno::EPROTO)
}

fn request(name: &[u8]) -> libc::ifreq {
    // SAFETY: an all-zero ifreq is a valid one: an empty name, flags 0.
    let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.iter().take(libc::IFNAMSIZ - 1)) {
        *place = libc::c_char::from_ne_bytes([*byte]);
    }
    request
}

fn name_of(request: &libc::ifreq) -> String {
    let name = request.ifr_name.map(|byte| byte.to_ne_bytes()[0]);
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

/// Makes an open /dev/net/tun a queue of the interface `name`, which may be a template such as
/// `wg%d`; returns the interface's real name.
pub(crate) fn attach_tun(tun: BorrowedFd<'_>, name: &str, flags: c_int) -> nix::Result<String> {
    let mut request = request(name.as_bytes());
    request.ifr_ifru.ifru_flags = u16::try_from(flags).unwrap_or(0).cast_signed();
    // SAFETY: the request is live; TUNSETIFF reads it and writes the real name back into it.
    unsafe { tunsetiff(tun.as_raw_fd(), &raw mut request) }?;
    Ok(name_of(&request))
}

/// Has an interface give nothing to a queue any more, which may still be written to.
pub(crate) fn detach_tun(tun: BorrowedFd<'_>) -> nix::Result<()> {
    let mut request = request(b"");
    request.ifr_ifru.ifru_flags = libc::IFF_DETACH_QUEUE as libc::c_short;
    // SAFETY: the request is live; TUNSETQUEUE reads it.
    unsafe { tunsetqueue(tun.as_raw_fd(), &raw const request) }.map(drop)
}

/// Name and flags of the interface that a TUN queue belongs to.
pub(crate) fn tun_identity(tun: BorrowedFd<'_>) -> nix::Result<(String, c_int)> {
    let mut request = request(b"");
    // SAFETY: the request is live; TUNGETIFF writes it.
    unsafe { tungetiff(tun.as_raw_fd(), &raw mut request) }?;
    // SAFETY: TUNGETIFF wrote the flags, which are plain integers.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((name_of(&request), c_int::from(flags.cast_unsigned())))
}

/// The network namespace that the interface of a TUN queue is in; since Linux 5.7.
pub(crate) fn tun_netns(tun: BorrowedFd<'_>) -> nix::Result<File> {
    // SAFETY: the request takes no argument.
    let opened = unsafe { tungetdevnetns(tun.as_raw_fd()) }?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { File::from_raw_fd(opened) })
}

/// Sets the length of the virtio_net_hdr before each packet.
pub(crate) fn set_vnet_header_len(tun: BorrowedFd<'_>, len: c_int) -> nix::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads an int, which is live.
    unsafe { tunsetvnethdrsz(tun.as_raw_fd(), &raw const len) }.map(drop)
}

/// Sets the link type, ARPHRD_*, of the interface that a TUN queue belongs to and that is down.
pub(crate) fn set_link_type(tun: BorrowedFd<'_>, kind: u16) -> nix::Result<()> {
    // SAFETY: plain integers.
    unsafe { tunsetlink(tun.as_raw_fd(), c_int::from(kind)) }.map(drop)
}

/// Sets which super-packets, TUN_F_*, the kernel may hand over through a TUN queue.
pub(crate) fn set_offload(tun: BorrowedFd<'_>, offloads: libc::c_uint) -> nix::Result<()> {
    // SAFETY: plain integers.
    unsafe { tunsetoffload(tun.as_raw_fd(), offloads.cast_signed()) }.map(drop)
}

/// Has the kernel refuse descriptors that are sent to a unix socket, and to those that it accepts from then on.
pub(crate) fn refuse_descriptors(socket: BorrowedFd<'_>) -> nix::Result<()> {
    // linux/socket.h; Linux 6.16.
    const SO_PASSRIGHTS: c_int = 83;
    let (value, len) = (0 as c_int, size_of::<c_int>() as libc::socklen_t);
    let (socket, value) = (socket.as_raw_fd(), (&raw const value).cast());
    // SAFETY: the value is live and as long as said.
    Errno::result(unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, SO_PASSRIGHTS, value, len) })
        .map(drop)
}

/// The file that a unix socket was bound to, though it may have been removed since; opened with O_PATH.
pub(crate) fn bound_file(socket: BorrowedFd<'_>) -> nix::Result<File> {
    // linux/un.h.
    const SIOCUNIXFILE: c_int = 0x89e0;
    // SAFETY: the request takes no argument.
    let opened = Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCUNIXFILE as _) })?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { File::from_raw_fd(opened) })
}

/// The network namespace that a socket is in.
pub(crate) fn netns_of_socket(socket: BorrowedFd<'_>) -> nix::Result<File> {
    // linux/sockios.h.
    const SIOCGSKNS: c_int = 0x894c;
    // SAFETY: the request takes no argument.
    let opened = Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS as _) })?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { File::from_raw_fd(opened) })
}

/// The device number of an open terminal, by whichever name it was opened; ENOTTY if it is none.
pub(crate) fn terminal_number(terminal: BorrowedFd<'_>) -> nix::Result<u32> {
    let mut number = 0;
    // SAFETY: the number is live; TIOCGDEV writes it.
    unsafe { tiocgdev(terminal.as_raw_fd(), &raw mut number) }.map(|_| number)
}

/// Empties the environment, while there is a single thread.
pub(crate) fn clear_environment() {
    // SAFETY: no other thread exists that could read the environment meanwhile.
    let _never_fails = unsafe { nix::env::clearenv() };
}

/// Forks this process, which has a single thread, so that the child may do anything.
pub(crate) fn fork() -> nix::Result<ForkResult> {
    // SAFETY: no other thread exists (see the module `startup`), so no lock is held in the child.
    unsafe { nix::unistd::fork() }
}

/// Whether the scheduling policy of this thread is SCHED_DEADLINE without the flag that resets it on a fork. The
/// wrapper of musl refuses the question.
pub(crate) fn is_under_deadline() -> bool {
    // linux/sched.h.
    const SCHED_DEADLINE: libc::c_long = 6;
    // SAFETY: plain integers.
    unsafe { libc::syscall(libc::SYS_sched_getscheduler, 0) == SCHED_DEADLINE }
}

/// Waits. Where a filter refuses nanosleep(2), std's function would panic.
pub(crate) fn pause(time: Duration) {
    let _either_way = wgsep_monitor::poll([], time);
}

/// Ignores a signal, in the programs that this process executes too, or gives it its default action; what was done
/// about it before.
pub(crate) fn set_action(signal: Signal, action: SigHandler) -> nix::Result<SigHandler> {
    // SAFETY: no handler is installed, and neither of the two is one, so none can run at a bad moment.
    unsafe { nix::sys::signal::signal(signal, action) }
}

/// A descriptor that refers to a child that was not yet waited for.
pub(crate) fn pidfd_open(child: Pid) -> nix::Result<OwnedFd> {
    // SAFETY: plain integers.
    let opened = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, child.as_raw(), 0) })?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(opened as RawFd) })
}

/// Takes over a descriptor that was passed by number; it must be open, and is no longer inherited.
pub(crate) fn take_descriptor(number: RawFd) -> nix::Result<OwnedFd> {
    // SAFETY: plain integers; a number that is not open is an error and nothing else.
    Errno::result(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, was passed to us for this, and is taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Puts a descriptor at a number, without close-on-exec. What was open there before goes.
pub(crate) fn place_descriptor(descriptor: BorrowedFd<'_>, number: RawFd) -> nix::Result<()> {
    // SAFETY: plain integers. The caller owns no object whose descriptor is at `number`, or does not
    // use it any more.
    Errno::result(unsafe { libc::dup2(descriptor.as_raw_fd(), number) }).map(drop)
}
