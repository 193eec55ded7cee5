//! Threads whose stacks are in the arena: ciphers leave copies of their keys there.

use super::heap::{self, Pool};
use super::page;
use core::ffi::{CStr, c_void};
use core::mem::MaybeUninit;
use core::ptr::null_mut;
use nix::libc;
use std::sync::OnceLock;

static STACKS: OnceLock<&'static Pool> = OnceLock::new();

/// Which memory the stacks of [`spawn`] are made of.
pub(super) fn keep_stacks_in(pool: &'static Pool) {
    STACKS.get_or_init(|| pool);
}

/// What a thread has to do with secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Allocates {
    /// All that it allocates may be secret.
    Secrets,
    /// It uses keys, but makes none.
    Packets,
}

struct Start {
    name: &'static CStr,
    allocates: Allocates,
    body: Box<dyn FnOnce() + Send>,
}

/// Starts a thread with a stack of `stack_len` bytes in the arena, below it a page that ends the
/// process if it overflows. Nobody waits for its end.
///
/// # Errors
/// ENOMEM if the arena is not reserved or too small; as pthread_create(3).
pub(crate) fn spawn(
    name: &'static CStr,
    stack_len: usize,
    allocates: Allocates,
    body: impl FnOnce() + Send + 'static,
) -> nix::Result<()> {
    let stack = stack(stack_len)?;
    let start = Box::into_raw(Box::new(Start { name, allocates, body: Box::new(body) }));
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    let attributes = attributes.as_mut_ptr();
    // SAFETY: room for attributes, as it wants.
    check(unsafe { libc::pthread_attr_init(attributes) })?;
    // SAFETY: initialised above; the stack is fresh memory of that length that nobody else has.
    check(unsafe { libc::pthread_attr_setstack(attributes, stack.cast(), stack_len) })?;
    let detached = libc::PTHREAD_CREATE_DETACHED;
    // SAFETY: initialised above.
    check(unsafe { libc::pthread_attr_setdetachstate(attributes, detached) })?;
    let mut thread = MaybeUninit::uninit();
    // SAFETY: `run` takes over `start`, which nobody else has.
    let created =
        unsafe { libc::pthread_create(thread.as_mut_ptr(), attributes, run, start.cast()) };
    check(created)
}

fn check(outcome: libc::c_int) -> nix::Result<()> {
    if outcome == 0 { Ok(()) } else { Err(nix::Error::from_raw(outcome)) }
}

/// A stack with a page before it that nobody can touch.
fn stack(len: usize) -> nix::Result<*mut u8> {
    let guard_len = page();
    let pool = STACKS.get().ok_or(nix::Error::ENOMEM)?;
    let guard = pool.take(guard_len + len, guard_len).ok_or(nix::Error::ENOMEM)?;
    // SAFETY: a whole page, taken for this and used for nothing else.
    let outcome = unsafe { libc::mprotect(guard.cast(), guard_len, libc::PROT_NONE) };
    nix::Error::result(outcome)?;
    Ok(guard.wrapping_add(guard_len))
}

extern "C" fn run(start: *mut c_void) -> *mut c_void {
    // SAFETY: the pointer that `spawn` made of a box and gave away.
    let start = unsafe { Box::from_raw(start.cast::<Start>()) };
    // glibc's own call would open a file for any thread but the caller.
    // SAFETY: a name that ends with NUL; the kernel copies it.
    unsafe { libc::prctl(libc::PR_SET_NAME, start.name.as_ptr()) };
    if start.allocates == Allocates::Secrets {
        heap::allocate_secretly();
    }
    (start.body)();
    null_mut()
}
