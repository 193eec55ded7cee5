//! What the helper tells: lines to a log, its own and the dataplane's; its state to a service manager;
//! and how the start went to whoever waits for that. Needs no privilege, knows nothing of tunnels, and
//! never waits for whoever listens.
#![forbid(unsafe_code)]

mod launcher;
mod log;
mod service_manager;

pub use launcher::{Launcher, complain};
pub use log::{Format, Level, Log};
pub use service_manager::ServiceManager;
