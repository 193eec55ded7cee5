//! The system calls that no safe crate offers. All the unsafe code of this crate is here.

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use nix::unistd::Pid;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

nix::ioctl_write_ptr_bad!(tunsetiff, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_read_bad!(tungetiff, libc::TUNGETIFF, libc::ifreq);
nix::ioctl_write_ptr_bad!(tunsetvnethdrsz, libc::TUNSETVNETHDRSZ, libc::c_int);
nix::ioctl_write_int_bad!(tunsetoffload, libc::TUNSETOFFLOAD);
nix::ioctl_write_ptr_bad!(siocsifmtu, libc::SIOCSIFMTU, libc::ifreq);

fn request(name: &[u8]) -> libc::ifreq {
    // SAFETY: an all-zero ifreq is a valid one: an empty name, flags 0.
    let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.iter().take(libc::IFNAMSIZ - 1)) {
        *place = byte.cast_signed();
    }
    request
}

fn name_of(request: &libc::ifreq) -> String {
    let bytes =
        request.ifr_name.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0);
    String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
}

/// Makes an open /dev/net/tun a queue of the interface `name`, which may be a template such as
/// `wg%d`; returns the interface's real name.
pub(crate) fn attach_tun(
    tun: BorrowedFd<'_>,
    name: &str,
    flags: libc::c_int,
) -> nix::Result<String> {
    let mut request = request(name.as_bytes());
    request.ifr_ifru.ifru_flags = u16::try_from(flags).unwrap_or(0).cast_signed();
    // SAFETY: the request is live; TUNSETIFF reads it and writes the real name back into it.
    unsafe { tunsetiff(tun.as_raw_fd(), &raw mut request) }?;
    Ok(name_of(&request))
}

/// Name and flags of the interface that a TUN queue belongs to.
pub(crate) fn tun_identity(tun: BorrowedFd<'_>) -> nix::Result<(String, libc::c_int)> {
    let mut request = request(b"");
    // SAFETY: the request is live; TUNGETIFF writes it.
    unsafe { tungetiff(tun.as_raw_fd(), &raw mut request) }?;
    // SAFETY: TUNGETIFF wrote the flags, which are plain integers.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((name_of(&request), libc::c_int::from(flags.cast_unsigned())))
}

/// Sets the length of the virtio_net_hdr before each packet.
pub(crate) fn set_vnet_header_len(tun: BorrowedFd<'_>, len: libc::c_int) -> nix::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads an int, which is live.
    unsafe { tunsetvnethdrsz(tun.as_raw_fd(), &raw const len) }.map(drop)
}

/// Sets which super-packets, TUN_F_*, the kernel may hand over through a TUN queue.
pub(crate) fn set_offload(tun: BorrowedFd<'_>, offloads: libc::c_uint) -> nix::Result<()> {
    // SAFETY: plain integers.
    unsafe { tunsetoffload(tun.as_raw_fd(), offloads.cast_signed()) }.map(drop)
}

/// Sets the size of the longest super-packet that the kernel makes for an interface (IFLA_GSO_MAX_SIZE
/// of linux/if_link.h).
pub(crate) fn set_gso_max_size(ifindex: u32, size: u32) -> nix::Result<()> {
    const IFLA_GSO_MAX_SIZE: u16 = 41;
    const LEN: u32 = 40;
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let mut request = Vec::new();
    // struct nlmsghdr: length, type, flags, sequence, sender.
    request.extend(LEN.to_ne_bytes());
    request.extend(libc::RTM_NEWLINK.to_ne_bytes());
    request.extend(((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
    request.extend([0; 8]);
    // struct ifinfomsg: family and type, index, flags and which of them change.
    request.extend([0; 4]);
    request.extend(ifindex.to_ne_bytes());
    request.extend([0; 8]);
    // struct rtattr.
    request.extend(8u16.to_ne_bytes());
    request.extend(IFLA_GSO_MAX_SIZE.to_ne_bytes());
    request.extend(size.to_ne_bytes());
    send(netlink.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut answer = [0; 256];
    let len = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // struct nlmsgerr comes behind the header: minus the errno, or 0.
    let error = answer.get(..len).and_then(|answer| answer.get(16..)?.first_chunk());
    match error.map_or(-libc::EPROTO, |error| i32::from_ne_bytes(*error)) {
        0 => Ok(()),
        error => Err(Errno::from_raw(-error)),
    }
}

/// Sets an interface's MTU by way of any socket.
pub(crate) fn set_mtu(socket: BorrowedFd<'_>, name: &str, mtu: libc::c_int) -> nix::Result<()> {
    let mut request = request(name.as_bytes());
    request.ifr_ifru.ifru_mtu = mtu;
    // SAFETY: the request is live; SIOCSIFMTU reads it.
    unsafe { siocsifmtu(socket.as_raw_fd(), &raw const request) }.map(drop)
}

/// Sets a socket option whose value is an int.
pub(crate) fn set_option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> nix::Result<()> {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the value is live and as long as said.
    let set = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), len)
    };
    Errno::result(set).map(drop)
}

/// Removes a variable of the environment, while there is a single thread.
pub(crate) fn remove_variable(name: &std::ffi::OsStr) {
    // SAFETY: no other thread exists that could read the environment meanwhile.
    unsafe { std::env::remove_var(name) };
}

/// What a fork returned.
pub(crate) enum Forked {
    Parent(Pid),
    Child,
}

/// Forks this process, which has a single thread, so that the child may do anything.
pub(crate) fn fork() -> nix::Result<Forked> {
    // SAFETY: no other thread exists (see the module `startup`), so no lock is held in the child.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => Ok(Forked::Parent(child)),
        nix::unistd::ForkResult::Child => Ok(Forked::Child),
    }
}

/// A descriptor that stands for a child that was not yet waited for.
pub(crate) fn pidfd_open(child: Pid) -> nix::Result<OwnedFd> {
    // SAFETY: plain integers.
    let opened = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, child.as_raw(), 0) })?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(opened as RawFd) })
}

/// Kills the process that a pidfd stands for.
pub(crate) fn kill(child: BorrowedFd<'_>) -> nix::Result<()> {
    let none: *const libc::siginfo_t = core::ptr::null();
    // SAFETY: plain integers, and a null pointer, which means no further information.
    let sent = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, child.as_raw_fd(), libc::SIGKILL, none, 0)
    };
    Errno::result(sent).map(drop)
}

/// Takes over a descriptor that was passed by number; it must be open, and is no longer inherited.
pub(crate) fn take_descriptor(number: RawFd) -> nix::Result<OwnedFd> {
    // SAFETY: plain integers; a number that is not open is an error and nothing else.
    let set = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    Errno::result(set)?;
    // SAFETY: it is open, was passed to us for this, and is taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Puts a descriptor at a number, without close-on-exec, in a child that is about to execute.
pub(crate) fn place_descriptor(descriptor: BorrowedFd<'_>, number: RawFd) -> nix::Result<()> {
    // SAFETY: plain integers. The child uses nothing that was open at `number` before.
    Errno::result(unsafe { libc::dup2(descriptor.as_raw_fd(), number) }).map(drop)
}

/// Executes an open program in place of this process.
pub(crate) fn execute(program: BorrowedFd<'_>, arguments: &[&CStr]) -> Errno {
    let mut pointers: Vec<*const libc::c_char> =
        arguments.iter().map(|argument| argument.as_ptr()).collect();
    pointers.push(core::ptr::null());
    let environment: [*const libc::c_char; 1] = [core::ptr::null()];
    // SAFETY: both arrays are live, hold live strings and end with a null pointer; the path is empty,
    // which AT_EMPTY_PATH turns into the descriptor itself.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            pointers.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Errno::last()
}

/// Ends this process at once, running nothing on the way.
pub(crate) fn exit(status: libc::c_int) -> ! {
    // SAFETY: _exit runs no handler and touches no memory.
    unsafe { libc::_exit(status) }
}
