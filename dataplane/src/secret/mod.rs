//! Where secrets live: memory that neither root nor a core file can read.
//!
//! What counts as secret is decided by the thread, not by the type. Whatever keeps a key is allocated,
//! moved and freed by the control thread; so its whole heap is in the arena, and with it the keys of
//! peers and keypairs, the text of the UAPI, the half-done handshake and whatever copy a `Vec` that
//! grows leaves behind. The stacks of all threads that touch keys are there too, those of the workers
//! that help with a handshake as well. No type has to know, the protocol's crate stays free of it, and
//! the packet path neither allocates nor takes a lock here.
//!
//! Ciphers leave copies of keys on the stacks. [`wipe_stack`] erases them after each batch of handshake
//! messages, and on every thread once a keypair was given up: after link down, the removal of a peer, a
//! new handshake or the end of its time. Packets of a session that lives wipe nothing.
//!
//! What remains outside: registers, which the kernel saves when a thread is stopped, and what the
//! kernel buffers of a UAPI client's text.

mod arena;
mod heap;
mod pool;
mod thread;

pub use heap::Heap;
pub(crate) use heap::{ordinarily, overflowed};
pub(crate) use thread::{Allocates, Stacks, USUAL_DEPTH, WHOLE_STACK, spawn, wipe_stack};

use arena::Mapping;
use nix::libc;
use std::ops::Range;
use wgsep_policy::State;
use wgsep_policy::limits::{self, LOCKED_MEMORY, SECRET_MEMORY};

/// Least heap worth having, in bytes: the control thread's own needs, and a few peers.
const MIN_HEAP: usize = 256 * 1024;

/// What was reserved.
pub(crate) struct Reserved {
    /// For the report.
    pub(crate) state: State,
    /// What to tell the operator, where it is not secret memory.
    pub(crate) shortfall: Option<String>,
    /// For all threads that touch keys.
    pub(crate) stacks: Stacks,
    /// What is left for the heap, in bytes.
    pub(crate) heap_len: usize,
    /// All that stays mapped for good.
    pub(crate) mapped: Vec<Range<usize>>,
}

/// Reserves the arena: `stacks_len` bytes for stacks, and as much heap as RLIMIT_MEMLOCK leaves. Once,
/// before any thread is started and before the process is sealed: it cannot grow after. Where the
/// kernel refuses secret memory, the arena is locked memory; where it refuses that too, ordinary.
///
/// # Errors
/// If not even ordinary memory can be had.
pub(crate) fn reserve(stacks_len: usize) -> nix::Result<Reserved> {
    // With too low a limit this asks for more than it allows, for the kernel to say so.
    let len = limits::locked_memory().min(SECRET_MEMORY).max(stacks_len + MIN_HEAP);
    let (mut arena, state, shortfall) = best(len & !(page() - 1))?;
    let mut mapped = vec![arena.range()];
    let stacks = Stacks(arena.take(stacks_len).ok_or(nix::Error::ENOMEM)?);
    let heap_len = arena.len;
    heap::ARENA.take_over(&arena);
    // What comes closest: locked if the limit is high enough, or else at least in no core file.
    let overflow = arena::locked(LOCKED_MEMORY).or_else(|_| arena::undumpable(LOCKED_MEMORY));
    if let Ok(overflow) = overflow {
        heap::OVERFLOW.take_over(&overflow);
        mapped.push(overflow.range());
    }
    if shortfall.is_some() {
        heap::expect_no_more();
    }
    Ok(Reserved { state, shortfall, stacks, heap_len, mapped })
}

/// The best memory that the kernel gives; how that is reported, and told.
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
