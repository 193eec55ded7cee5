//! The threads that carry packets: who waits for them, who is woken, and what keeps their order.

pub(crate) mod crypto_pool;
pub(crate) mod leader;
pub(crate) mod pause;
pub(crate) mod sequencer;
pub(crate) mod shared;
pub(crate) mod worker;
