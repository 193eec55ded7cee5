//! Keys, and their forms as text.

use core::ffi::c_char;
use core::mem::MaybeUninit;

use crate::status::{guard, wgsep_status};
use crate::sys;
use wgsep_proto::{KeyText, PresharedKey, PrivateKey, SystemRandom};

/// Bytes of a key in base64, with the zero byte at its end.
pub const WGSEP_KEY_BASE64_LEN: usize = 45;
/// Bytes of a key in hexadecimal, with the zero byte at its end.
pub const WGSEP_KEY_HEX_LEN: usize = 65;

/// A private key, a public key or a preshared key. A program erases its copies of those that are secret.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct wgsep_key {
    /// Its bytes.
    pub bytes: [u8; 32],
}

impl wgsep_key {
    /// The private key of these bytes.
    ///
    /// # Errors
    ///
    /// `WGSEP_ERROR_KEY` if it is all zeros.
    pub fn private(&self) -> Result<PrivateKey, wgsep_status> {
        PrivateKey::from_bytes(self.bytes).ok_or(wgsep_status::WGSEP_ERROR_KEY)
    }
}

/// Generates a private key.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_key_generate_private(
    key: Option<&mut MaybeUninit<wgsep_key>>,
) -> wgsep_status {
    write(key, || Ok(*PrivateKey::generate(&mut SystemRandom).as_bytes()))
}

/// Generates a preshared key.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_key_generate_preshared(
    key: Option<&mut MaybeUninit<wgsep_key>>,
) -> wgsep_status {
    write(key, || Ok(*PresharedKey::generate(&mut SystemRandom).as_bytes()))
}

/// Writes the key that `bytes` returns.
fn write(
    key: Option<&mut MaybeUninit<wgsep_key>>,
    bytes: impl FnOnce() -> Result<[u8; 32], wgsep_status>,
) -> wgsep_status {
    guard(|| {
        let key = key.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        key.write(wgsep_key { bytes: bytes()? });
        Ok(wgsep_status::WGSEP_OK)
    })
}

/// Computes the public key of a private key. `WGSEP_ERROR_KEY` if that is all zeros.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_key_public(
    private_key: Option<&wgsep_key>,
    public_key: Option<&mut MaybeUninit<wgsep_key>>,
) -> wgsep_status {
    write(public_key, || {
        let private_key = private_key.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        Ok(*private_key.private()?.public_key().as_bytes())
    })
}

/// Reads a key from a zero-terminated text, in base64 or hexadecimal. `WGSEP_ERROR_KEY` if it is none.
///
/// # Safety
///
/// `text` is NULL or ends with a zero byte.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wgsep_key_from_text(
    text: *const c_char,
    key: Option<&mut MaybeUninit<wgsep_key>>,
) -> wgsep_status {
    write(key, || {
        // SAFETY: as this function requires of its caller.
        let text = unsafe { sys::text(text) }?;
        // Of the three kinds of key it is the one that is erased and may be all zeros.
        let read: Result<PresharedKey, _> = text.parse();
        Ok(*read.map_err(|_| wgsep_status::WGSEP_ERROR_KEY)?.as_bytes())
    })
}

/// Writes a key in base64, with a zero byte at its end, to a buffer of at least `WGSEP_KEY_BASE64_LEN` bytes.
///
/// # Safety
///
/// `capacity` bytes at `text` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wgsep_key_to_base64(
    key: Option<&wgsep_key>,
    text: *mut c_char,
    capacity: usize,
) -> wgsep_status {
    // SAFETY: as this function requires of its caller.
    unsafe { write_text(key, PresharedKey::to_base64, text, capacity) }
}

/// Writes a key in hexadecimal, with a zero byte at its end, to a buffer of at least `WGSEP_KEY_HEX_LEN` bytes.
///
/// # Safety
///
/// `capacity` bytes at `text` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wgsep_key_to_hex(
    key: Option<&wgsep_key>,
    text: *mut c_char,
    capacity: usize,
) -> wgsep_status {
    // SAFETY: as this function requires of its caller.
    unsafe { write_text(key, PresharedKey::to_hex, text, capacity) }
}

/// Writes a form of a key, with a zero byte at its end.
///
/// # Safety
///
/// `capacity` bytes at `text` may be written.
unsafe fn write_text(
    key: Option<&wgsep_key>,
    form: fn(&PresharedKey) -> KeyText,
    text: *mut c_char,
    capacity: usize,
) -> wgsep_status {
    guard(|| {
        let key = key.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        let written = form(&PresharedKey::from_bytes(key.bytes));
        // SAFETY: as this function requires of its caller; the key's text is memory of its own.
        unsafe { sys::copy_text_to(text, capacity, written.as_str()) }
    })
}
