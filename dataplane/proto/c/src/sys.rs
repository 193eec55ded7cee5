//! Memory of the caller, checked as far as it can be.

use core::ffi::{CStr, c_char};

use crate::status::wgsep_status;

/// Bytes that the caller passes.
///
/// # Errors
///
/// `WGSEP_ERROR_NULL`, and `WGSEP_ERROR_LENGTH` for more bytes than any object has.
///
/// # Safety
///
/// `len` bytes at `bytes` are initialized, and not written while the result is in use.
pub unsafe fn slice<'b>(bytes: *const u8, len: usize) -> Result<&'b [u8], wgsep_status> {
    check(bytes, len)?;
    // SAFETY: neither null nor too long, as was checked; the rest the caller promises.
    Ok(unsafe { core::slice::from_raw_parts(bytes, len) })
}

/// Bytes that the caller passes to be changed.
///
/// # Errors
///
/// As of [`slice`].
///
/// # Safety
///
/// `len` bytes at `bytes` are initialized, and not used otherwise while the result is.
pub unsafe fn slice_mut<'b>(bytes: *mut u8, len: usize) -> Result<&'b mut [u8], wgsep_status> {
    check(bytes, len)?;
    // SAFETY: neither null nor too long, as was checked; the rest the caller promises.
    Ok(unsafe { core::slice::from_raw_parts_mut(bytes, len) })
}

/// Copies `from` to a buffer of the caller, which need not be initialized.
///
/// # Errors
///
/// As of [`slice`], and `WGSEP_ERROR_BUFFER_TOO_SMALL`.
///
/// # Safety
///
/// `capacity` bytes at `buffer` may be written, and none of them is in `from`.
pub unsafe fn copy_to(buffer: *mut u8, capacity: usize, from: &[u8]) -> Result<(), wgsep_status> {
    check(buffer, capacity)?;
    if capacity < from.len() {
        return Err(wgsep_status::WGSEP_ERROR_BUFFER_TOO_SMALL);
    }
    // SAFETY: the buffer is long enough, as was checked, and the caller promises that it is apart from `from`.
    unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), buffer, from.len()) };
    Ok(())
}

fn check(bytes: *const u8, len: usize) -> Result<(), wgsep_status> {
    if bytes.is_null() {
        return Err(wgsep_status::WGSEP_ERROR_NULL);
    }
    // What Rust requires of a slice.
    isize::try_from(len).map(drop).map_err(|_| wgsep_status::WGSEP_ERROR_LENGTH)
}

/// A text that the caller passes.
///
/// # Errors
///
/// `WGSEP_ERROR_NULL`, and `WGSEP_ERROR_KEY` for one that is not of ASCII or UTF-8.
///
/// # Safety
///
/// `text` is null or ends with a zero byte, and is not written while the result is in use.
pub unsafe fn text<'t>(text: *const c_char) -> Result<&'t str, wgsep_status> {
    if text.is_null() {
        return Err(wgsep_status::WGSEP_ERROR_NULL);
    }
    // SAFETY: not null, as was checked; the rest the caller promises.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| wgsep_status::WGSEP_ERROR_KEY)
}

/// Copies `from`, and a zero byte after it, to a buffer of the caller.
///
/// # Errors
///
/// As of [`copy_to`].
///
/// # Safety
///
/// As of [`copy_to`].
pub unsafe fn copy_text_to(
    buffer: *mut c_char,
    capacity: usize,
    from: &str,
) -> Result<wgsep_status, wgsep_status> {
    let Some(for_text) = capacity.checked_sub(1) else {
        return Err(if buffer.is_null() {
            wgsep_status::WGSEP_ERROR_NULL
        } else {
            wgsep_status::WGSEP_ERROR_BUFFER_TOO_SMALL
        });
    };
    // SAFETY: as this function requires of its caller.
    unsafe { copy_to(buffer.cast(), for_text, from.as_bytes()) }?;
    // SAFETY: the text fits into one byte less than there are.
    unsafe { buffer.wrapping_add(from.len()).write(0) };
    Ok(wgsep_status::WGSEP_OK)
}
