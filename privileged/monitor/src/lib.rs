//! The helper, once the dataplane is started: it gives up its privileges, verifies that the dataplane is
//! confined, hands the interface over, and answers its requests.
//!
//! Hostile bytes reach all of it but `lock_down` and `events`, through `ipc` and into `journal`. What comes
//! before takes input from the operator only, and is the crate `launch`. It holds no key and sees no
//! packet. Read it in the order in which it runs: `lock_down`, `monitor`, `events`, `requests`, `udp`;
//! `sys` has all the unsafe code. What it observes of the host is in the crate `host`.

mod events;
mod lock_down;
mod monitor;
mod requests;
mod state;
mod sys;
mod udp;
mod upgrade;

pub use lock_down::{Dataplane, Interface, Unconfined};
#[cfg(feature = "fuzzing")]
pub use requests::{Requests, Served};
pub use state::{Monitor, Process};
pub use udp::{UdpOptions, UdpSockets};
pub use wgsep_host::{
    DIRECTORY, Error, Generation, OwnFile, Result, SocketFile, Step, kernel_log_number, objection,
    poll,
};
pub use wgsep_policy::Grants;
