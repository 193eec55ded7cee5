//! The dataplane: a process without capabilities, files, network of its own or most system calls,
//! that holds the keys, carries the packets and serves the UAPI.
//!
//! One control thread owns the protocol's state; workers carry packets from end to end. What they
//! work on, sockets and TUN queues, comes from the helper once the process is sealed.

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
pub use uapi::Dialogue;
