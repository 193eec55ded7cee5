//! How fast wgsep is: what it is measured against.

pub mod forwarder;
