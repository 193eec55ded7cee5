//! The Diffie-Hellman steps of a handshake, as jobs that any thread can run.
//!
//! They take most of a handshake's time and need no access to the device.

use crate::noise::handshake::{IncomingInitiation, ResponseDraft, StaticIdentity, WrittenResponse};
use crate::noise::symmetric::Unauthentic;
use crate::secret::{Secret, check};
use crate::wire::messages::{Initiation, SenderIndex};
use std::sync::Arc;

/// Runs crypto jobs, on one thread or several.
pub trait JobRunner {
    /// Runs each job once ([`CryptoJob::run`]), and returns them in the same order.
    fn run(&self, jobs: Vec<CryptoJob>) -> Vec<CryptoJob>;
}

/// Runs every job on the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inline;

impl JobRunner for Inline {
    fn run(&self, mut jobs: Vec<CryptoJob>) -> Vec<CryptoJob> {
        jobs.iter_mut().for_each(CryptoJob::run);
        jobs
    }
}

/// The Diffie-Hellman operations of one step of a handshake, with their inputs and results.
///
/// A job allocates nothing, so its secrets are only where the job is stored and on the stack of the
/// thread that runs it. The [`JobRunner`] erases memory that it moves a job out of.
pub struct CryptoJob(Step);

enum Step {
    Open(Arc<StaticIdentity>, Initiation),
    Opened(Result<IncomingInitiation, Unauthentic>),
    Write(ResponseDraft, Secret, SenderIndex),
    Written(Result<WrittenResponse, Unauthentic>),
    /// Only during [`CryptoJob::run`].
    Running,
}

impl CryptoJob {
    /// A job that decrypts the static key of an initiation.
    pub(super) fn open(identity: &Arc<StaticIdentity>, message: Initiation) -> Self {
        Self(Step::Open(Arc::clone(identity), message))
    }

    /// A job that creates a response.
    pub(super) fn write(draft: ResponseDraft, ephemeral: Secret, index: SenderIndex) -> Self {
        Self(Step::Write(draft, ephemeral, index))
    }

    /// Runs the job, which takes some tens of microseconds. A second call does nothing.
    pub fn run(&mut self) {
        check(self);
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
