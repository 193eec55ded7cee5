//! Resource limits.

use nix::sys::resource::{Resource, setrlimit};

/// Descriptors a dataplane may have: UAPI clients, workers, sockets, TUN queues, and some room.
pub const MAX_DESCRIPTORS: u64 = 256;

/// No core file.
///
/// # Errors
/// As setrlimit(2).
pub fn no_core() -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)
}

/// What the dataplane lives with from before it is executed: no core file, no file growth, few
/// descriptors.
///
/// # Errors
/// As setrlimit(2).
pub fn limit_dataplane() -> nix::Result<()> {
    no_core()?;
    setrlimit(Resource::RLIMIT_FSIZE, 0, 0)?;
    setrlimit(Resource::RLIMIT_NOFILE, MAX_DESCRIPTORS, MAX_DESCRIPTORS)
}

/// No new process or thread; only once all threads run.
///
/// # Errors
/// As setrlimit(2).
pub fn no_processes() -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_NPROC, 0, 0)
}
