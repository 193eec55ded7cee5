//! What of a handshake any thread can do: the Diffie-Hellmans, which are most of its time.

use crate::handshake::{IncomingInitiation, ResponseDraft, StaticIdentity, WrittenResponse};
use crate::messages::{Initiation, SenderIndex};
use crate::symmetric::Unauthentic;
use std::sync::Arc;
use zeroize::Zeroizing;

/// Threads that do tasks.
pub trait Team {
    /// Has each task [`run`](Task::run), and gives them back in the same order.
    fn run(&self, tasks: Vec<Task>) -> Vec<Task>;
}

/// The calling thread alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Team for Alone {
    fn run(&self, mut tasks: Vec<Task>) -> Vec<Task> {
        tasks.iter_mut().for_each(Task::run);
        tasks
    }
}

/// Some Diffie-Hellmans of one handshake, with all that they take and give. They allocate nothing, so
/// that secrets are nowhere but where the task was and is, and on a stack. What it is moved out of is
/// for the [`Team`] to erase.
pub struct Task(Step);

enum Step {
    Open(Arc<StaticIdentity>, Initiation),
    Opened(Result<IncomingInitiation, Unauthentic>),
    Write(ResponseDraft, Zeroizing<[u8; 32]>, SenderIndex),
    Written(Result<WrittenResponse, Unauthentic>),
    /// Only while it runs.
    Running,
}

impl Task {
    /// Opens the static key of an initiation.
    pub(super) fn open(identity: &Arc<StaticIdentity>, message: Initiation) -> Self {
        Self(Step::Open(Arc::clone(identity), message))
    }

    /// Writes a response.
    pub(super) fn write(
        draft: ResponseDraft,
        ephemeral: Zeroizing<[u8; 32]>,
        index: SenderIndex,
    ) -> Self {
        Self(Step::Write(draft, ephemeral, index))
    }

    /// Does it, some tens of microseconds long. A second time it does nothing.
    pub fn run(&mut self) {
        self.0 = match core::mem::replace(&mut self.0, Step::Running) {
            Step::Open(identity, message) => {
                Step::Opened(IncomingInitiation::open_static(&identity, &message))
            }
            Step::Write(draft, ephemeral, index) => Step::Written(draft.write(&ephemeral, index)),
            done => done,
        };
    }

    pub(super) fn opened(self) -> Result<IncomingInitiation, Unauthentic> {
        match self.0 {
            Step::Opened(opened) => opened,
            _ => Err(Unauthentic),
        }
    }

    pub(super) fn written(self) -> Result<WrittenResponse, Unauthentic> {
        match self.0 {
            Step::Written(written) => written,
            _ => Err(Unauthentic),
        }
    }
}
