//! What a call results in.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// The result of a call. Errors are negative, and a call that fails has no effect unless its description says so.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum wgsep_status {
    /// Done.
    WGSEP_OK = 0,
    /// Done, and there is nothing to return: no packet in the datagram, no datagram to send, no event, no timer.
    WGSEP_NOTHING = 1,
    /// A pointer is NULL that must not be.
    WGSEP_ERROR_NULL = -1,
    /// A length is impossible.
    WGSEP_ERROR_LENGTH = -2,
    /// The buffer is too small; nothing was written to it.
    WGSEP_ERROR_BUFFER_TOO_SMALL = -3,
    /// A text is no key, or a private key is all zeros.
    WGSEP_ERROR_KEY = -4,
    /// An address is neither of IPv4 nor of IPv6.
    WGSEP_ERROR_ADDRESS = -5,
    /// The peer has no endpoint.
    WGSEP_ERROR_NO_ENDPOINT = -6,
    /// Less than five seconds have passed since the last message of a handshake.
    WGSEP_ERROR_TOO_SOON = -7,
    /// The peer's public key is our own.
    WGSEP_ERROR_OWN_KEY = -8,
    /// The packet or the datagram was dropped, and counted: `wgsep_tunnel_read_drops` has the causes.
    WGSEP_ERROR_DROPPED = -9,
    /// A bug of the library, or a system without random numbers. Free the tunnel; every other call of it fails from now on.
    WGSEP_ERROR_INTERNAL = -100,
}

/// The status of `body`, which may panic but does not unwind into C.
pub fn guard(body: impl FnOnce() -> Result<wgsep_status, wgsep_status>) -> wgsep_status {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(status) | Err(status)) => status,
        Err(_) => wgsep_status::WGSEP_ERROR_INTERNAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error() {
        assert_eq!(guard(|| Ok(wgsep_status::WGSEP_OK)), wgsep_status::WGSEP_OK);
        assert_eq!(guard(|| panic!("for this test")), wgsep_status::WGSEP_ERROR_INTERNAL);
    }
}
