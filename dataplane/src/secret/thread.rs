//! Threads whose stacks are in the arena: ciphers leave copies of their keys there.

use super::arena::Mapping;
use super::{heap, page};
use core::ffi::{CStr, c_void};
use core::mem::MaybeUninit;
use core::ptr::null_mut;
use nix::libc;

/// Memory for stacks.
pub(crate) struct Stacks(pub(super) Mapping);

/// Memory for the stack of one thread.
pub(crate) struct Stack(Mapping);

/// Bytes of a stack of which `used` are for the thread's own functions: the C library wants some below
/// them, and refuses a stack that is smaller. glibc counts the thread's static variables and the
/// kernel's signal frame, which depend on the processor: 16 KiB on x86-64, 128 KiB on aarch64.
fn stack_len(used: usize) -> usize {
    let least = nix::unistd::sysconf(nix::unistd::SysconfVar::PTHREAD_STACK_MIN).ok().flatten();
    let least = least.and_then(|least: libc::c_long| usize::try_from(least).ok());
    (least.unwrap_or(libc::PTHREAD_STACK_MIN) + used).next_multiple_of(page())
}

impl Stacks {
    /// Bytes that [`Stacks::take`] takes for a thread that uses as many of its stack.
    pub(crate) fn room(used: usize) -> usize {
        page() + stack_len(used)
    }

    /// Takes a stack for a thread that uses so many bytes of it; below it a page that ends the process if
    /// it overflows.
    ///
    /// # Errors
    /// ENOMEM if there is no room left; as mprotect(2).
    pub(crate) fn take(&mut self, used: usize) -> nix::Result<Stack> {
        let guard = self.0.take(page()).ok_or(nix::Error::ENOMEM)?;
        let stack = self.0.take(stack_len(used)).ok_or(nix::Error::ENOMEM)?;
        // SAFETY: a whole page, taken for this and used for nothing else.
        let outcome =
            unsafe { libc::mprotect(guard.start.as_ptr().cast(), guard.len, libc::PROT_NONE) };
        nix::Error::result(outcome)?;
        Ok(Stack(stack))
    }
}

/// What a thread has to do with secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Allocates {
    /// All that it allocates may be secret.
    Secrets,
    /// It uses keys, but allocates nothing for any.
    Packets,
}

struct Start {
    name: &'static CStr,
    allocates: Allocates,
    body: Box<dyn FnOnce() + Send>,
}

/// Starts a thread on a stack of the arena. Nobody waits for its end.
///
/// # Errors
/// As pthread_create(3).
pub(crate) fn spawn(
    name: &'static CStr,
    Stack(stack): Stack,
    allocates: Allocates,
    body: impl FnOnce() + Send + 'static,
) -> nix::Result<()> {
    let start = Box::into_raw(Box::new(Start { name, allocates, body: Box::new(body) }));
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    let attributes = attributes.as_mut_ptr();
    // SAFETY: room for attributes, as it wants.
    check(unsafe { libc::pthread_attr_init(attributes) })?;
    // SAFETY: initialised above; the stack is memory of that length that nobody else has, and that
    // stays mapped for good.
    check(unsafe {
        libc::pthread_attr_setstack(attributes, stack.start.as_ptr().cast(), stack.len)
    })?;
    let detached = libc::PTHREAD_CREATE_DETACHED;
    // SAFETY: initialised above.
    check(unsafe { libc::pthread_attr_setdetachstate(attributes, detached) })?;
    let mut thread = MaybeUninit::uninit();
    // SAFETY: `run` takes over `start`, which nobody else has.
    let created =
        unsafe { libc::pthread_create(thread.as_mut_ptr(), attributes, run, start.cast()) };
    // SAFETY: initialised above, and used no more.
    check(unsafe { libc::pthread_attr_destroy(attributes) })?;
    check(created)
}

fn check(outcome: libc::c_int) -> nix::Result<()> {
    if outcome == 0 { Ok(()) } else { Err(nix::Error::from_raw(outcome)) }
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

#[cfg(test)]
mod tests {
    use super::super::arena;
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_thread_starts_on_the_stack_of_the_least_use_and_runs() {
        let mut stacks = Stacks(arena::undumpable(Stacks::room(1)).unwrap());
        let stack = stacks.take(1).unwrap();
        assert!(stack.0.start.addr().get().is_multiple_of(page()));
        assert!(stack.0.len.is_multiple_of(page()));
        assert_eq!(stacks.take(1).err(), Some(nix::Error::ENOMEM), "all of the room is taken");
        let (sender, receiver) = mpsc::channel();
        spawn(c"test", stack, Allocates::Packets, move || sender.send(7).unwrap()).unwrap();
        assert_eq!(receiver.recv(), Ok(7));
    }

    #[test]
    fn what_a_thread_uses_is_beyond_what_the_c_library_wants_of_a_stack() {
        for used in [1, 4096, 64 * 1024, 256 * 1024] {
            assert!(stack_len(used) >= libc::PTHREAD_STACK_MIN + used, "{used}");
        }
    }
}
