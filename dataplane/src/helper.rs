//! The helper, as the dataplane sees it: requests out, replies and notices in, never a wait.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use wgsep_ipc::{Channel, FromHelper, Notice, Received, Reply, Request};

/// The typed client of the helper. One request is under way at most.
pub(crate) struct Helper {
    channel: Channel,
    sequence: u32,
    awaiting: bool,
}

/// What the helper said.
pub(crate) enum Said {
    /// The answer to the request under way, with its descriptors.
    Reply(Reply, Vec<OwnedFd>),
    /// Something it says unasked.
    Notice(Notice),
    /// It is gone.
    Closed,
}

impl Helper {
    /// A client on the channel that the helper passed at the start.
    pub(crate) const fn new(channel: Channel) -> Self {
        Self { channel, sequence: 0, awaiting: false }
    }

    /// Sends a request; its answer comes out of [`Self::receive`].
    ///
    /// # Errors
    /// If the channel is broken.
    pub(crate) fn request(&mut self, request: &Request) -> Result<(), wgsep_ipc::Error> {
        self.sequence = self.sequence.wrapping_add(1);
        self.channel.send_request(self.sequence, request)?;
        self.awaiting = true;
        Ok(())
    }

    /// What the helper said, if anything waits.
    ///
    /// # Errors
    /// If it broke the contract.
    pub(crate) fn receive(&mut self) -> Result<Option<Said>, wgsep_ipc::Error> {
        Ok(match self.channel.receive_from_helper()? {
            Received::Nothing => None,
            Received::Closed => Some(Said::Closed),
            Received::Message(FromHelper::Notice(notice), _) => Some(Said::Notice(notice)),
            Received::Message(FromHelper::Reply { sequence, reply }, descriptors) => {
                if !self.awaiting || sequence != self.sequence {
                    return Err(wgsep_ipc::Error::Unexpected);
                }
                self.awaiting = false;
                Some(Said::Reply(reply, descriptors))
            }
        })
    }
}

impl AsFd for Helper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
