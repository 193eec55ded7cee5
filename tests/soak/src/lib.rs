//! Random configuration and host events on a live tunnel, which must recover from each: `make soak`.
//!
//! Two daemons in namespaces of their own are joined by a router, also a namespace. ICMP probes, TCP
//! and UDP run through the tunnel in both directions and both families all the time. The [`events`]
//! are dealt from a shuffled deck, one after the other; after each one the probes of all directions must
//! be answered again within the time that the event declares. The seed alone decides which events come
//! in which order and with which parameters, so a seed replays a run.
//!
//! Checked after each event, besides the recovery: no process exited that the event did not end, no
//! error was logged that the event does not declare, no layer of the sandbox is degraded, and no
//! plaintext and no inner address was on the underlay. At the end descriptors, threads, memory, rules
//! and routes are compared with what they were at the start.
//!
//! | module | what it has |
//! |---|---|
//! | [`events`] | the table of events and the events, by what they change |
//! | `soak` | deals the events, waits for recovery, checks and reports |
//! | `world` | the two nodes with their daemons and configuration, for the events to change |
//! | `underlay` | the three namespaces, the links between them and their faults |
//! | `probe`, `flows` | the traffic |
//! | `witness` | what must not be seen: leaks, errors, exits |
//! | `usage` | what a process holds: descriptors, threads, memory |

mod command_line;
pub mod events;
mod flows;
mod patience;
mod probe;
mod soak;
mod underlay;
mod usage;
mod witness;
mod world;

pub use command_line::run;
pub use soak::{Plan, random_seed, soak};
