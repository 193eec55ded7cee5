//! The path of packets between the TUN device and the UDP sockets. A worker carries a whole batch from the read
//! to the write, while it is in the cache.
//!
//! Out of the TUN device, `outbound`:
//!
//! 1. *Read* a quantum from each ready queue of the device. (sequential: the source lock of the device)
//! 2. *Route* each packet; answer one that has no peer with an ICMP error. (sequential, as 1; a packet that contains a
//!    WireGuard message takes the peer's lock or one of the indices)
//! 3. *Reserve nonces* for each run of packets to one peer, or stage the run until a handshake has completed. (sequential,
//!    as 1; the peer's lock, once a run)
//! 4. *Seal*: split super-packets into datagrams, encrypt those. (parallel: no lock)
//! 5. *Send* the datagrams, in the order of sequence numbers. (in order: one worker at a time, see `sequencer`)
//!
//! Into the TUN device, `inbound`:
//!
//! 1. *Read* datagrams from a socket. (sequential: the source lock of the socket)
//! 2. *Parse* each; handshake messages go to the control thread, a transport message names its keypair. (parallel: a
//!    read lock on a shard of the indices, once a keypair)
//! 3. *Open* the transport messages. (parallel: no lock)
//! 4. *Accept* each: replay window, endpoint, keypair slots, timers, source address. (in order, as 5; the locks of the
//!    replay window and of the peer; with the allowed IPs that the worker which writes has)
//! 5. *Write* to the device, coalesced into super-packets. (in order: one worker at a time)
//!
//! Of the first, 2 to 4, and of the second, 2 to 4, are in `wgsep_proto::path`, by the same numbers. The files here, in
//! the order in which a packet meets them: `outbound` calls `flow_queues`, `tun`, `offload::segment` and `udp` (with
//! `gso`); `inbound` calls `sys::receive`, `offload::coalesce` and `tun`.

pub(crate) mod flow_queues;
pub(crate) mod gso;
pub(crate) mod inbound;
pub mod offload;
pub(crate) mod outbound;
pub(crate) mod tun;
pub(crate) mod udp;

/// Zeroed memory for packets, allocated once.
fn memory(len: usize) -> Box<[u8]> {
    vec![0; len].into_boxed_slice()
}
