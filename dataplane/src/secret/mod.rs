//! Where secrets live: memory that neither root nor a core file can read.
//!
//! What counts as secret is decided by the thread, not by the type. Every key is made, moved and
//! forgotten by the control thread; so its whole heap is in the arena, and with it the keys of peers
//! and keypairs, the text of the UAPI, the half-done handshake and whatever copy a `Vec` that grows
//! leaves behind. The stacks of all threads that touch keys are there too. No type has to know, the
//! protocol's crate stays free of it, and the packet path neither allocates nor takes a lock here.
//!
//! What remains outside: registers, which the kernel saves when a thread is stopped, and what the
//! kernel buffers of a UAPI client's text.

mod arena;
mod heap;
mod thread;

pub use heap::Heap;
pub(crate) use heap::{ordinarily, overflowed};
pub(crate) use thread::{Allocates, spawn};

use nix::libc;
use wgsep_policy::State;

/// Address space of the arena, in bytes: the stacks, and the control thread's heap. Pages are taken
/// as they are first used. Smaller where RLIMIT_MEMLOCK is.
pub(crate) const ARENA_LEN: usize = wgsep_policy::limits::SECRET_MEMORY;
/// Where a launcher without privileges has a small RLIMIT_MEMLOCK, at least this.
const MIN_ARENA_LEN: usize = 4 << 20;

/// What protects the arena.
pub(crate) struct Reserved {
    /// For the report.
    pub(crate) state: State,
    /// Bytes.
    pub(crate) len: usize,
}

/// Reserves the arena, and ordinary memory that is never swapped for what does not fit into it. Once,
/// before any thread is started and before the process is sealed: it cannot grow after.
///
/// # Errors
/// If not even ordinary memory can be had.
pub(crate) fn reserve() -> nix::Result<Reserved> {
    let (arena, state) = match largest(arena::secret) {
        Ok(arena) => (arena, State::Applied),
        Err(refused) => {
            let state = match refused {
                nix::Error::ENOSYS => State::Unsupported,
                errno => State::degraded(errno),
            };
            (largest(arena::locked).or_else(|_| arena::undumpable(ARENA_LEN))?, state)
        }
    };
    thread::keep_stacks_in(heap::ARENA.take_over(&arena));
    if let Ok(overflow) = arena::locked(wgsep_policy::limits::LOCKED_MEMORY) {
        heap::OVERFLOW.take_over(&overflow);
    }
    Ok(Reserved { state, len: arena.len })
}

fn largest(reserve: impl Fn(usize) -> nix::Result<arena::Mapping>) -> nix::Result<arena::Mapping> {
    let mut len = ARENA_LEN;
    loop {
        match reserve(len) {
            // The limit on locked memory: EAGAIN from mmap, ENOMEM from mlock.
            Err(nix::Error::EAGAIN | nix::Error::ENOMEM) if len / 2 >= MIN_ARENA_LEN => len /= 2,
            outcome => return outcome,
        }
    }
}

/// Bytes of a page.
fn page() -> usize {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|page: libc::c_long| usize::try_from(page).ok())
        .unwrap_or(4096)
}
