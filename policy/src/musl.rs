//! What static programs with musl lack and those with glibc have.

use nix::errno::Errno;
use nix::libc;

/// Makes read-only what was only to be written when the program was relocated (PT_GNU_RELRO). glibc does
/// that itself; musl does not for a static program.
pub(crate) fn protect_relocated() -> nix::Result<()> {
    unsafe extern "C" fn protect(
        program: *mut libc::dl_phdr_info,
        _len: libc::size_t,
        _nothing: *mut libc::c_void,
    ) -> libc::c_int {
        // SAFETY: the caller below passes a description of this program, which stays where it is.
        let program = unsafe { &*program };
        // SAFETY: as many headers as it says are there.
        let headers =
            unsafe { core::slice::from_raw_parts(program.dlpi_phdr, program.dlpi_phnum.into()) };
        let Some(header) = headers.iter().find(|header| header.p_type == libc::PT_GNU_RELRO) else {
            return 0;
        };
        // SAFETY: a plain integer.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.cast_unsigned();
        let start = program.dlpi_addr + header.p_vaddr;
        // Whole pages, as the linker laid them out.
        let (start, end) = (start & !(page - 1), (start + header.p_memsz) & !(page - 1));
        let len = (end - start) as usize;
        // SAFETY: the linker put nothing there that is written once the program runs.
        unsafe { libc::mprotect(start as *mut libc::c_void, len, libc::PROT_READ) }
    }
    // SAFETY: `protect` takes what it is passed, and there is nothing else for it.
    Errno::result(unsafe { libc::dl_iterate_phdr(Some(protect), core::ptr::null_mut()) }).map(drop)
}

/// Takes the place of musl's abort(3), which sends the signal by tkill(2): that call names a thread of
/// any process of the same uid, which no filter can tell from our own. tgkill(2) names the process too,
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
