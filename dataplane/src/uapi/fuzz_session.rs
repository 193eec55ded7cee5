//! A UAPI session without sockets, for the fuzzer: applies a client's bytes to a device and returns the
//! answers.

use super::answer::Answer;
use super::inbox::Inbox;
use super::{Access, Operation, Scopes, format, require_peers};
use crate::drops::{Drops, LocalDrops};
use wgsep_proto::device::control_plane::ControlPlane;
use wgsep_status::Counters;

/// A UAPI session: a client's input so far, and the device it configures.
pub struct FuzzSession {
    access: Access,
    inbox: Inbox,
    device: ControlPlane,
    local_drops: LocalDrops,
}

/// Scopes whose interface names are their indices, so that every scope can be written and read.
struct Numbers;

impl Scopes for Numbers {
    fn index_of(&self, name: &str) -> Option<u32> {
        name.parse().ok().filter(|index| *index != 0)
    }
}

impl FuzzSession {
    /// Creates a session without input.
    #[must_use]
    pub fn new(device: ControlPlane) -> Self {
        Self::with(Access::Everything, device)
    }

    /// Creates a session on the socket for preshared keys, without input.
    #[must_use]
    pub fn of_preshared_keys(device: ControlPlane) -> Self {
        Self::with(Access::PresharedKeys, device)
    }

    fn with(access: Access, device: ControlPlane) -> Self {
        Self { access, inbox: Inbox::new(access), device, local_drops: LocalDrops::default() }
    }

    /// Takes the bytes of one read. Returns the answers to the transactions that they complete, in order.
    pub fn receive(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        self.inbox.push(bytes);
        let mut answers = Vec::new();
        while let Some(transaction) = self.inbox.next_transaction(&Numbers, usize::MAX) {
            answers.push(match transaction {
                Ok(Operation::Get) => self.state(),
                Ok(Operation::Statistics) => {
                    let drops = self.drops().counts().collect();
                    let counters = Counters { drops, ..Counters::default() };
                    format::statistics(&counters).as_bytes().to_vec()
                }
                Ok(Operation::Set(mut configuration)) => {
                    let required = match self.access {
                        Access::Everything => Ok(()),
                        Access::PresharedKeys => {
                            require_peers(&mut configuration, |peer| self.device.has_peer(peer))
                        }
                    };
                    if required.is_ok() {
                        self.device.configure(configuration);
                    }
                    format!("errno={}\n\n", required.map_or_else(|errno| -(errno as i32), |()| 0))
                        .into_bytes()
                }
                Err(refusal) => format!("errno={}\n\n", refusal.errno).into_bytes(),
            });
        }
        answers
    }

    /// Bytes of input that are kept.
    #[must_use]
    pub fn held(&self) -> usize {
        self.inbox.len()
    }

    fn drops(&self) -> Drops<'_> {
        Drops { protocol: &self.device.data_path().drops, local: &self.local_drops }
    }

    /// The answer to a `get`.
    #[must_use]
    pub fn state(&self) -> Vec<u8> {
        let mut answer = Answer::get(&self.device, self.drops());
        let mut text = Vec::new();
        while !answer.is_complete() {
            answer.format_if_written(&self.device);
            text.extend_from_slice(answer.unwritten());
            answer.advance(answer.unwritten().len());
        }
        text
    }
}
