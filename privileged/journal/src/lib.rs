//! What the helper reports while it runs: lines to a log, its own and the dataplane's, and its state to a
//! service manager. Needs no privilege, has no knowledge of tunnels, and never waits for a reader.
#![forbid(unsafe_code)]

mod log;
mod parts;
mod service_manager;

pub use log::{Format, Log, SYSLOG, Sink};
pub use service_manager::{STORED_QUEUE, ServiceManager};
pub use wgsep_ipc::Level;
