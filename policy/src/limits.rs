//! Resource limits.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Descriptors a dataplane may have: UAPI clients, workers, sockets, TUN queues, and some room.
pub const MAX_DESCRIPTORS: u64 = 256;

/// Bytes of secret memory that the dataplane reserves, or as many as its limit on locked memory allows.
pub const SECRET_MEMORY: usize = 64 << 20;
/// Bytes of memory for what does not fit into it, locked if the limit allows that too.
pub const LOCKED_MEMORY: usize = 256 << 20;
/// Both.
const LOCKED_TOTAL: u64 = (SECRET_MEMORY + LOCKED_MEMORY) as u64;

/// No core file.
///
/// # Errors
/// As setrlimit(2).
pub fn no_core() -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)
}

/// What the dataplane lives with from before it is executed: no core file, few descriptors, and, as
/// far as the launcher's privileges allow, room for its secrets in memory that is never swapped.
///
/// # Errors
/// As setrlimit(2).
pub fn limit_dataplane() -> nix::Result<()> {
    no_core()?;
    allow_locked_memory()?;
    setrlimit(Resource::RLIMIT_NOFILE, MAX_DESCRIPTORS, MAX_DESCRIPTORS)
}

/// Raises the limit on locked memory; without the privilege, to what the launcher was allowed.
fn allow_locked_memory() -> nix::Result<()> {
    let memlock = Resource::RLIMIT_MEMLOCK;
    setrlimit(memlock, LOCKED_TOTAL, LOCKED_TOTAL).or_else(|_| {
        let (_, most) = getrlimit(memlock)?;
        setrlimit(memlock, most, most)
    })
}

/// Bytes of locked memory that this process may have.
#[must_use]
pub fn locked_memory() -> usize {
    getrlimit(Resource::RLIMIT_MEMLOCK)
        .map_or(0, |(now, _)| usize::try_from(now).unwrap_or(usize::MAX))
}

/// No file can grow; only once secret memory has its size, which counts as a file's.
///
/// # Errors
/// As setrlimit(2).
pub fn no_file_growth() -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_FSIZE, 0, 0)
}

/// No new process or thread; only once all threads run.
///
/// # Errors
/// As setrlimit(2).
pub fn no_processes() -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_NPROC, 0, 0)
}
