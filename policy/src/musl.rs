//! What static programs with musl lack and those with glibc have.

use crate::sys;
use nix::errno::Errno;
use nix::libc;

/// Makes read-only what was only to be written when the program was relocated (PT_GNU_RELRO). glibc does
/// that itself; musl does not for a static program.
pub(crate) fn protect_relocated() -> nix::Result<()> {
    sys::segments(libc::PT_GNU_RELRO).into_iter().try_for_each(|pages| {
        let start = pages.start as *mut libc::c_void;
        // SAFETY: the linker put nothing there that is written once the program runs.
        Errno::result(unsafe { libc::mprotect(start, pages.len(), libc::PROT_READ) }).map(drop)
    })
}

/// Takes the place of musl's abort(3), which sends the signal by tkill(2): that call names a thread of
/// any process of the same uid, which no filter can distinguish from our own. tgkill(2) names the process too,
/// as in glibc's, and the filters allow it for this process alone. musl is always linked statically, so
/// that its own callers and std's come here as well. That the signal has its default action and is not
/// blocked is seen to at the start (`sys::take_signal_handlers`).
#[unsafe(no_mangle)]
extern "C" fn abort() -> ! {
    let (process, thread) = (nix::unistd::getpid(), nix::unistd::gettid());
    // SAFETY: plain integers.
    unsafe { libc::syscall(libc::SYS_tgkill, process.as_raw(), thread.as_raw(), libc::SIGABRT) };
    // SAFETY: nothing is left to do, whatever the signal was stopped by.
    unsafe { libc::_exit(128 + libc::SIGABRT) }
}
