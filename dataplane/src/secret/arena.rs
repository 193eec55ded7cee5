//! Mappings of secret memory, and the alternatives where the kernel has none.

use core::ffi::c_void;
use core::ptr::{NonNull, null_mut};
use nix::libc;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Memory that stays mapped for as long as the process lives.
#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) start: NonNull<u8>,
    /// Bytes.
    pub(super) len: usize,
}

impl Mapping {
    /// Splits off its first `len` bytes; `None` if it is shorter.
    pub(super) fn take(&mut self, len: usize) -> Option<Self> {
        self.len = self.len.checked_sub(len)?;
        let taken = Self { start: self.start, len };
        // SAFETY: within the mapping, or at its end.
        self.start = unsafe { self.start.add(len) };
        Some(taken)
    }

    /// Its addresses.
    pub(super) fn range(&self) -> Range<usize> {
        let start = self.start.addr().get();
        start..start + self.len
    }
}

// SAFETY: the memory belongs to the owner of this value, on whichever thread.
unsafe impl Send for Mapping {}

/// Memory that only this process's own page tables reach: the kernel's have no entry for it, so that
/// neither ptrace, /proc/PID/mem nor a core file gets at it (memfd_secret(2)). Locked, and charged to
/// RLIMIT_MEMLOCK as a whole.
///
/// # Errors
/// ENOSYS where the kernel lacks it or has it disabled; EAGAIN past the limit; as mmap(2).
pub(super) fn secret(len: usize) -> nix::Result<Mapping> {
    // SAFETY: no pointer is passed.
    let raw = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    let raw = i32::try_from(nix::Error::result(raw)?).map_err(|_| nix::Error::EBADF)?;
    // SAFETY: a descriptor that was just created and has no other owner.
    let memory = unsafe { OwnedFd::from_raw_fd(raw) };
    nix::unistd::ftruncate(&memory, i64::try_from(len).map_err(|_| nix::Error::EFBIG)?)?;
    map(len, libc::MAP_SHARED, memory.as_raw_fd())
}

/// Ordinary memory that is never swapped, dumped or inherited. Root can read it.
///
/// # Errors
/// ENOMEM past RLIMIT_MEMLOCK, EPERM where that is 0; as mmap(2).
pub(super) fn locked(len: usize) -> nix::Result<Mapping> {
    let mapping = undumpable(len)?;
    // SAFETY: the mapping is ours; locking it changes nothing that is in it.
    let outcome =
        unsafe { libc::mlock2(mapping.start.as_ptr().cast(), len, libc::MLOCK_ONFAULT as _) };
    if let Err(errno) = nix::Error::result(outcome) {
        // SAFETY: the mapping was just made and nothing refers to it.
        unsafe { libc::munmap(mapping.start.as_ptr().cast(), len) };
        return Err(errno);
    }
    Ok(mapping)
}

/// Ordinary memory that is never dumped or inherited.
///
/// # Errors
/// As mmap(2).
pub(super) fn undumpable(len: usize) -> nix::Result<Mapping> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let mapping = map(len, flags, -1)?;
    for advice in [libc::MADV_DONTDUMP, libc::MADV_WIPEONFORK] {
        // SAFETY: the mapping is ours; neither advice changes what is in it.
        let outcome = unsafe { libc::madvise(mapping.start.as_ptr().cast(), len, advice) };
        nix::Error::result(outcome)?;
    }
    Ok(mapping)
}

fn map(len: usize, flags: libc::c_int, descriptor: libc::c_int) -> nix::Result<Mapping> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
    let start: *mut c_void =
        unsafe { libc::mmap(null_mut(), len, protection, flags, descriptor, 0) };
    if start == libc::MAP_FAILED {
        return Err(nix::Error::last());
    }
    let start = NonNull::new(start.cast()).ok_or(nix::Error::ENOMEM)?;
    Ok(Mapping { start, len })
}
