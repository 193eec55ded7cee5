//! The system calls of confinement that no safe crate offers. All the unsafe code of this crate is
//! here and in `musl`.

use core::ptr::null_mut;
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::CStr;
use std::ops::Range;

fn prctl(option: libc::c_int, argument: libc::c_ulong) -> nix::Result<libc::c_int> {
    // SAFETY: the options used in this module take plain integers, no pointers.
    Errno::result(unsafe { libc::prctl(option, argument, 0, 0, 0) })
}

/// Takes a capability out of the bounding set.
pub(crate) fn drop_bounding(capability: u32) -> nix::Result<()> {
    prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability)).map(drop)
}

/// Empties the ambient set.
pub(crate) fn clear_ambient() -> nix::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong).map(drop)
}

/// Sets the securebits.
pub(crate) fn set_securebits(bits: u32) -> nix::Result<()> {
    prctl(libc::PR_SET_SECUREBITS, libc::c_ulong::from(bits)).map(drop)
}

/// Executing a file gains nothing from now on.
pub(crate) fn set_no_new_privs() -> nix::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map(drop)
}

/// True if executing a file gains nothing.
pub(crate) fn no_new_privs() -> bool {
    prctl(libc::PR_GET_NO_NEW_PRIVS, 0) == Ok(1)
}

/// No core file, no tracing by the same uid.
pub(crate) fn set_non_dumpable() -> nix::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, 0).map(drop)
}

/// SIGKILL when the parent thread ends.
pub(crate) fn set_death_signal() -> nix::Result<()> {
    prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong).map(drop)
}

/// Closes the descriptors from `first` to `last`, both included.
pub(crate) fn close_range(first: u32, last: u32) -> nix::Result<()> {
    // SAFETY: plain integers. The caller holds no object that owns a descriptor of that range, or
    // does not use it any more.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
}

/// Empties effective, permitted and inheritable sets of this thread.
pub(crate) fn clear_capabilities() -> nix::Result<()> {
    capset([0; 2], [0; 2])
}

/// Sets the effective and the permitted set (low word, high word each), and inheritable to nothing.
pub(crate) fn capset(effective: [u32; 2], permitted: [u32; 2]) -> nix::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let header = Header { version: VERSION_3, pid: 0 };
    let data = [0, 1].map(|word: usize| Data {
        effective: effective[word],
        permitted: permitted[word],
        inheritable: 0,
    });
    // SAFETY: header and data have the layout of capset(2) version 3 and are live for the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })
        .map(drop)
}

/// An extended attribute of what a path leads to, symbolic links followed, into `value`; its length.
pub(crate) fn getxattr(path: &CStr, name: &CStr, value: &mut [u8]) -> nix::Result<usize> {
    let room = value.as_mut_ptr().cast();
    // SAFETY: both strings end in NUL, and the kernel writes at most `value.len()` bytes to `room`.
    let len = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), room, value.len()) };
    Errno::result(len).map(isize::cast_unsigned)
}

/// The version of Landlock that the kernel has.
pub(crate) fn landlock_version() -> nix::Result<libc::c_long> {
    const VERSION: libc::c_ulong = 1;
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag and no attributes the call only answers with a number.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, none, 0 as libc::size_t, VERSION)
    };
    Errno::result(version)
}

/// Takes away the handlers of SIGSEGV and SIGBUS that std has for its line about a stack overflow, and the
/// first thread's stack for them: an attacker who could have a handler return could set all registers. SIGABRT
/// ends the process whatever the launcher made of it, so that abort(3) need not see to that.
/// To be called on the first thread, before there is another.
pub(crate) fn take_signal_handlers() -> nix::Result<()> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGABRT] {
        // SAFETY: the default action runs no code of ours.
        unsafe { sigaction(signal, &default) }?;
    }
    SigSet::from(Signal::SIGABRT).thread_unblock()?;
    let none = libc::stack_t { ss_sp: null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
    // SAFETY: it is live for the call; no handler is left that would run on the old stack. Where this is
    // refused, so was std's own call before.
    let _none_set = unsafe { libc::sigaltstack(&raw const none, null_mut()) };
    Ok(())
}

/// Ends the process with a status, without what std and libc do before: they make calls that the filters
/// do not allow. What was written to standard output and error by `print!` may be lost.
pub fn exit(status: u8) -> ! {
    // SAFETY: it does not return, so that nothing relies on what it leaves out.
    unsafe { libc::_exit(status.into()) }
}

/// The helper's allocator, to be named in its `#[global_allocator]`: the system's, but that a block that
/// grows is copied, where the system's would call mremap(2) for a large one.
#[derive(Debug)]
pub struct Heap;

// SAFETY: every call is passed on to the system's allocator, whose contract is the same. What is not
// passed on, `realloc`, is the trait's own.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the same contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the same contract.
        unsafe { System.dealloc(block, layout) }
    }
}

/// Where the segments of one kind (PT_LOAD, PT_GNU_RELRO) of this program and of the libraries it is linked
/// with are, in whole pages.
pub(crate) fn segments(kind: u32) -> Vec<Range<usize>> {
    struct Found {
        kind: u32,
        segments: Vec<Range<usize>>,
    }
    unsafe extern "C" fn collect(
        object: *mut libc::dl_phdr_info,
        _len: libc::size_t,
        found: *mut libc::c_void,
    ) -> libc::c_int {
        // SAFETY: the caller below passes a `Found`, which nothing else refers to meanwhile.
        let found = unsafe { &mut *found.cast::<Found>() };
        // SAFETY: libc describes a program or a library, which stays where it is.
        let object = unsafe { &*object };
        // SAFETY: as many headers as it says are there.
        let headers =
            unsafe { core::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()) };
        for header in headers.iter().filter(|header| header.p_type == found.kind) {
            let start = object.dlpi_addr + header.p_vaddr;
            found.segments.push(start as usize..(start + header.p_memsz) as usize);
        }
        0
    }
    let mut found = Found { kind, segments: Vec::new() };
    // SAFETY: `collect` takes what it is passed, and is only called until this returns.
    unsafe { libc::dl_iterate_phdr(Some(collect), (&raw mut found).cast()) };
    // SAFETY: a plain integer.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.cast_unsigned() as usize;
    let whole = |segment: Range<usize>| match kind {
        // The linker has it end with a page, and what follows it may be written.
        libc::PT_GNU_RELRO => segment.start & !(page - 1)..segment.end & !(page - 1),
        _ => segment.start & !(page - 1)..segment.end.next_multiple_of(page),
    };
    found.segments.into_iter().map(whole).collect()
}

/// Has the kernel refuse to unmap, move, resize or replace whole pages, or to change what may be done with
/// them, for the rest of the process's life.
pub(crate) fn seal_mapping(pages: &Range<usize>) -> nix::Result<()> {
    let none: libc::c_ulong = 0;
    // SAFETY: plain integers; what the pages hold does not change, nor who may read or write it.
    let sealed = unsafe { libc::syscall(libc::SYS_mseal, pages.start, pages.len(), none) };
    Errno::result(sealed).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As far as the kernel has mseal(2). This process seals itself, which no other test is disturbed by.
    #[test]
    fn sealed_code_can_be_neither_written_nor_unmapped_nor_grown() {
        let segments = segments(libc::PT_LOAD);
        let code = sealed_code_can_be_neither_written_nor_unmapped_nor_grown as fn() as usize;
        let code = segments.iter().find(|segment| segment.contains(&code)).unwrap();
        match segments.iter().try_for_each(seal_mapping) {
            Err(Errno::ENOSYS) => return,
            sealed => sealed.unwrap(),
        }
        let (start, len) = (code.start as *mut libc::c_void, code.len());
        let every = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        // SAFETY: refused, which is what is tested.
        let written = Errno::result(unsafe { libc::mprotect(start, len, every) });
        assert_eq!(written, Err(Errno::EPERM));
        // SAFETY: as above.
        assert_eq!(Errno::result(unsafe { libc::munmap(start, len) }), Err(Errno::EPERM));
        // SAFETY: as above.
        let grown = unsafe { libc::mremap(start, len, 2 * len, libc::MREMAP_MAYMOVE) };
        assert_eq!((grown, Errno::last()), (libc::MAP_FAILED, Errno::EPERM));
    }

    #[test]
    fn what_the_loader_relocated_is_within_what_is_loaded() {
        let loaded = segments(libc::PT_LOAD);
        let is_loaded = |pages: &Range<usize>| {
            loaded.iter().any(|one| one.start <= pages.start && pages.end <= one.end)
        };
        let relocated = segments(libc::PT_GNU_RELRO);
        assert!(!relocated.is_empty() && relocated.iter().all(is_loaded), "{relocated:x?}");
    }
}
