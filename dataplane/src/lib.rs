//! The dataplane: the process that holds the keys, carries the packets and serves the UAPI, without
//! capabilities, files, a network of its own or most system calls. The helper passes the sockets and TUN queues
//! after the process is locked down.
//!
//! # Threads and what passes between them
//!
//! ```text
//!        wg(8), helper, netlink, timer
//!                    | epoll
//!          +---------v----------+   handshakes, dirty peers (eventfd)   +--------------------+
//!          |   control thread   |<--------------------------------------|  workers           |
//!          | owns ControlPlane: |                                       |  one leads, waits: |
//!          | peers, handshakes, |   DataPath: allowed IPs (versioned),  |  TUN queues,       |
//!          | timers, cookies    |   indices, peers (shared, locked)     |  UDP sockets       |
//!          |                    |-------------------------------------->|  the others follow |
//!          +--------------------+   staged, crypto jobs, wipes          +--------------------+
//!                                   (an eventfd for each worker)
//! ```
//!
//! **Control thread** (`control`). It alone owns the protocol's [`ControlPlane`], and runs at a lower priority
//! than the workers. In one epoll instance it waits for clients of the three sockets, the helper's
//! replies, netlink, one timerfd that is set to the earliest timer, and its eventfd. Each round consumes a bounded number of handshakes and of
//! UAPI steps, then sends what they caused.
//!
//! **Workers** (`workers::worker`), one for each processor unless `--workers` sets another number, follow the
//! *Leader/Followers* pattern (`workers::leader`). One worker, the leader, waits in epoll for the TUN queues and UDP
//! sockets; the others sleep. A leader whose batch is full promotes a follower, which waits in its place, before it
//! encrypts the batch. So light traffic is served by one thread with a warm cache, and heavy traffic by all.
//!
//! # Queues
//!
//! | queue | from, to | bound | when it is full |
//! |---|---|---|---|
//! | TUN queues, by flow | kernel, leader | `txqueuelen` each | the kernel drops |
//! | receive buffers of the sockets | kernel, leader | SO_RCVBUF | the kernel drops |
//! | batches (`workers::sequencer`) | worker, the worker that writes | two for each worker and source | a worker waits for one |
//! | handshake messages (`workers::shared`) | workers, control thread | 4096 | dropped, `handshake_queue_full` |
//! | dirty peers (`DataPath`) | workers, control thread | one entry a peer | - |
//! | peers whose staged packets can be sent | control thread, whichever worker reads the TUN device next | one entry a peer and request | - |
//! | staged packets, of a peer without a keypair | workers, workers | 128 | the oldest is dropped, `staged_overflow` |
//! | crypto jobs (`workers::crypto_pool`) | control thread, followers | 16 handshakes | - |
//!
//! The TUN queues are read by *deficit round robin* without carried deficits (`packets::flow_queues`): a quantum
//! of bytes from each queue that is ready, so that a packet waits for at most one quantum of each other flow.
//!
//! # Who wakes whom
//!
//! - The kernel wakes the leader: a packet or a datagram has arrived.
//! - A leader wakes a follower: it promotes it, because its batch is full, unless recent promotions gained nothing.
//! - A worker wakes the control thread: it queued a handshake message, or marked a peer as dirty (a handshake is
//!   needed, a keypair was confirmed, a timer expires earlier than the timerfd is set to). Under load the control thread
//!   polls the queue instead, every 2 ms.
//!   A worker also wakes the control thread after it has switched to new sockets, when it has done the last crypto job of a
//!   batch, and when the device or the sockets are gone.
//! - A worker that frees a batch wakes one that waits for it, and a worker that took some staged packets wakes itself for
//!   the rest.
//! - The control thread wakes worker 0: staged packets can be sent. It wakes followers: crypto jobs wait. It wakes all:
//!   sockets were replaced, or stacks must be wiped.
//!
//! # What orders what
//!
//! - The *source lock* of a TUN device or socket orders reads. What depends on the order of packets is done while it is
//!   held: nonces are reserved, packets are staged, and the batch takes its *sequence number*.
//! - The *sequencer* orders writes: a batch is written when all with lower numbers are. A worker that finishes early
//!   parks its batch and continues with another; no worker spins, and none waits for a batch while it holds the source lock.
//! - A *peer's lock* protects its endpoint, keypair slots and staged packets, for the time of a few assignments. A replay
//!   window has a lock of its own. A worker holds one of them at a time.
//! - *Versioned* values (allowed IPs, sockets) are replaced whole. A worker takes over the newest when it wakes; only new
//!   sockets wake it.
//!
//! # The walk of a packet
//!
//! `Worker::outbound` and `Worker::inbound` (`workers::worker`) list the stages of a packet and call each in turn. The
//! documentation of `packets` has the files in the order in which a packet passes them, with what is sequential, what is
//! parallel, and the locks that each stage takes.
//!
//! [`ControlPlane`]: wgsep_proto::device::control_plane::ControlPlane

mod clock;
mod control;
mod drops;
mod helper;
mod line_limit;
mod link;
mod log;
mod packets;
mod random;
mod refusal;
mod secret;
mod start;
mod sys;
mod uapi;
mod vm_clock;
mod workers;

/// As in the program, so that tests can check where key material is allocated.
#[cfg(test)]
#[global_allocator]
static HEAP: Heap = Heap;

pub use packets::offload;
pub use secret::Heap;
pub use start::run;
#[cfg(feature = "fuzzing")]
pub use uapi::FuzzSession;
