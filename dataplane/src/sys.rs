//! The system calls that no safe crate offers as the dataplane needs them: `recvmsg` and `sendmsg` with control messages
//! on the stack, netlink, random numbers, priorities, the page of the VM clock. And a sum by instructions that not every
//! processor has. All the unsafe code of this crate is here and in `secret`.

use crate::packets::offload::sum_words;
use core::mem::{MaybeUninit, size_of, zeroed};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use core::ptr::{self, NonNull};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Pid;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use wgsep_ipc::startup::{CHANNEL, VM_CLOCK};
use wgsep_proto::session::peer::is_link_local;
use wgsep_proto::{Endpoint, Source};

/// A received datagram, or several of one sender that the kernel coalesced (UDP_GRO).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Datagram {
    /// Bytes received.
    pub(crate) len: usize,
    /// Length of each datagram but the last, which may be shorter; `len` if there is only one.
    pub(crate) segment_len: usize,
    /// Its sender, and our address it was sent to.
    pub(crate) endpoint: Endpoint,
    /// Type of service or traffic class of the outer header.
    pub(crate) traffic_class: u8,
}

/// A buffer for every control message that we request or send, aligned as the kernel requires.
#[repr(C, align(8))]
struct ControlBuffer([u8; 128]);

/// Receives one datagram, without blocking.
///
/// # Errors
/// As recvmsg(2); `WouldBlock` when none is queued. A datagram from no Internet address, from port 0,
/// which cannot be answered, or one that was cut short, is `InvalidData`.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Datagram> {
    let mut name = MaybeUninit::<libc::sockaddr_storage>::zeroed();
    let mut control = ControlBuffer([0; 128]);
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: an all-zero msghdr is a valid one with nothing in it.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_name = name.as_mut_ptr().cast();
    message.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len() as _;
    // SAFETY: name, iov, buffer and control are live and as long as `message` says.
    let received =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let len = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    if message.msg_flags & libc::MSG_TRUNC != 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    // SAFETY: zeroed at the start and filled by the kernel: every byte is initialised.
    let name = unsafe { name.assume_init() };
    let sender = socket_address(&name).filter(|sender| sender.port() != 0);
    let sender = sender.ok_or(io::ErrorKind::InvalidData)?;
    let mut datagram =
        Datagram { len, segment_len: len, endpoint: Endpoint::new(sender), traffic_class: 0 };
    read_control(&message, &mut datagram);
    Ok(datagram)
}

/// Reads the control messages that the kernel wrote behind a received `message`.
fn read_control(message: &libc::msghdr, datagram: &mut Datagram) {
    // SAFETY: `message` describes a control buffer that the kernel filled and that is still live.
    let mut cursor = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give null or a header that lies within the buffer.
    while let Some(header) = unsafe { cursor.as_ref() } {
        // SAFETY: the data of a header follows it within the buffer.
        let data = unsafe { libc::CMSG_DATA(header) };
        match (header.cmsg_level, header.cmsg_type) {
            (libc::SOL_UDP, libc::UDP_GRO) => {
                // SAFETY: the kernel wrote an int; the read need not be aligned.
                let segment: libc::c_int = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                if let Some(segment) = usize::try_from(segment).ok().filter(|segment| *segment > 0)
                {
                    datagram.segment_len = segment;
                }
            }
            (libc::IPPROTO_IP, libc::IP_TOS) => {
                // SAFETY: the kernel wrote one byte.
                datagram.traffic_class = unsafe { data.read() };
            }
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                // SAFETY: the kernel wrote an int; the read need not be aligned.
                let class: libc::c_int = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                datagram.traffic_class = u8::try_from(class & 0xff).unwrap_or(0);
            }
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                // SAFETY: the kernel wrote an in_pktinfo; the read need not be aligned.
                let info = unsafe { data.cast::<libc::in_pktinfo>().read_unaligned() };
                let address = Ipv4Addr::from(u32::from_be(info.ipi_spec_dst.s_addr));
                datagram.endpoint.source = Some(Source {
                    address: address.into(),
                    interface: u32::try_from(info.ipi_ifindex).unwrap_or(0),
                });
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                // SAFETY: the kernel wrote an in6_pktinfo; the read need not be aligned.
                let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
                let address = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                datagram.endpoint.source =
                    Some(Source { address: address.into(), interface: info.ipi6_ifindex });
            }
            _ => {}
        }
        // SAFETY: `header` is one that CMSG_FIRSTHDR or CMSG_NXTHDR gave for this message.
        cursor = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
}

fn socket_address(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let name: *const libc::sockaddr_storage = name;
    // SAFETY: `name` is live and starts with its family, whatever the family.
    let family = unsafe { (*name).ss_family };
    match libc::c_int::from(family) {
        libc::AF_INET => {
            // SAFETY: the family says that it is a sockaddr_in, which is smaller than the storage.
            let v4 = unsafe { &*name.cast::<libc::sockaddr_in>() };
            let address = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            Some((address, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that it is a sockaddr_in6, which is smaller than the storage.
            let v6 = unsafe { &*name.cast::<libc::sockaddr_in6>() };
            let address = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(address, u16::from_be(v6.sin6_port), 0, v6.sin6_scope_id).into())
        }
        _ => None,
    }
}

/// Sends `payload` to `endpoint` as one datagram, or as several of `segment_len` bytes, of which the
/// last may be shorter (UDP_SEGMENT), from the endpoint's cached source, if it has one.
///
/// # Errors
/// As sendmsg(2). `WouldBlock` when the socket's buffer is full.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    endpoint: &Endpoint,
    traffic_class: u8,
    payload: &[u8],
    segment_len: Option<u16>,
) -> io::Result<()> {
    let (mut name, name_len) = socket_name(endpoint.destination);
    let mut control = ControlBuffer([0; 128]);
    let mut iov =
        libc::iovec { iov_base: payload.as_ptr().cast_mut().cast(), iov_len: payload.len() };
    // SAFETY: an all-zero msghdr is a valid one with nothing in it.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_name = (&raw mut name).cast();
    message.msg_namelen = name_len;
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    let mut writer = ControlWriter { control: &mut control.0, len: 0 };
    if let Some(segment_len) = segment_len {
        writer.push(libc::SOL_UDP, libc::UDP_SEGMENT, &segment_len.to_ne_bytes());
    }
    let class = libc::c_int::from(traffic_class).to_ne_bytes();
    match endpoint.destination {
        SocketAddr::V4(_) if traffic_class != 0 => {
            writer.push(libc::IPPROTO_IP, libc::IP_TOS, &class);
        }
        SocketAddr::V6(_) if traffic_class != 0 => {
            writer.push(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &class);
        }
        _ => {}
    }
    match (endpoint.destination, endpoint.source.map(|source| (source.address, source.interface))) {
        (SocketAddr::V4(_), Some((IpAddr::V4(address), _))) => {
            // struct in_pktinfo: interface index, our address, and one the kernel ignores here. The
            // route decides on the interface.
            let mut info = [0; 12];
            info[4..8].copy_from_slice(&address.octets());
            writer.push(libc::IPPROTO_IP, libc::IP_PKTINFO, &info);
        }
        (SocketAddr::V6(_), Some((IpAddr::V6(address), interface))) => {
            // struct in6_pktinfo: our address, interface index. Only a link-local one needs it.
            let interface = if is_link_local(&address) { interface } else { 0 };
            let mut info = [0; 20];
            info[..16].copy_from_slice(&address.octets());
            info[16..].copy_from_slice(&interface.to_ne_bytes());
            writer.push(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info);
        }
        _ => {}
    }
    let control_len = writer.len;
    if control_len > 0 {
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = control_len as _;
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: name, iov, payload and control are live and as long as `message` says; sendmsg only
    // reads the payload, whatever the type of the pointer.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn socket_name(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: an all-zero sockaddr_storage is valid: an address of no family.
    let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
    let len = match address {
        SocketAddr::V4(v4) => {
            let name = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: v4.ip().to_bits().to_be() },
                sin_zero: [0; 8],
            };
            // SAFETY: the storage is larger than, and aligned for, every socket address.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(name) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(v6) => {
            let name = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: the storage is larger than, and aligned for, every socket address.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(name) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, len as libc::socklen_t)
}

/// Writes consecutive control messages, in safe code.
struct ControlWriter<'a> {
    control: &'a mut [u8; 128],
    len: usize,
}

impl ControlWriter<'_> {
    fn push(&mut self, level: libc::c_int, kind: libc::c_int, data: &[u8]) {
        // struct cmsghdr: length with the header (size_t), level, type; then the data; each message
        // starts at a multiple of the word size.
        const HEADER: usize = size_of::<libc::cmsghdr>();
        let len = HEADER + data.len();
        let start = self.len;
        let end = start + len.next_multiple_of(size_of::<usize>());
        let Some(message) = self.control.get_mut(start..end) else { return };
        message[..8].copy_from_slice(&len.to_ne_bytes());
        message[8..12].copy_from_slice(&level.to_ne_bytes());
        message[12..16].copy_from_slice(&kind.to_ne_bytes());
        message[HEADER..len].copy_from_slice(data);
        self.len = end;
    }
}

const _: () = assert!(size_of::<libc::cmsghdr>() == 16 && size_of::<usize>() == 8);

/// Makes all threads share glibc's main heap. Before another heap shrinks, glibc reads a file of /proc,
/// for which the filter kills the process; the main one grows and shrinks by brk alone. It is called before
/// there is a second thread. The packet path does not allocate, so it does not contend for the heap's lock.
pub(crate) fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: plain integers; no other thread allocates yet.
    let _cannot_fail = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Sets the calling thread's nice value to 19, so that it gets about a seventieth of a processor on which a
/// worker runs: a flood of handshake messages must not delay packets. The workers must have been started,
/// because new threads inherit the value.
pub(crate) fn set_nice() {
    const INCREMENT: libc::c_int = 19;
    // SAFETY: a plain integer. On Linux it applies to the calling thread only, and the kernel never
    // refuses a higher value.
    let _niceness = unsafe { libc::nice(INCREMENT) };
}

/// Takes the channel to the helper; `None` if its descriptor is not open. It is called once.
pub(crate) fn take_channel() -> Option<OwnedFd> {
    // SAFETY: nothing in this process owns it yet, as this runs first, and once.
    unsafe { take_if_open(CHANNEL) }
}

/// Takes the vmclock device, which the helper passes if there is one. It is called once, before anything is opened.
pub(crate) fn take_vm_clock() -> Option<OwnedFd> {
    // SAFETY: nothing in this process owns it yet, as this runs before anything is opened, and once.
    unsafe { take_if_open(VM_CLOCK) }
}

/// # Safety
/// Nothing in this process owns the descriptor.
unsafe fn take_if_open(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: F_GETFD changes nothing, and fails for a number that is not open.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: it is open, and the caller guarantees that it has no owner.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A page of a device, mapped to be read, for the rest of the process's life.
pub(crate) struct DevicePage(NonNull<u8>);

// SAFETY: the page is only read, by volatile loads, and never unmapped.
unsafe impl Send for DevicePage {}
// SAFETY: as above.
unsafe impl Sync for DevicePage {}

impl DevicePage {
    /// Length of a page as far as it is read, in bytes: the smallest that any machine has.
    const LEN: usize = 4096;

    /// Maps the first page.
    ///
    /// # Errors
    /// As mmap(2).
    pub(crate) fn map(device: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                Self::LEN,
                libc::PROT_READ,
                libc::MAP_SHARED,
                device.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(page.cast()).map(Self).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The little-endian number at an offset that is a multiple of 8; 0 beyond the page.
    pub(crate) fn read_u64(&self, offset: usize) -> u64 {
        if !offset.is_multiple_of(8) || offset >= Self::LEN {
            return 0;
        }
        // SAFETY: within the page.
        let number = unsafe { self.0.add(offset) }.cast::<u64>();
        // SAFETY: aligned, and the page stays mapped. The host may write it at any time, and this is a
        // single load.
        u64::from_le(unsafe { number.read_volatile() })
    }
}

/// Reads a netlink message. Returns its length and the id of the network namespace it is about, `None` for
/// the socket's own (NETLINK_LISTEN_ALL_NSID).
///
/// # Errors
/// As recvmsg(2).
pub(crate) fn receive_netlink(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> nix::Result<(usize, Option<i32>)> {
    let mut control = ControlBuffer([0; 128]);
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: an all-zero msghdr is a valid one with nothing in it.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len() as _;
    // SAFETY: iov, buffer and control are live and as long as `message` says.
    let received =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let len = nix::errno::Errno::result(received)?;
    // SAFETY: `message` describes a control buffer that the kernel filled and that is still live.
    let first = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: that is null or a header that lies within the buffer.
    let header = unsafe { first.as_ref() };
    let namespace = header.filter(|header| {
        (header.cmsg_level, header.cmsg_type) == (libc::SOL_NETLINK, libc::NETLINK_LISTEN_ALL_NSID)
    });
    let namespace = namespace.map(|header| {
        // SAFETY: the data of a header follows it within the buffer.
        let data = unsafe { libc::CMSG_DATA(header) };
        // SAFETY: the kernel wrote an int; the read need not be aligned.
        unsafe { data.cast::<i32>().read_unaligned() }
    });
    Ok((usize::try_from(len).unwrap_or(0), namespace))
}

/// Takes ownership of a descriptor that accept4(2) has just returned.
pub(crate) fn own_accepted(raw: RawFd) -> OwnedFd {
    // SAFETY: the caller passes the descriptor that accept4 returned to it, which has no other owner.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// The process that made the channel (SO_PEERCRED).
///
/// # Errors
/// As getsockopt(2).
pub(crate) fn peer_pid(channel: &impl AsFd) -> nix::Result<Pid> {
    let credentials = getsockopt(&channel.as_fd(), sockopt::PeerCredentials)?;
    Ok(Pid::from_raw(credentials.pid()))
}

/// Most random bytes that one call always returns in full once the kernel has booted (getrandom(2)).
pub(crate) const MAX_RANDOM: usize = 256;

/// Fills at most [`MAX_RANDOM`] bytes from the kernel's generator; aborts on failure,
/// because no key is safe without it. It makes the system call itself: the function of newer C libraries
/// returns bytes that the vDSO generates ahead, and std refers to it weakly, so that it is missing from a
/// static program that is linked with LTO.
pub(crate) fn fill_random(bytes: &mut [u8]) {
    // SAFETY: the buffer is live, writable and as long as given.
    let filled =
        unsafe { libc::syscall(libc::SYS_getrandom, bytes.as_mut_ptr(), bytes.len(), 0u32) };
    if usize::try_from(filled) != Ok(bytes.len()) {
        std::process::abort();
    }
}

/// [`sum_words`], by AVX2 where the processor has it.
pub(crate) fn sum_with_vectors(bytes: &[u8], initial: u64) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn sum(bytes: &[u8], initial: u64) -> u64 {
            sum_words(bytes, initial)
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { sum(bytes, initial) };
        }
    }
    sum_words(bytes, initial)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    fn wait(socket: &UdpSocket, buffer: &mut [u8]) -> Datagram {
        for _ in 0..2000 {
            match receive(socket.as_fd(), buffer) {
                Ok(datagram) => return datagram,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
        panic!("nothing came");
    }

    #[test]
    fn segments_arrive_with_their_addresses_in_both_families() {
        for host in ["127.0.0.1", "::1"] {
            let host: IpAddr = host.parse().unwrap();
            let (a, b) = (UdpSocket::bind((host, 0)).unwrap(), UdpSocket::bind((host, 0)).unwrap());
            let mut endpoint = Endpoint::new(b.local_addr().unwrap());
            endpoint.source = Some(Source { address: host, interface: 0 });
            send(a.as_fd(), &endpoint, 0x88, &[7; 250], Some(100)).unwrap();
            let mut buffer = [0; 2000];
            for expected in [100, 100, 50] {
                let datagram = wait(&b, &mut buffer);
                assert_eq!((datagram.len, datagram.segment_len), (expected, expected));
                assert_eq!(datagram.endpoint.destination, a.local_addr().unwrap());
            }
        }
    }

    #[test]
    fn an_empty_datagram_is_received_and_a_long_one_is_refused() {
        let (a, b) =
            (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let endpoint = Endpoint::new(b.local_addr().unwrap());
        send(a.as_fd(), &endpoint, 0, &[], None).unwrap();
        assert_eq!(wait(&b, &mut [0; 10]).len, 0);
        send(a.as_fd(), &endpoint, 0, &[1; 11], None).unwrap();
        let error = loop {
            match receive(b.as_fd(), &mut [0; 10]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => break other.unwrap_err(),
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
