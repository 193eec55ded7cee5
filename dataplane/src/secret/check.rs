//! In builds with debug assertions: checks that key material is in secret memory.

use super::{heap, thread};
use std::ops::Range;
use std::sync::OnceLock;

/// The arena and the overflow pool.
static SECRET_MEMORY: OnceLock<Vec<Range<usize>>> = OnceLock::new();

/// Checks all key material from now on. Only the first call counts.
pub(super) fn set(mapped: &[Range<usize>]) {
    SECRET_MEMORY.get_or_init(|| mapped.to_vec());
    wgsep_proto::secret::set_check(may_be_at);
}

/// Whether this thread may have key material at `address`. Threads that do not have their stack in the arena
/// are those of tests.
fn may_be_at(address: usize) -> bool {
    let memory = SECRET_MEMORY.get().map(Vec::as_slice).unwrap_or_default();
    !thread::is_on_arena_stack()
        // The first of several in one value has failed.
        || std::thread::panicking()
        || heap::pools_were_full()
        || memory.iter().any(|range| range.contains(&address))
}
