//! Which system calls each process may make once it is locked down, and why.
//!
//! One line a call. The calls of the packet path take no argument rule, so that the kernel answers
//! them from its bitmap without running the filter. Everything else kills the process.
//!
//! Never here: ioctl, connect, open, clone, prctl, execve, io_uring. On the descriptors held, even a
//! process without capabilities could otherwise make the TUN device persistent or change its owner.

use nix::libc;

/// What an argument must be.
#[derive(Clone, Copy, Debug)]
pub struct Argument {
    /// Which, from 0.
    pub number: u8,
    /// How it is compared.
    pub test: Test,
}

/// How an argument is compared; as 32 bits where the kernel takes an int, else as 64.
#[derive(Clone, Copy, Debug)]
pub enum Test {
    /// Equal, as an int.
    Is(u32),
    /// Equal, as 64 bits.
    IsLong(u64),
    /// The process itself, as an int.
    OwnProcess,
    /// The descriptor that refers to the helper's child, as an int.
    Child,
    /// The helper's end of the channel to the dataplane, as an int.
    Channel,
    /// The socket of the system's log, where the helper logs there, as an int.
    SystemLog,
    /// The helper's end of the channel to the helper that replaces it, as an int.
    Successor,
    /// Less than this, as an int.
    Below(u32),
}

/// A system call that is allowed.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// Its name, with `SYS_` before it; the same on every architecture.
    pub name: &'static str,
    /// Its number on this architecture.
    pub call: libc::c_long,
    /// Any one of these combinations of arguments; none means any arguments.
    pub arguments: &'static [&'static [Argument]],
    /// Why.
    pub reason: &'static str,
}

/// A line of a table: a call with any arguments.
macro_rules! any {
    ($call:ident, $reason:expr $(,)?) => {
        only!($call, &[], $reason)
    };
}

/// A line of a table: a call with only these arguments.
macro_rules! only {
    ($call:ident, $arguments:expr, $reason:expr $(,)?) => {
        Allowed {
            name: stringify!($call),
            call: libc::$call,
            arguments: $arguments,
            reason: $reason,
        }
    };
}

const fn is(number: u8, value: libc::c_int) -> Argument {
    Argument { number, test: Test::Is(value.cast_unsigned()) }
}

const fn is_long(number: u8, value: libc::c_int) -> Argument {
    Argument { number, test: Test::IsLong(value.cast_unsigned() as u64) }
}

/// As malloc(3) asks for it: wherever the kernel likes, to be read and written, never executed, private,
/// and backed by no file.
const MEMORY: &[&[Argument]] = &[&[
    is_long(0, 0),
    is_long(2, libc::PROT_READ | libc::PROT_WRITE),
    is_long(3, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
]];
const PRIVATE: i32 = libc::FUTEX_PRIVATE_FLAG;
/// Waiting and waking: std's locks wait with the bitset, glibc's without. Neither waits for a time.
const FUTEX: &[&[Argument]] = &[
    &[is(1, libc::FUTEX_WAIT | PRIVATE)],
    &[is(1, libc::FUTEX_WAKE | PRIVATE)],
    &[is(1, libc::FUTEX_WAIT_BITSET | PRIVATE)],
];
/// No other process's threads, though they may have the same uid.
const ABORT: &[&[Argument]] =
    &[&[Argument { number: 0, test: Test::OwnProcess }, is(2, libc::SIGABRT)]];
/// Older versions of glibc unblock SIGABRT before they send it.
const UNBLOCK: &[&[Argument]] = &[&[is(0, libc::SIG_UNBLOCK)]];
/// Of a UAPI client.
const ACCEPTED: &[&[Argument]] = &[&[is(3, libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC)]];
const OWN_SOCKETS: &[&[Argument]] = &[
    &[is(1, libc::SOL_SOCKET), is(2, libc::SO_TYPE)],
    &[is(1, libc::SOL_SOCKET), is(2, libc::SO_DOMAIN)],
    &[is(1, libc::SOL_SOCKET), is(2, libc::SO_BINDTODEVICE)],
];

/// The dataplane, from its lock-down to its end.
pub const DATAPLANE: &[Allowed] = &[
    // The packet path.
    any!(SYS_read, "TUN packets, eventfds, the timer, netlink, UAPI clients"),
    any!(SYS_write, "TUN packets, eventfds, UAPI replies, requests to netlink, the log"),
    any!(SYS_recvmsg, "UDP datagrams, the helper"),
    any!(SYS_sendmsg, "UDP datagrams, the helper"),
    #[cfg(all(target_arch = "x86_64", not(target_env = "musl")))]
    any!(SYS_epoll_wait, "waiting"),
    // aarch64 has no other; musl makes one of the other.
    #[cfg(not(all(target_arch = "x86_64", not(target_env = "musl"))))]
    any!(SYS_epoll_pwait, "waiting"),
    only!(SYS_futex, FUTEX, "locks between the threads"),
    any!(SYS_clock_gettime, "the time, where the vDSO cannot read it"),
    any!(SYS_getcpu, "the processor of a worker, where neither rseq nor the vDSO says it"),
    // The control thread.
    any!(SYS_epoll_ctl, "watching what the helper hands over, and UAPI clients"),
    only!(SYS_timerfd_settime, &[&[is(1, libc::TFD_TIMER_ABSTIME)]], "the earliest protocol timer",),
    only!(SYS_getrandom, &[&[is(2, 0)]], "ephemeral keys, indices, cookies"),
    only!(SYS_accept4, ACCEPTED, "UAPI clients"),
    any!(SYS_close, "UAPI clients, old UDP sockets"),
    only!(SYS_getsockopt, OWN_SOCKETS, "checking what the helper handed over, and its device"),
    any!(SYS_getsockname, "checking what the helper handed over"),
    // Memory. All threads have one heap (dataplane/src/sys.rs), so neither mprotect nor madvise; what
    // grows is copied (dataplane/src/secret/heap.rs), so no mremap.
    any!(SYS_brk, "the heap grows and shrinks"),
    only!(SYS_mmap, MEMORY, "a large allocation"),
    any!(SYS_munmap, "a large allocation is freed"),
    // The end, and what precedes it. No signal has a handler (`take_signal_handlers`), so no sigreturn.
    only!(SYS_rt_sigprocmask, UNBLOCK, "abort"),
    any!(SYS_gettid, "abort"),
    any!(SYS_getpid, "abort"),
    only!(SYS_tgkill, ABORT, "abort"),
    any!(SYS_exit_group, "the process ends"),
];

const fn option(level: libc::c_int, name: libc::c_int) -> [Argument; 2] {
    [is(1, level), is(2, name)]
}

/// Exactly the socket options that the helper sets.
const SOCKET_OPTIONS: &[&[Argument]] = &[
    &option(libc::SOL_SOCKET, libc::SO_MARK),
    &option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE),
    &option(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE),
    &option(libc::SOL_SOCKET, libc::SO_RCVBUF),
    &option(libc::SOL_SOCKET, libc::SO_SNDBUF),
    &option(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    &option(libc::IPPROTO_IP, libc::IP_PKTINFO),
    &option(libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    &option(libc::IPPROTO_IP, libc::IP_RECVTOS),
    &option(libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    &option(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
    &option(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    &option(libc::SOL_UDP, libc::UDP_GRO),
    &option(libc::SOL_UDP, libc::UDP_CORK),
    &option(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER),
    &option(libc::SOL_SOCKET, libc::SO_LOCK_FILTER),
    &option(libc::SOL_SOCKET, libc::SO_BINDTOIFINDEX),
    &option(libc::SOL_SOCKET, libc::SO_BINDTODEVICE),
];

const DATAGRAM: libc::c_int = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;

/// The child alone, without the sender's own information and without flags.
const KILL: &[&[Argument]] =
    &[&[Argument { number: 0, test: Test::Child }, is(1, libc::SIGKILL), is_long(2, 0), is(3, 0)]];

/// On no other socket: with an address, it would reach any unix socket of the machine's services, as root.
const SEND: &[&[Argument]] = &[
    &[Argument { number: 0, test: Test::Channel }],
    &[Argument { number: 0, test: Test::SystemLog }],
    &[Argument { number: 0, test: Test::Successor }],
];

/// The lowest number of a TUN queue in the helper: it keeps them for a helper that replaces it, and can neither read nor
/// write them. All its other descriptors have lower numbers.
pub const FIRST_QUEUE: u32 = 40;
const NO_QUEUE: &[&[Argument]] = &[&[Argument { number: 0, test: Test::Below(FIRST_QUEUE) }]];

/// A socket in the place of another one.
const SUCCESSOR: &[&[Argument]] = &[&[
    Argument { number: 0, test: Test::Below(FIRST_QUEUE) },
    Argument { number: 1, test: Test::Successor },
    is(2, libc::O_CLOEXEC),
]];
const OTHER_END: &[&[Argument]] = &[
    &[is(1, libc::SOL_SOCKET), is(2, libc::SO_PEERCRED)],
    &[is(1, libc::SOL_SOCKET), is(2, libc::SO_MEMINFO)],
];

/// The helper, from the moment the dataplane is verified.
pub const HELPER: &[Allowed] = &[
    any!(SYS_ppoll, "waiting"),
    any!(SYS_recvmsg, "the dataplane's requests, uevents"),
    only!(SYS_sendmsg, SEND, "replies with descriptors; the log, where it is syslog"),
    only!(
        SYS_dup3,
        SUCCESSOR,
        "the channel to a helper that replaces this one, under a number known before"
    ),
    only!(SYS_getsockopt, OTHER_END, "whose process that helper is; what the manager has not read"),
    any!(SYS_listen, "the UAPI socket names this process, once it has replaced another helper"),
    only!(
        SYS_read,
        NO_QUEUE,
        "the dataplane's log, signals, the watch on the UAPI socket, the kernel's log"
    ),
    only!(
        SYS_write,
        NO_QUEUE,
        "the log, and telling the launcher and the service manager that all is ready"
    ),
    only!(
        SYS_socket,
        &[
            &[is(0, libc::AF_INET), is(1, DATAGRAM), is(2, 0)],
            &[is(0, libc::AF_INET6), is(1, DATAGRAM), is(2, 0)],
        ],
        "UDP sockets; keeps CAP_NET_ADMIN from netlink",
    ),
    only!(
        SYS_setsockopt,
        SOCKET_OPTIONS,
        "the mark, buffers, and ancillary data for the dataplane"
    ),
    any!(SYS_bind, "the UDP port"),
    any!(SYS_getsockname, "the UDP port that the kernel chose"),
    only!(SYS_shutdown, &[&[is(1, libc::SHUT_WR)]], "UDP sockets that are given up send no more"),
    any!(SYS_close, "UDP sockets"),
    only!(SYS_pidfd_send_signal, KILL, "ending the dataplane"),
    any!(SYS_waitid, "how the dataplane ended, and reaping orphans"),
    only!(
        SYS_unlinkat,
        &[&[is(2, 0)]],
        "removing the UAPI socket; Landlock holds it to that directory",
    ),
    only!(
        SYS_newfstatat,
        &[&[is(3, libc::AT_SYMLINK_NOFOLLOW)]],
        "whether a name in that directory still refers to what was made under it",
    ),
    any!(SYS_clock_gettime, "the time, where the vDSO cannot read it"),
    // Memory. What grows is copied (`Heap`), so no mremap.
    any!(SYS_brk, "the heap grows and shrinks"),
    only!(SYS_mmap, MEMORY, "a large allocation"),
    any!(SYS_munmap, "a large allocation is freed"),
    only!(SYS_rt_sigprocmask, UNBLOCK, "abort"),
    any!(SYS_gettid, "abort"),
    any!(SYS_getpid, "abort"),
    only!(SYS_tgkill, ABORT, "abort"),
    any!(SYS_exit_group, "the end"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_call_is_listed_once_with_a_reason() {
        for table in [DATAPLANE, HELPER] {
            let calls: BTreeSet<_> = table.iter().map(|allowed| allowed.call).collect();
            assert_eq!(calls.len(), table.len());
            assert!(table.iter().all(|allowed| !allowed.reason.is_empty()));
        }
    }

    #[test]
    fn calls_that_would_open_the_sandbox_are_in_no_table() {
        let forbidden = [
            libc::SYS_ioctl,
            libc::SYS_connect,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_clone,
            libc::SYS_clone3,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_fork,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_prctl,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_io_uring_setup,
            libc::SYS_bpf,
            libc::SYS_kill,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_mprotect,
            libc::SYS_mremap,
            libc::SYS_rt_sigaction,
            libc::SYS_rt_sigreturn,
            libc::SYS_sigaltstack,
            libc::SYS_sendto,
        ];
        for table in [DATAPLANE, HELPER] {
            assert!(table.iter().all(|allowed| !forbidden.contains(&allowed.call)));
        }
        let dataplane_only = [libc::SYS_socket, libc::SYS_bind, libc::SYS_setsockopt];
        assert!(DATAPLANE.iter().all(|allowed| !dataplane_only.contains(&allowed.call)));
    }
}
