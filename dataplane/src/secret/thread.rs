//! Threads whose stacks are in the arena: ciphers leave copies of their keys there.

use super::arena::Mapping;
use super::{heap, page};
use core::cell::Cell;
use core::ffi::{CStr, c_void};
use core::mem::MaybeUninit;
use core::ptr::null_mut;
use nix::libc;

/// Memory for stacks.
pub(crate) struct Stacks(pub(super) Mapping);

/// Memory for the stack of one thread.
pub(crate) struct Stack(Mapping);

/// Bytes of a stack of which `used` are for the thread's own functions: the C library needs some below
/// them, and refuses a stack that is smaller. glibc counts the thread's static variables and the
/// kernel's signal frame, which depend on the processor: 16 KiB on x86-64, 128 KiB on aarch64.
fn stack_len(used: usize) -> usize {
    let least = nix::unistd::sysconf(nix::unistd::SysconfVar::PTHREAD_STACK_MIN).ok().flatten();
    let least = least.and_then(|least: libc::c_long| usize::try_from(least).ok());
    (least.unwrap_or(libc::PTHREAD_STACK_MIN) + used).next_multiple_of(page())
}

impl Stacks {
    /// Length that [`Stacks::take`] takes for a thread that uses `used` bytes of its stack.
    pub(crate) fn len_for(used: usize) -> usize {
        page() + stack_len(used)
    }

    /// Takes a stack for a thread that uses `used` bytes of it, with a guard page below, which ends the process
    /// on overflow.
    ///
    /// # Errors
    /// ENOMEM if not enough is left; as mprotect(2).
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

/// Whether a thread allocates secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Allocates {
    /// All that it allocates may be secret.
    Secrets,
    /// It uses keys, but allocates nothing for any.
    Packets,
}

thread_local! {
    /// Where the stack of this thread ends, or 0 if it is not one of the arena's.
    static STACK_END: Cell<usize> = const { Cell::new(0) };
}

/// Whether this thread was started by [`spawn`], so that its stack is in the arena.
#[cfg(debug_assertions)]
pub(super) fn is_on_arena_stack() -> bool {
    STACK_END.get() != 0
}

/// Depth in bytes that functions that use keys reach below those that wait, with a margin. A test of the
/// shipped program verifies that no key is left below it.
pub(crate) const USUAL_DEPTH: usize = 32 * 1024;
/// All of a stack: 80 KiB of a worker's and 270 KiB of the control thread's on x86-64, which takes ten times
/// as long as [`USUAL_DEPTH`].
pub(crate) const WHOLE_STACK: usize = usize::MAX & !15;

/// Erases what functions that have returned left on this thread's stack, `depth` bytes from the caller down.
/// What they left in the caller's own frame stays, so whatever uses keys must not be inlined there; for the
/// same reason this is.
#[inline(always)]
pub(crate) fn wipe_stack(depth: usize) {
    debug_assert!(depth.is_multiple_of(16), "whole words are written");
    let end = STACK_END.get();
    if end == 0 {
        return;
    }
    // SAFETY: from the lowest address of the stack up to its pointer nothing is in use: assembly that may
    // push has the compiler keep nothing below the pointer, and no signal has a handler. The end is aligned
    // to a page, and the pointer to 16 bytes.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        core::arch::asm!(
            "mov rax, rsp",
            "sub rax, rdi",
            "cmp rax, rcx",
            "cmova rax, rcx",
            "mov rdi, rsp",
            "sub rdi, rax",
            "mov rcx, rax",
            "shr rcx, 3",
            "xor eax, eax",
            "rep stosq",
            inout("rdi") end => _,
            inout("rcx") depth => _,
            out("rax") _,
        );
    }
    // SAFETY: as above.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        core::arch::asm!(
            "mov {top}, sp",
            "sub {len}, {top}, {at}",
            "cmp {len}, {depth}",
            "csel {len}, {depth}, {len}, hi",
            "sub {at}, {top}, {len}",
            "2:",
            "cmp {at}, {top}",
            "b.hs 3f",
            "stp xzr, xzr, [{at}], #16",
            "b 2b",
            "3:",
            at = inout(reg) end => _,
            depth = in(reg) depth,
            top = out(reg) _,
            len = out(reg) _,
        );
    }
}

struct Start {
    name: &'static CStr,
    stack_end: usize,
    allocates: Allocates,
    body: Box<dyn FnOnce() + Send>,
}

/// Starts a detached thread on a stack of the arena.
///
/// # Errors
/// As pthread_create(3).
pub(crate) fn spawn(
    name: &'static CStr,
    Stack(stack): Stack,
    allocates: Allocates,
    body: impl FnOnce() + Send + 'static,
) -> nix::Result<()> {
    let stack_end = stack.start.addr().get();
    let start = Start { name, stack_end, allocates, body: Box::new(body) };
    let start = Box::into_raw(Box::new(start));
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    let attributes = attributes.as_mut_ptr();
    // SAFETY: a valid pointer to uninitialised attributes.
    check(unsafe { libc::pthread_attr_init(attributes) })?;
    // SAFETY: initialised above; the stack is memory of that length that has no other user and
    // is never unmapped.
    check(unsafe {
        libc::pthread_attr_setstack(attributes, stack.start.as_ptr().cast(), stack.len)
    })?;
    let detached = libc::PTHREAD_CREATE_DETACHED;
    // SAFETY: initialised above.
    check(unsafe { libc::pthread_attr_setdetachstate(attributes, detached) })?;
    let mut thread = MaybeUninit::uninit();
    // SAFETY: `run` takes ownership of `start`, which is not used here any more.
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
    STACK_END.set(start.stack_end);
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
        let mut stacks = Stacks(arena::undumpable(Stacks::len_for(1)).unwrap());
        let stack = stacks.take(1).unwrap();
        assert!(stack.0.start.addr().get().is_multiple_of(page()));
        assert!(stack.0.len.is_multiple_of(page()));
        assert_eq!(stacks.take(1).err(), Some(nix::Error::ENOMEM), "the memory is used up");
        let (sender, receiver) = mpsc::channel();
        spawn(c"test", stack, Allocates::Packets, move || sender.send(7).unwrap()).unwrap();
        assert_eq!(receiver.recv(), Ok(7));
    }

    /// Leaves a pattern in an array on the stack.
    #[inline(never)]
    fn leave_a_pattern() {
        let mut left = [PATTERN; 4000];
        core::hint::black_box(&mut left);
    }

    const PATTERN: u64 = 0x5eed_5eed_5eed_5eed;

    /// Of words that no function in progress has.
    #[inline(never)]
    fn patterns_below(end: usize) -> usize {
        let here = 0_u64;
        let top = core::hint::black_box(&raw const here).addr() - 4096;
        let words = (end..top).step_by(size_of::<u64>());
        let read = |at: usize| {
            // SAFETY: within this thread's stack, aligned; volatile, as the compiler has no value there.
            unsafe { (at as *const u64).read_volatile() }
        };
        words.filter(|at| read(*at) == PATTERN).count()
    }

    #[test]
    fn wiping_erases_all_that_functions_left_on_the_stack_and_no_more() {
        const USED: usize = 256 * 1024;
        let mut stacks = Stacks(arena::undumpable(Stacks::len_for(USED)).unwrap());
        let stack = stacks.take(USED).unwrap();
        let end = stack.0.start.addr().get();
        let (sender, receiver) = mpsc::channel();
        spawn(c"test", stack, Allocates::Packets, move || {
            let ours = core::hint::black_box([PATTERN; 8]);
            leave_a_pattern();
            let left = patterns_below(end);
            wipe_stack(8192);
            let shallow = patterns_below(end);
            wipe_stack(WHOLE_STACK);
            let wiped = patterns_below(end);
            sender.send((left, shallow, wiped, core::hint::black_box(ours))).unwrap();
        })
        .unwrap();
        let (left, shallow, wiped, ours) = receiver.recv().unwrap();
        assert!(left > 2000 && (1000..left).contains(&shallow), "{left}, then {shallow}");
        assert_eq!((wiped, ours), (0, [PATTERN; 8]));
        // The stack of a thread outside the arena is not wiped.
        wipe_stack(WHOLE_STACK);
    }

    #[test]
    fn what_a_thread_uses_is_beyond_what_the_c_library_needs_of_a_stack() {
        for used in [1, 4096, 64 * 1024, 256 * 1024] {
            assert!(stack_len(used) >= libc::PTHREAD_STACK_MIN + used, "{used}");
        }
    }
}
