//! wgsep-proto for C: `include/wgsep_tunnel.h` is its header, `README.md` its manual.
//!
//! Every function checks its pointers and lengths, and reports what is wrong. A tunnel has a lock, so that threads may
//! share it. A panic, which would be a bug, does not unwind into C: the call fails, and so do all later ones of that tunnel.
// The names are those of C.
#![allow(non_camel_case_types)]

mod address;
mod key;
mod report;
mod status;
mod sys;
mod time;
mod tunnel;

pub use address::wgsep_address;
pub use key::{WGSEP_KEY_BASE64_LEN, WGSEP_KEY_HEX_LEN, wgsep_key};
pub use report::{wgsep_event, wgsep_event_kind, wgsep_state, wgsep_statistics};
pub use status::wgsep_status;
pub use time::wgsep_now;
pub use tunnel::{WGSEP_CAUSE_LEN, WGSEP_MAX_OVERHEAD, wgsep_config, wgsep_tunnel};
