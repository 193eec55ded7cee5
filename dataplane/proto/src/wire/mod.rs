//! Bytes: the four messages, and the headers of the packets inside.

pub mod icmp;
pub mod ip;
pub mod messages;
pub mod ndisc;
