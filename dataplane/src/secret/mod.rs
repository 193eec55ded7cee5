//! Memory for secrets, which neither root nor a core file can read.
//!
//! The thread, not the type, decides what is secret. Every value that holds a key is allocated, moved and
//! freed by the control thread. Its whole heap is therefore in the arena, and with it the keys of peers
//! and keypairs, the text of the UAPI, incomplete handshakes and the copies that a growing `Vec` leaves
//! behind. The stacks of all threads that use keys are in the arena too, including those of the workers,
//! which run crypto jobs. No type depends on it, the protocol's crate contains none of it, and the packet
//! path neither allocates nor takes a lock here.
//!
//! Ciphers leave copies of keys on the stacks. [`wipe_stack`] erases them after each batch of handshake
//! messages, and on every thread after a keypair was released: by link down, the removal of a peer, a new
//! handshake or its expiry. Packets of a live keypair wipe nothing.
//!
//! Outside the arena are registers, which the kernel saves when a thread is stopped, and a UAPI client's
//! text in the kernel's buffers.

mod arena;
mod heap;
mod pool;
mod thread;

pub use heap::Heap;
pub(crate) use heap::{overflowed, with_system_allocator};
pub(crate) use thread::{Allocates, Stacks, USUAL_DEPTH, WHOLE_STACK, spawn, wipe_stack};

use arena::Mapping;
use nix::libc;
use std::ops::Range;
use wgsep_policy::State;
use wgsep_policy::limits::{self, LOCKED_MEMORY, SECRET_MEMORY};

/// Least heap, in bytes: the control thread's own needs, and a few peers.
const MIN_HEAP: usize = 256 * 1024;

/// The reserved memory.
pub(crate) struct Reserved {
    /// The state of the layer for the report.
    pub(crate) state: State,
    /// The warning for the operator, if it is not secret memory.
    pub(crate) shortfall: Option<String>,
    /// Stacks for all threads that use keys.
    pub(crate) stacks: Stacks,
    /// Length of the heap, in bytes.
    pub(crate) heap_len: usize,
    /// The mappings, which are permanent.
    pub(crate) mapped: Vec<Range<usize>>,
}

/// Reserves the arena: `stacks_len` bytes for stacks, and as much heap as RLIMIT_MEMLOCK leaves. It is
/// called once, before any thread is started and before the lock-down, after which the arena cannot grow.
/// Where the kernel refuses secret memory, the arena is locked memory; where it refuses that too,
/// ordinary memory.
///
/// # Errors
/// If not even ordinary memory can be had.
pub(crate) fn reserve(stacks_len: usize) -> nix::Result<Reserved> {
    // With too low a limit this requests more than it allows, so that the kernel returns the error.
    let len = limits::locked_memory().min(SECRET_MEMORY).max(stacks_len + MIN_HEAP);
    let (mut arena, state, shortfall) = best(len & !(page() - 1))?;
    let mut mapped = vec![arena.range()];
    let stacks = Stacks(arena.take(stacks_len).ok_or(nix::Error::ENOMEM)?);
    let heap_len = arena.len;
    heap::ARENA.take_over(&arena);
    // The next best: locked if the limit is high enough, or else at least excluded from core files.
    let overflow = arena::locked(LOCKED_MEMORY).or_else(|_| arena::undumpable(LOCKED_MEMORY));
    if let Ok(overflow) = overflow {
        heap::OVERFLOW.take_over(&overflow);
        mapped.push(overflow.range());
    }
    if shortfall.is_some() {
        heap::set_reported();
    }
    Ok(Reserved { state, shortfall, stacks, heap_len, mapped })
}

/// The best memory that the kernel grants, with the state for the report and the operator's warning.
fn best(len: usize) -> nix::Result<(Mapping, State, Option<String>)> {
    let refused = match arena::secret(len) {
        Ok(arena) => return Ok((arena, State::Applied, None)),
        Err(refused) => refused,
    };
    match arena::locked(len) {
        Ok(arena) => {
            let state = match refused {
                nix::Error::ENOSYS => State::Unsupported,
                errno => State::degraded(errno),
            };
            let line = format!(
                "no secret memory (memfd_secret: {}): keys are in locked memory, which root can read",
                refused.desc()
            );
            Ok((arena, state, Some(line)))
        }
        Err(errno) => {
            let line = format!(
                "no secret memory (memfd_secret: {}; mlock: {}): keys are in ordinary memory, which \
                 root can read and the kernel may swap; raise RLIMIT_MEMLOCK",
                refused.desc(),
                errno.desc()
            );
            Ok((arena::undumpable(len)?, State::degraded(errno), Some(line)))
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
