//! The path of packets between the TUN device and the UDP sockets. A worker carries a whole batch from the read
//! to the write, while it is in the cache.
//!
//! `Worker::outbound` and `Worker::inbound` in `workers/worker.rs` list the stages of a direction and call each in turn.
//! Read one of them beside the files below, from top to bottom. A packet that is sent on enters no file of its walk
//! twice. Two others do: one without a peer is answered through `packets/tun.rs`, and packets so small that their datagrams
//! do not fit into one batch are sealed and sent in rounds. `path/` is `dataplane/proto/src/path/`, and the other directories of its rows are beside that; `aead/` is `dataplane/aead/`.
//!
//! Out of the TUN device:
//!
//! | stage | what it does | file | order, locks |
//! |---|---|---|---|
//! | 1. *read* | a quantum of frames from each ready queue of the device, and the header of each | `packets/outbound.rs`, `packets/flow_queues.rs`, `packets/tun.rs` | sequential: the source lock of the device |
//! | 2. *route* | finds the peer of each packet and how it is split; one without a peer is answered with an ICMP error | `path/outbound/route.rs`, `packets/offload/segments.rs` | sequential, as 1; no lock, except for a packet that contains a WireGuard message (the peer's, or that of a shard of the indices) and where routes have an MTU (theirs) |
//! | 3. *reserve nonces* | for each run of packets to one peer, or stages the run until a handshake has completed | `path/outbound/reserve.rs` | sequential, as 1; the peer's lock, once a run |
//! | 4. *seal* | splits super-packets into datagrams, encrypts those | `path/outbound/seal.rs`, `packets/offload/split.rs`, `aead/src/` | parallel: no lock, except that of routes with an MTU, for staged packets |
//! | 5. *send* | the datagrams, as segments of few system calls | `packets/udp.rs` | in the order of sequence numbers: one worker at a time, see `workers::sequencer` |
//!
//! Into the TUN device:
//!
//! | stage | what it does | file | order, locks |
//! |---|---|---|---|
//! | 1. *read* | datagrams from a socket, which the kernel may have coalesced | `packets/inbound.rs` | sequential: the source lock of the socket |
//! | 2. *parse* | each; handshake messages go to the control thread, a transport message names its keypair | `path/inbound/parse.rs` | parallel: a read lock on a shard of the indices, once a keypair |
//! | 3. *open* | the transport messages, in place | `path/inbound/open.rs`, `aead/src/` | parallel: no lock |
//! | 4. *accept* | each: replay window, endpoint, keypair slots, timers, source address | `path/inbound/accept.rs` | in the order of sequence numbers: one worker at a time; the locks of the replay window and of the peer. The source address is checked against the version of the allowed IPs that this worker has |
//! | 5. *write* | the packets to the device, coalesced into super-packets | `packets/offload/coalesce.rs`, `packets/tun.rs` | as 4 |
//!
//! Beside these files, the stages use three kinds of others. The formats of packets and messages are in `wire/`. State
//! that the stages look up and update has a file for each kind: `path/allowed_ips.rs`, `session/peer.rs`,
//! `session/keypair.rs`, `session/timers.rs`, `session/replay.rs`, `session/index_table.rs`, and `packets/gso.rs`, which
//! caches where the kernel refused segmentation. The system calls that `nix` does not have are in `sys.rs`.
//!
//! The work of a batch is bounded by its memory and by the number of frames or datagrams that it holds, whether or not
//! they have a peer. Nothing is allocated for a packet that is not staged.

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
