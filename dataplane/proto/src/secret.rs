//! Key material: erased on drop and, in tests, checked to be in the memory that the program keeps for secrets.
//!
//! This crate does not decide where a value is allocated: the program's allocator does. A program whose allocator puts
//! secrets in special memory states with [`set_check`] which addresses that is. A build with debug assertions
//! then panics if key material is used or dropped anywhere else. Without [`set_check`], or without debug
//! assertions, nothing is checked.
//!
//! Secret memory may be scarce, so what holds no key material and is large or numerous is allocated in
//! ordinary memory, by way of a [`Switch`].
//!
//! Every type that holds key material therefore consists of [`Secret`]s, or calls [`check`] when it is used and when it
//! is dropped; a test of the source verifies it.

use core::ops::{Deref, DerefMut};
use std::sync::OnceLock;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Key material, by default 32 bytes. It is erased on drop, and has no `Debug`.
#[derive(Clone, Default)]
pub struct Secret<T: Zeroize = [u8; 32]> {
    value: T,
    place: SecretPlace,
}

impl<T: Zeroize> Secret<T> {
    /// Wraps key material.
    #[must_use]
    pub const fn new(value: T) -> Self {
        Self { value, place: SecretPlace }
    }

    /// The key material, as a constant function, which cannot check where it is.
    #[must_use]
    pub const fn value(&self) -> &T {
        &self.value
    }
}

impl<T: Zeroize> Deref for Secret<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.place.check();
        &self.value
    }
}

impl<T: Zeroize> DerefMut for Secret<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.place.check();
        &mut self.value
    }
}

impl<T: Zeroize> Zeroize for Secret<T> {
    fn zeroize(&mut self) {
        self.value.zeroize();
    }
}

impl<T: Zeroize> ZeroizeOnDrop for Secret<T> {}

impl<T: Zeroize> Drop for Secret<T> {
    fn drop(&mut self) {
        self.value.zeroize();
    }
}

#[cfg(feature = "internals")]
impl<T: Zeroize + serde::Serialize> serde::Serialize for Secret<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (**self).serialize(serializer)
    }
}

#[cfg(feature = "internals")]
impl<'d, T: Zeroize + serde::Deserialize<'d>> serde::Deserialize<'d> for Secret<T> {
    fn deserialize<D: serde::Deserializer<'d>>(deserializer: D) -> Result<Self, D::Error> {
        T::deserialize(deserializer).map(Self::new)
    }
}

/// Checks its address when it is dropped.
#[derive(Clone, Default)]
struct SecretPlace;

impl SecretPlace {
    #[inline(always)]
    #[track_caller]
    fn check(&self) {
        check(core::ptr::from_ref(self));
    }
}

#[cfg(debug_assertions)]
impl Drop for SecretPlace {
    fn drop(&mut self) {
        self.check();
    }
}

/// Sets whether what the calling thread allocates is in secret memory; returns whether it was before.
pub type Switch = fn(is_secret: bool) -> bool;

static SWITCH: OnceLock<Switch> = OnceLock::new();

/// Sets how allocations are switched between secret and ordinary memory. Only the first call has an effect.
pub fn set_switch(switch: Switch) {
    SWITCH.get_or_init(|| switch);
}

/// Allocates what holds no key material, in ordinary memory if the program has set a [`Switch`].
pub fn in_ordinary_memory<T>(allocate: impl FnOnce() -> T) -> T {
    let Some(switch) = SWITCH.get() else { return allocate() };
    let before = switch(false);
    let allocated = allocate();
    switch(before);
    allocated
}

/// Whether the calling thread may have key material at an address.
pub type Check = fn(address: usize) -> bool;

#[cfg(debug_assertions)]
static CHECK: OnceLock<Check> = OnceLock::new();

/// Sets the check of all key material of the process. Only the first call has an effect.
#[cfg_attr(not(debug_assertions), allow(unused_variables))]
pub fn set_check(check: Check) {
    #[cfg(debug_assertions)]
    CHECK.get_or_init(|| check);
}

/// Checks that `at` is in secret memory.
///
/// # Panics
/// With debug assertions, if it is not.
#[inline(always)]
#[track_caller]
#[cfg_attr(not(debug_assertions), allow(unused_variables))]
pub fn check<T>(at: *const T) {
    #[cfg(debug_assertions)]
    if let Some(may_be_at) = CHECK.get() {
        assert!(may_be_at(at.addr()), "key material outside secret memory, at {at:?}");
    }
}
