//! What the helper observes of the host while it serves: the file of the UAPI socket, and whether the
//! virtual machine was copied. Also how a child ended, the helper's error type and its poll(2).
//!
//! No byte of the dataplane reaches this crate.

mod child;
mod error;
mod generation;
mod poll;
mod socket_file;
mod unread;

pub use child::{Ended, ended_child};
pub use error::{BREACH, Error, FAILURE, Result, Step};
pub use generation::{Generation, kernel_log_number};
pub use poll::poll;
pub use socket_file::{Change, DIRECTORY, OwnFile, SocketFile, objection};
pub use unread::is_unread;
