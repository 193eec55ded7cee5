//! Where random numbers come from: the embedding program.

/// A source of random numbers.
pub trait Random: Send {
    /// Fills `bytes` from a cryptographically secure generator. A source that fails must not return: keys would be
    /// made of what it left in `bytes`.
    fn fill(&mut self, bytes: &mut [u8]);
}

/// The generator of the operating system, by way of the crate getrandom (feature `getrandom`).
///
/// # Panics
/// [`Random::fill`] panics if the system has no random numbers, which getrandom(2) of a running Linux never does.
#[cfg(feature = "getrandom")]
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemRandom;

#[cfg(feature = "getrandom")]
impl Random for SystemRandom {
    fn fill(&mut self, bytes: &mut [u8]) {
        #[allow(clippy::panic, reason = "keys must not be made of anything else")]
        if let Err(error) = getrandom::getrandom(bytes) {
            panic!("no random numbers from the system: {error}");
        }
    }
}
