//! The allocator of the program: the control thread's heap is in the arena, the others' is the system's.

#[cfg(test)]
use super::pool::block_size;
use super::pool::{Pool, erase, same_class};
use core::alloc::{GlobalAlloc, Layout};
use core::cell::Cell;
use core::sync::atomic::{AtomicBool, Ordering};
use std::alloc::System;

/// The secret arena.
pub(super) static ARENA: Pool = Pool::new();
/// Memory for what the arena cannot hold: never swapped, but readable by root.
pub(super) static OVERFLOW: Pool = Pool::new();
static OVERFLOWED: AtomicBool = AtomicBool::new(false);
/// True once a secret was allocated by the system, because both pools were full.
#[cfg(debug_assertions)]
static POOLS_WERE_FULL: AtomicBool = AtomicBool::new(false);
static REPORTED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// True if what this thread allocates may be secret.
    static SECRET: Cell<bool> = const { Cell::new(false) };
    /// Bytes of the blocks that this thread has allocated in a pool and not freed.
    #[cfg(test)]
    static SECRET_BYTES: Cell<usize> = const { Cell::new(0) };
}

/// Makes all further allocations of this thread secret.
pub(super) fn allocate_secretly() {
    SECRET.set(true);
}

/// Sets whether what this thread allocates is secret; returns whether it was before.
pub(super) fn switch(is_secret: bool) -> bool {
    SECRET.replace(is_secret)
}

/// True, once, after secrets were stored where root can read them.
pub(crate) fn overflowed() -> bool {
    OVERFLOWED.load(Ordering::Relaxed) && !REPORTED.swap(true, Ordering::Relaxed)
}

/// Whether any secret was allocated outside both pools, which were full.
#[cfg(debug_assertions)]
pub(super) fn pools_were_full() -> bool {
    POOLS_WERE_FULL.load(Ordering::Relaxed)
}

/// Records that the operator has already been warned that root can read the secrets.
pub(super) fn set_reported() {
    REPORTED.store(true, Ordering::Relaxed);
}

/// Bytes of secret memory that this thread has allocated, and not freed.
#[cfg(test)]
pub(super) fn secret_bytes() -> usize {
    SECRET_BYTES.get()
}

/// The program's allocator, to be named in its `#[global_allocator]`.
#[derive(Debug)]
pub struct Heap;

/// Allocates a block for a secret: in the arena, or else in the overflow pool.
///
/// # Safety
/// As [`GlobalAlloc::alloc`].
unsafe fn allocate_secret(layout: Layout) -> *mut u8 {
    #[cfg(test)]
    SECRET_BYTES.set(SECRET_BYTES.get().wrapping_add(block_size(layout)));
    if let Some(block) = ARENA.allocate(layout) {
        return block;
    }
    OVERFLOWED.store(true, Ordering::Relaxed);
    match OVERFLOW.allocate(layout) {
        Some(block) => block,
        None => {
            #[cfg(debug_assertions)]
            POOLS_WERE_FULL.store(true, Ordering::Relaxed);
            // SAFETY: the same contract.
            unsafe { System.alloc(layout) }
        }
    }
}

fn is_pooled(block: *mut u8) -> bool {
    ARENA.holds(block) || OVERFLOW.holds(block)
}

// SAFETY: every block comes from a pool or from the system's allocator, unshared and aligned as its
// layout asks, and goes back to where its address says that it came from.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if SECRET.get() {
            // SAFETY: the same contract.
            return unsafe { allocate_secret(layout) };
        }
        // SAFETY: the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !SECRET.get() {
            // SAFETY: the same contract.
            return unsafe { System.alloc_zeroed(layout) };
        }
        // SAFETY: the same contract.
        let block = unsafe { allocate_secret(layout) };
        if !block.is_null() {
            // One that was used before starts with the link of its list.
            // SAFETY: it is as long as the layout says.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        for pool in [&ARENA, &OVERFLOW] {
            if pool.holds(block) {
                #[cfg(test)]
                SECRET_BYTES.set(SECRET_BYTES.get().wrapping_sub(block_size(layout)));
                // SAFETY: it came from there, and its contract is the same.
                return unsafe { pool.free(block, layout) };
            }
        }
        if SECRET.get() {
            // SAFETY: it is as long as the layout says, and used no more.
            unsafe { erase(block, layout.size()) };
        }
        // SAFETY: it came from there.
        unsafe { System.dealloc(block, layout) }
    }

    /// Keeps a secret in secret memory, whichever thread moves it. A block that grows is copied, because
    /// the system's realloc would call mremap(2) for a large one.
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let pooled = is_pooled(block);
        // SAFETY: the caller's `size` is valid for the alignment.
        let wanted = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        if pooled && size >= layout.size() && same_class(layout, wanted) {
            return block;
        }
        let moved = if pooled || SECRET.get() {
            // SAFETY: the caller's `size` is not zero.
            unsafe { allocate_secret(wanted) }
        } else {
            // SAFETY: as above.
            unsafe { System.alloc(wanted) }
        };
        if !moved.is_null() {
            let kept = layout.size().min(size);
            // SAFETY: both blocks have that many bytes, and they are two.
            unsafe { moved.copy_from_nonoverlapping(block, kept) };
            // SAFETY: the caller gives the old block up.
            unsafe { self.dealloc(block, layout) };
        }
        moved
    }
}
