//! Invariants: asserted in tests and fuzzing. In the program that ships, code that finds one violated returns early,
//! because no packet may cause a panic.

use core::ops::Range;

/// The part of a slice that lies in `range`, which is within it.
#[track_caller]
pub fn part<T>(slice: &[T], range: Range<usize>) -> &[T] {
    debug_assert!(range.start <= range.end && range.end <= slice.len(), "{range:?}");
    slice.get(range).unwrap_or_default()
}

/// Returns `value`, which is always there, for the reason that `why` gives.
#[track_caller]
pub fn present<T>(value: Option<T>, why: &str) -> Option<T> {
    debug_assert!(value.is_some(), "{why}");
    value
}
