//! The helper, as the dataplane sees it: requests out, replies and notices in, never a wait.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use wgsep_ipc::{Channel, FromHelper, Notice, Received, Reply, Request};

/// The typed client of the helper. One request is under way at most.
pub(crate) struct Helper {
    channel: Channel,
    sequence: u32,
    awaiting: bool,
    said_bye: bool,
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
        Self { channel, sequence: 0, awaiting: false, said_bye: false }
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

    /// Shows the helper that this thread runs; no answer comes.
    ///
    /// # Errors
    /// If the channel is broken.
    pub(crate) fn pong(&self) -> Result<(), wgsep_ipc::Error> {
        self.channel.send_request(0, &Request::Pong)
    }

    /// Says goodbye. Nothing is received after it: the answer to an earlier request may cross with it.
    pub(crate) fn bye(&mut self) {
        let _gone = self.request(&Request::Bye);
        self.said_bye = true;
    }

    /// What the helper said, if anything waits.
    ///
    /// # Errors
    /// If it broke the contract.
    pub(crate) fn receive(&mut self) -> Result<Option<Said>, wgsep_ipc::Error> {
        if self.said_bye {
            return Ok(None);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    fn pair() -> (Helper, Channel) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        (Helper::new(Channel::new(ours).unwrap()), Channel::new(theirs).unwrap())
    }

    #[test]
    fn an_answer_that_crosses_with_goodbye_is_no_breach() {
        let (mut helper, other) = pair();
        helper.request(&Request::CloseUdp).unwrap();
        other.send_reply(1, &Reply::Done, &[]).unwrap();
        helper.bye();
        assert!(matches!(helper.receive(), Ok(None)));
    }

    #[test]
    fn a_pong_is_sent_while_a_request_is_under_way() {
        let (mut helper, other) = pair();
        helper.request(&Request::CloseUdp).unwrap();
        helper.pong().unwrap();
        other.send_reply(1, &Reply::Done, &[]).unwrap();
        assert!(matches!(helper.receive(), Ok(Some(Said::Reply(Reply::Done, _)))));
    }

    #[test]
    fn an_answer_to_nothing_is_a_breach() {
        let (mut helper, other) = pair();
        other.send_reply(1, &Reply::Done, &[]).unwrap();
        assert_eq!(helper.receive().err(), Some(wgsep_ipc::Error::Unexpected));
    }
}
