//! A tunnel to one peer.

use core::ffi::c_char;
use core::mem::MaybeUninit;
use core::net::SocketAddr;
use core::ptr;
use std::sync::{Mutex, MutexGuard};

use crate::address::wgsep_address;
use crate::key::wgsep_key;
use crate::report::{wgsep_event, wgsep_statistics};
use crate::status::{guard, wgsep_status};
use crate::sys;
use crate::time::wgsep_now;
use wgsep_proto::{
    DropCause, EncapsulateError, MAX_OVERHEAD, Now, PresharedKey, PublicKey, StartHandshakeError,
    SystemRandom, Tunnel,
};

/// Most bytes by which a datagram is longer than its packet.
pub const WGSEP_MAX_OVERHEAD: usize = 47;
/// Bytes that hold the name of any cause of drops, with the zero byte at its end.
pub const WGSEP_CAUSE_LEN: usize = 64;

// Numbers, because cbindgen writes what is written here.
const _: () = assert!(WGSEP_MAX_OVERHEAD == MAX_OVERHEAD);
const _: () = {
    let mut causes: &[DropCause] = &DropCause::ALL;
    while let [cause, rest @ ..] = causes {
        assert!(cause.name().len() < WGSEP_CAUSE_LEN);
        causes = rest;
    }
};

/// A tunnel to one peer. Threads may share it: each call waits for those before it.
pub struct wgsep_tunnel(Mutex<Inner>);

struct Inner {
    tunnel: Tunnel,
    /// A datagram for which the caller's buffer was too small.
    unread: Option<(SocketAddr, Vec<u8>)>,
}

/// What a tunnel is created with. All bytes that a program does not set must be zero.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct wgsep_config {
    /// The private key of this end.
    pub private_key: wgsep_key,
    /// The public key of the peer.
    pub peer_public_key: wgsep_key,
    /// The preshared key; all zeros for none.
    pub preshared_key: wgsep_key,
    /// Where the peer is. With version 0 the tunnel waits for the peer's initiation.
    pub endpoint: wgsep_address,
    /// Seconds between persistent keepalives; 0 for none.
    pub persistent_keepalive: u16,
}

impl wgsep_tunnel {
    /// Locks a tunnel; an earlier call may have panicked.
    fn lock(this: Option<&Self>) -> Result<MutexGuard<'_, Inner>, wgsep_status> {
        let Self(inner) = this.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        inner.lock().map_err(|_| wgsep_status::WGSEP_ERROR_INTERNAL)
    }
}

/// Creates a tunnel, which the caller frees with `wgsep_tunnel_free`. It sends nothing before the first packet, unless
/// there is a persistent keepalive. `WGSEP_ERROR_KEY` if the private key is all zeros, `WGSEP_ERROR_OWN_KEY` if the
/// public key belongs to it, `WGSEP_ERROR_ADDRESS` for an endpoint of a version that is not 0, 4 or 6.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_tunnel_new(
    config: Option<&wgsep_config>,
    now: wgsep_now,
    tunnel: Option<&mut MaybeUninit<*mut wgsep_tunnel>>,
) -> wgsep_status {
    guard(|| {
        let tunnel = tunnel.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        tunnel.write(ptr::null_mut());
        let config = config.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        let endpoint = match config.endpoint.version {
            0 => None,
            _ => Some(SocketAddr::try_from(&config.endpoint)?),
        };
        let peer = PublicKey::from_bytes(config.peer_public_key.bytes);
        let preshared_key = PresharedKey::from_bytes(config.preshared_key.bytes);
        let (private_key, random) = (config.private_key.private()?, Box::new(SystemRandom));
        let created = Tunnel::new(private_key, peer, Some(preshared_key), endpoint, random);
        let mut created = created.map_err(|_| wgsep_status::WGSEP_ERROR_OWN_KEY)?;
        if config.persistent_keepalive != 0 {
            created.set_persistent_keepalive(config.persistent_keepalive, now.into());
        }
        let inner = Inner { tunnel: created, unread: None };
        tunnel.write(Box::into_raw(Box::new(wgsep_tunnel(Mutex::new(inner)))));
        Ok(wgsep_status::WGSEP_OK)
    })
}

/// Frees a tunnel, and erases its keys. NULL is nothing to free.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_tunnel_free(tunnel: Option<Box<wgsep_tunnel>>) {
    guard(|| {
        drop(tunnel);
        Ok(wgsep_status::WGSEP_OK)
    });
}

/// Sends an IP packet. Datagrams come out of `wgsep_tunnel_poll_transmit`: one with the packet, or those of a handshake, for
/// which the packet waits. `WGSEP_ERROR_DROPPED` if it is no IP packet.
///
/// # Safety
///
/// `len` bytes at `packet` are initialized.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wgsep_tunnel_encapsulate(
    tunnel: Option<&wgsep_tunnel>,
    packet: *const u8,
    len: usize,
    now: wgsep_now,
) -> wgsep_status {
    guard(|| {
        // SAFETY: as this function requires of its caller.
        let packet = unsafe { sys::slice(packet, len) }?;
        let sent = wgsep_tunnel::lock(tunnel)?.tunnel.encapsulate(packet, now.into());
        sent.map(|()| wgsep_status::WGSEP_OK).map_err(|_| wgsep_status::WGSEP_ERROR_DROPPED)
    })
}

/// Sends an IP packet, sealed into a buffer of at least `len + WGSEP_MAX_OVERHEAD` bytes, which saves a copy. With `WGSEP_OK`
/// the datagram has `datagram_len` bytes and goes to `destination`; with `WGSEP_NOTHING` the packet waits for a
/// handshake. After either, `wgsep_tunnel_poll_transmit` may have datagrams to send.
///
/// # Safety
///
/// `len` bytes at `packet` are initialized, and so are `capacity` bytes at `datagram`, which is other memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wgsep_tunnel_encapsulate_into(
    tunnel: Option<&wgsep_tunnel>,
    packet: *const u8,
    len: usize,
    datagram: *mut u8,
    capacity: usize,
    now: wgsep_now,
    datagram_len: Option<&mut MaybeUninit<usize>>,
    destination: Option<&mut MaybeUninit<wgsep_address>>,
) -> wgsep_status {
    guard(|| {
        let datagram_len = datagram_len.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        let destination = destination.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        datagram_len.write(0);
        // SAFETY: as this function requires of its caller.
        let packet = unsafe { sys::slice(packet, len) }?;
        // SAFETY: as above.
        let datagram = unsafe { sys::slice_mut(datagram, capacity) }?;
        let mut inner = wgsep_tunnel::lock(tunnel)?;
        match inner.tunnel.encapsulate_into(packet, datagram, now.into()) {
            Ok(Some(transmit)) => {
                datagram_len.write(transmit.datagram.len());
                destination.write(transmit.endpoint.destination.into());
                Ok(wgsep_status::WGSEP_OK)
            }
            Ok(None) => Ok(wgsep_status::WGSEP_NOTHING),
            Err(EncapsulateError::BufferTooShort { .. }) => {
                Err(wgsep_status::WGSEP_ERROR_BUFFER_TOO_SMALL)
            }
            Err(_) => Err(wgsep_status::WGSEP_ERROR_DROPPED),
        }
    })
}

/// Takes a datagram that came from `source`, decrypting it in place. With `WGSEP_OK` there was an IP packet in it,
/// of `packet_len` bytes at `packet`, which is within the datagram; otherwise `packet` is NULL. `WGSEP_NOTHING` for a keepalive
/// and for a message of a handshake, `WGSEP_ERROR_DROPPED` for a datagram that is not authentic or not of this tunnel.
/// After any of these, `wgsep_tunnel_poll_transmit` may have datagrams to send.
///
/// # Safety
///
/// `len` bytes at `datagram` are initialized, and no other thread uses them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wgsep_tunnel_decapsulate(
    tunnel: Option<&wgsep_tunnel>,
    source: Option<&wgsep_address>,
    datagram: *mut u8,
    len: usize,
    now: wgsep_now,
    packet: Option<&mut MaybeUninit<*const u8>>,
    packet_len: Option<&mut MaybeUninit<usize>>,
) -> wgsep_status {
    guard(|| {
        let packet = packet.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        let packet_len = packet_len.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        packet.write(ptr::null());
        packet_len.write(0);
        let source = source.ok_or(wgsep_status::WGSEP_ERROR_NULL)?.try_into()?;
        // SAFETY: as this function requires of its caller.
        let datagram = unsafe { sys::slice_mut(datagram, len) }?;
        let mut inner = wgsep_tunnel::lock(tunnel)?;
        let received = inner.tunnel.decapsulate(source, datagram, now.into());
        let received = received.map_err(|_| wgsep_status::WGSEP_ERROR_DROPPED)?;
        let Some(inside) = received else { return Ok(wgsep_status::WGSEP_NOTHING) };
        packet.write(inside.as_ptr());
        packet_len.write(inside.len());
        Ok(wgsep_status::WGSEP_OK)
    })
}

/// Copies the next datagram to send to a buffer, its length to `len` and its destination to `destination`. `WGSEP_NOTHING` if
/// there is none. If the buffer is too small, `len` is what the datagram needs, and the next call returns it again; 65,535
/// bytes hold any.
///
/// # Safety
///
/// `capacity` bytes at `datagram` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wgsep_tunnel_poll_transmit(
    tunnel: Option<&wgsep_tunnel>,
    datagram: *mut u8,
    capacity: usize,
    len: Option<&mut MaybeUninit<usize>>,
    destination: Option<&mut MaybeUninit<wgsep_address>>,
) -> wgsep_status {
    guard(|| {
        let len = len.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        let destination = destination.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        len.write(0);
        let mut inner = wgsep_tunnel::lock(tunnel)?;
        let Inner { tunnel, unread } = &mut *inner;
        if let Some((to, bytes)) = unread {
            len.write(bytes.len());
            // SAFETY: as this function requires of its caller; the library's memory is apart from that of the caller.
            unsafe { sys::copy_to(datagram, capacity, bytes) }?;
            destination.write((*to).into());
            *unread = None;
            return Ok(wgsep_status::WGSEP_OK);
        }
        let Some(transmit) = tunnel.poll_transmit() else { return Ok(wgsep_status::WGSEP_NOTHING) };
        let (to, bytes) = (transmit.endpoint.destination, transmit.datagram);
        len.write(bytes.len());
        // SAFETY: as above.
        if let Err(status) = unsafe { sys::copy_to(datagram, capacity, bytes) } {
            *unread = Some((to, bytes.to_vec()));
            return Err(status);
        }
        destination.write(to.into());
        Ok(wgsep_status::WGSEP_OK)
    })
}

/// Writes when `wgsep_tunnel_handle_timeout` is due to `at`, in nanoseconds of the monotonic clock. `WGSEP_NOTHING` if no
/// timer is pending; another call may start one.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_tunnel_next_timeout(
    tunnel: Option<&wgsep_tunnel>,
    at: Option<&mut MaybeUninit<u64>>,
) -> wgsep_status {
    guard(|| {
        let at = at.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        at.write(u64::MAX);
        let due = wgsep_tunnel::lock(tunnel)?.tunnel.next_timeout();
        let Some(due) = due else { return Ok(wgsep_status::WGSEP_NOTHING) };
        at.write(due.as_nanos());
        Ok(wgsep_status::WGSEP_OK)
    })
}

/// Expires the timers that are due. `wgsep_tunnel_poll_transmit` may have datagrams to send afterwards.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_tunnel_handle_timeout(
    tunnel: Option<&wgsep_tunnel>,
    now: wgsep_now,
) -> wgsep_status {
    change(tunnel, now, Tunnel::handle_timeout)
}

/// Sets the seconds between persistent keepalives; 0 for none.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_tunnel_set_persistent_keepalive(
    tunnel: Option<&wgsep_tunnel>,
    seconds: u16,
    now: wgsep_now,
) -> wgsep_status {
    change(tunnel, now, |tunnel, now| tunnel.set_persistent_keepalive(seconds, now))
}

/// Sets the MTU of the packets inside, in bytes, which bounds their padding; 0, as at first, is no bound. It is the MTU of the
/// path less 60 over IPv4 and less 80 over IPv6, so usually 1420.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_tunnel_set_mtu(tunnel: Option<&wgsep_tunnel>, mtu: u32) -> wgsep_status {
    guard(|| {
        wgsep_tunnel::lock(tunnel)?.tunnel.set_mtu(mtu);
        Ok(wgsep_status::WGSEP_OK)
    })
}

/// Drops every keypair and handshake, and starts anew: for a virtual machine that was cloned or restored from a snapshot,
/// another copy of which may use the same keys with the same nonces.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_tunnel_vm_notification(
    tunnel: Option<&wgsep_tunnel>,
    now: wgsep_now,
) -> wgsep_status {
    change(tunnel, now, Tunnel::vm_notification)
}

fn change(
    tunnel: Option<&wgsep_tunnel>,
    now: wgsep_now,
    change: impl FnOnce(&mut Tunnel, Now),
) -> wgsep_status {
    guard(|| {
        change(&mut wgsep_tunnel::lock(tunnel)?.tunnel, now.into());
        Ok(wgsep_status::WGSEP_OK)
    })
}

/// Sets where the peer is. Until it sends from another address.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_tunnel_set_endpoint(
    tunnel: Option<&wgsep_tunnel>,
    endpoint: Option<&wgsep_address>,
    now: wgsep_now,
) -> wgsep_status {
    guard(|| {
        let endpoint = endpoint.ok_or(wgsep_status::WGSEP_ERROR_NULL)?.try_into()?;
        wgsep_tunnel::lock(tunnel)?.tunnel.set_endpoint(endpoint, now.into());
        Ok(wgsep_status::WGSEP_OK)
    })
}

/// Sets the preshared key, of which all zeros is none. The next handshake has it.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_tunnel_set_preshared_key(
    tunnel: Option<&wgsep_tunnel>,
    key: Option<&wgsep_key>,
    now: wgsep_now,
) -> wgsep_status {
    guard(|| {
        let key = key.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        let key = PresharedKey::from_bytes(key.bytes);
        wgsep_tunnel::lock(tunnel)?.tunnel.set_preshared_key(key, now.into());
        Ok(wgsep_status::WGSEP_OK)
    })
}

/// Starts a handshake that no packet waits for. `WGSEP_ERROR_NO_ENDPOINT` if the peer's address is not known, and
/// `WGSEP_ERROR_TOO_SOON` within five seconds of the last message of a handshake.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_tunnel_start_handshake(
    tunnel: Option<&wgsep_tunnel>,
    now: wgsep_now,
) -> wgsep_status {
    guard(|| {
        let mut inner = wgsep_tunnel::lock(tunnel)?;
        match inner.tunnel.start_handshake(now.into()) {
            Ok(()) => Ok(wgsep_status::WGSEP_OK),
            Err(StartHandshakeError::NoEndpoint) => Err(wgsep_status::WGSEP_ERROR_NO_ENDPOINT),
            Err(StartHandshakeError::TooSoon) => Err(wgsep_status::WGSEP_ERROR_TOO_SOON),
            Err(_) => Err(wgsep_status::WGSEP_ERROR_INTERNAL),
        }
    })
}

/// Reads the statistics of a tunnel.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_tunnel_read_statistics(
    tunnel: Option<&wgsep_tunnel>,
    now: wgsep_now,
    statistics: Option<&mut MaybeUninit<wgsep_statistics>>,
) -> wgsep_status {
    guard(|| {
        let statistics = statistics.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        let now = Now::from(now);
        statistics.write(wgsep_tunnel::lock(tunnel)?.tunnel.report(now.instant).into());
        Ok(wgsep_status::WGSEP_OK)
    })
}

/// Reads how many packets and datagrams were dropped of the cause of a number, from 0 on, and writes the name of the cause to a
/// buffer; `WGSEP_CAUSE_LEN` bytes hold any. `WGSEP_NOTHING` behind the last cause.
///
/// # Safety
///
/// `capacity` bytes at `name` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wgsep_tunnel_read_drops(
    tunnel: Option<&wgsep_tunnel>,
    number: usize,
    name: *mut c_char,
    capacity: usize,
    count: Option<&mut MaybeUninit<u64>>,
) -> wgsep_status {
    guard(|| {
        let count = count.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        count.write(0);
        let inner = wgsep_tunnel::lock(tunnel)?;
        let counted = inner.tunnel.drops().counts().nth(number);
        let Some((cause, packets)) = counted else { return Ok(wgsep_status::WGSEP_NOTHING) };
        // SAFETY: as this function requires of its caller.
        unsafe { sys::copy_text_to(name, capacity, cause.name()) }?;
        count.write(packets);
        Ok(wgsep_status::WGSEP_OK)
    })
}

/// Reads the next event. `WGSEP_NOTHING` if there is none. At most 256 are kept; the oldest are dropped first.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_tunnel_poll_event(
    tunnel: Option<&wgsep_tunnel>,
    event: Option<&mut MaybeUninit<wgsep_event>>,
) -> wgsep_status {
    guard(|| {
        let event = event.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        let polled = wgsep_tunnel::lock(tunnel)?.tunnel.poll_event();
        let Some(polled) = polled else { return Ok(wgsep_status::WGSEP_NOTHING) };
        event.write(polled.into());
        Ok(wgsep_status::WGSEP_OK)
    })
}
