//! A pool allocator with size classes, four to each doubling.
//!
//! A freed block is erased and put on the free list of its class. Blocks are neither merged nor returned
//! to the kernel, because a configuration needs the same memory again.

use super::arena::Mapping;
use core::alloc::Layout;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use wgsep_proto::invariant::present;

/// Size of the smallest block, which holds the link of a free list, and the alignment of every block.
const UNIT: usize = 16;
/// Four of one to four units, then four to each doubling up to 2^27 bytes.
const CLASSES: usize = 4 + 4 * 21;
/// No block is aligned to more.
const MAX_ALIGN: usize = 4096;

/// The class of a block that `layout` fits into, and the size of its blocks. A layout of more than
/// 16 bytes' alignment gets a power of two, whose blocks are aligned to their size, up to a page.
fn class(layout: Layout) -> Option<(usize, usize)> {
    let size = if layout.align() > UNIT {
        layout.size().max(layout.align()).checked_next_power_of_two()?
    } else {
        layout.size().max(1)
    };
    if layout.align() > MAX_ALIGN {
        return None;
    }
    if size <= 4 * UNIT {
        let units = size.div_ceil(UNIT);
        return Some((units - 1, units * UNIT));
    }
    let doubling = (size - 1).ilog2();
    let quarter = ((size - 1) >> (doubling - 2)) & 3;
    let number = 4 + 4 * (doubling as usize - 6) + quarter;
    let size = (1 << doubling) + ((quarter + 1) << (doubling - 2));
    (number < CLASSES).then_some((number, size))
}

/// Bytes of a block for `layout`.
#[cfg(test)]
pub(super) fn block_size(layout: Layout) -> usize {
    class(layout).map_or(0, |(_, size)| size)
}

/// Whether a block for one layout is one for the other, too.
pub(super) fn same_class(one: Layout, other: Layout) -> bool {
    class(one) == class(other)
}

fn alignment(size: usize) -> usize {
    if size.is_power_of_two() { size.min(MAX_ALIGN) } else { UNIT }
}

/// Memory to make blocks of.
pub(super) struct Pool {
    start: AtomicUsize,
    end: AtomicUsize,
    blocks: Mutex<Blocks>,
}

struct Blocks {
    /// Start of the memory that was never allocated.
    fresh: *mut u8,
    /// Length of that memory, in bytes.
    left: usize,
    free: [*mut u8; CLASSES],
}

// SAFETY: the pointers are to memory that belongs to the pool alone, whichever thread uses it.
unsafe impl Send for Blocks {}

impl Pool {
    pub(super) const fn new() -> Self {
        let blocks = Blocks { fresh: null_mut(), left: 0, free: [null_mut(); CLASSES] };
        Self { start: AtomicUsize::new(0), end: AtomicUsize::new(0), blocks: Mutex::new(blocks) }
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the mapping from which blocks are allocated. It is called once, as the pool recognises its blocks
    /// by the addresses of one mapping.
    pub(super) fn take_over(&self, mapping: &Mapping) {
        let start = mapping.start.as_ptr();
        let mut blocks = self.blocks();
        (blocks.fresh, blocks.left) = (start, mapping.len);
        self.start.store(start.addr(), Ordering::Relaxed);
        // A thread that reads the new end also reads the new start.
        self.end.store(start.addr() + mapping.len, Ordering::Release);
    }

    /// Whether a block is of this pool.
    pub(super) fn holds(&self, block: *mut u8) -> bool {
        let address = block.addr();
        address < self.end.load(Ordering::Acquire) && address >= self.start.load(Ordering::Relaxed)
    }

    /// A block for `layout`; `None` if none is left.
    pub(super) fn allocate(&self, layout: Layout) -> Option<*mut u8> {
        let (number, size) = class(layout)?;
        let mut blocks = self.blocks();
        let free = blocks.free[number];
        if free.is_null() {
            return blocks.take(size, alignment(size));
        }
        // SAFETY: a block on a free list starts with the pointer to the next, and is aligned for it.
        blocks.free[number] = unsafe { free.cast::<*mut u8>().read() };
        Some(free)
    }

    /// Erases a block and puts it on its free list.
    ///
    /// # Safety
    /// `block` was allocated here with this `layout`, and is used no more.
    pub(super) unsafe fn free(&self, block: *mut u8, layout: Layout) {
        let Some((number, _)) = present(class(layout), "a block was allocated for it") else {
            return;
        };
        // SAFETY: the block is the caller's to give, and as long as its layout says.
        unsafe { erase(block, layout.size()) };
        let mut blocks = self.blocks();
        // SAFETY: a block has at least 16 bytes, aligned to as many.
        unsafe { block.cast::<*mut u8>().write(blocks.free[number]) };
        blocks.free[number] = block;
    }
}

impl Blocks {
    /// Takes `len` bytes that were never used, at a multiple of `align`; `None` if not so many are left.
    fn take(&mut self, len: usize, align: usize) -> Option<*mut u8> {
        let skipped = self.fresh.align_offset(align);
        let needed = len.checked_add(skipped)?;
        if self.fresh.is_null() || needed > self.left {
            return None;
        }
        let taken = self.fresh.wrapping_add(skipped);
        self.fresh = self.fresh.wrapping_add(needed);
        self.left -= needed;
        Some(taken)
    }
}

/// Writes zeros that the compiler must not eliminate as dead stores.
///
/// # Safety
/// `block` has `len` writable bytes.
pub(super) unsafe fn erase(block: *mut u8, len: usize) {
    // SAFETY: as the caller says.
    unsafe { block.write_bytes(0, len) };
    core::hint::black_box(block);
}

#[cfg(test)]
mod tests {
    use super::super::arena;
    use super::*;

    fn pool(len: usize) -> &'static Pool {
        let pool: &'static Pool = Box::leak(Box::new(Pool::new()));
        pool.take_over(&arena::undumpable(len).unwrap());
        pool
    }

    #[test]
    fn every_layout_gets_a_block_that_is_long_and_aligned_enough() {
        let pool = pool(64 << 20);
        let sizes = (0..300).chain([511, 512, 513, 4095, 4096, 4097, 100_000, 1 << 20]);
        let mut last_end = 0;
        for size in sizes {
            for align in [1, 2, 8, 16, 32, 64, 128, 4096] {
                let layout = Layout::from_size_align(size, align).unwrap();
                let (_, block_size) = class(layout).unwrap();
                assert!(block_size >= size && block_size.is_multiple_of(UNIT), "{layout:?}");
                assert!(block_size <= (size.max(align) * 2).max(UNIT), "{layout:?} wastes half");
                let block = pool.allocate(layout).unwrap();
                assert!(
                    block.addr().is_multiple_of(align) && block.addr() >= last_end,
                    "{layout:?}"
                );
                assert!(pool.holds(block));
                last_end = block.addr() + block_size;
            }
        }
    }

    #[test]
    fn a_freed_block_is_erased_and_given_out_again() {
        let pool = pool(1 << 20);
        let layout = Layout::new::<[u8; 100]>();
        let block = pool.allocate(layout).unwrap();
        // SAFETY: the block has a hundred bytes.
        unsafe { block.write_bytes(7, 100) };
        // SAFETY: it was allocated above with this layout.
        unsafe { pool.free(block, layout) };
        assert_eq!(pool.allocate(layout), Some(block));
        // SAFETY: it is still mapped, and has a hundred bytes, all of them written.
        let bytes = unsafe { core::slice::from_raw_parts(block, 100) };
        assert!(bytes.iter().all(|byte| *byte == 0), "{bytes:?}");
    }

    #[test]
    fn a_full_pool_and_a_monstrous_layout_give_none() {
        let pool = pool(1 << 16);
        let page = Layout::from_size_align(4096, 16).unwrap();
        assert_eq!(std::iter::from_fn(|| pool.allocate(page)).count(), 16);
        assert_eq!(pool.allocate(Layout::from_size_align(1 << 40, 1).unwrap()), None);
        assert_eq!(pool.allocate(Layout::from_size_align(64, 8192).unwrap()), None);
        assert!(!pool.holds(null_mut()));
    }

    #[test]
    fn pools_not_reserved_leave_everything_to_the_system() {
        assert_eq!(Pool::new().allocate(page_layout()), None);
        assert!(!Pool::new().holds(8 as *mut u8));
    }

    fn page_layout() -> Layout {
        Layout::from_size_align(4096, 16).unwrap()
    }
}
