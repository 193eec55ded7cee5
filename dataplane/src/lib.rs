//! The dataplane: the process that holds the keys, carries the packets and serves the UAPI, without
//! capabilities, files, a network of its own or most system calls.
//!
//! One control thread owns the protocol's state; workers process packets from the read to the write. The
//! helper passes the sockets and TUN queues after the process is locked down.

mod buffers;
mod clock;
mod control;
mod crypto_pool;
mod dumps;
mod flow_queues;
mod gso;
mod helper;
mod leader;
mod line_limit;
mod link;
mod log;
mod netlink;
pub mod offload;
mod random;
mod refusal;
mod routes;
mod secret;
mod sequencer;
mod shared;
mod start;
mod sys;
mod tun;
mod uapi;
mod udp;
mod vm_clock;
mod worker;

pub use secret::Heap;
pub use start::run;
#[cfg(feature = "fuzzing")]
pub use uapi::FuzzSession;
