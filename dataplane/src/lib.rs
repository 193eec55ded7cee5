//! The dataplane: the process that holds the keys, carries the packets and serves the UAPI, without
//! capabilities, files, a network of its own or most system calls.
//!
//! One control thread owns the protocol's state; workers process packets from the read to the write. The
//! helper passes the sockets and TUN queues after the process is locked down.

mod clock;
mod control;
mod dumps;
mod helper;
mod line_limit;
mod link;
mod log;
mod netlink;
mod packets;
mod random;
mod refusal;
mod routes;
mod secret;
mod start;
mod sys;
mod uapi;
mod vm_clock;
mod workers;

pub use packets::offload;
pub use secret::Heap;
pub use start::run;
#[cfg(feature = "fuzzing")]
pub use uapi::FuzzSession;
