//! The dataplane's end of the channel.

use crate::Error;
use crate::channel::{Channel, Received};
use crate::message::{MAX_FRAME, Request, decode};
use crate::reply::FromHelper;

impl Channel {
    /// Sends a request.
    ///
    /// # Errors
    /// If the other end is gone or reads nothing.
    pub fn send_request(&self, sequence: u32, request: &Request) -> Result<(), Error> {
        self.send(sequence, request, &[])
    }

    /// Receives a reply or a notice.
    ///
    /// # Errors
    /// If the frame is not one, or the number of descriptors is wrong.
    pub fn receive_from_helper(&self) -> Result<Received<FromHelper>, Error> {
        let mut bytes = [0; MAX_FRAME + 1];
        let Some((len, descriptors)) = self.receive(&mut bytes)? else {
            return Ok(Received::Nothing);
        };
        if len == 0 {
            return Ok(Received::Closed);
        }
        let (_, message): (_, FromHelper) = decode(bytes.get(..len).unwrap_or_default())?;
        if descriptors.len() != message.descriptors() {
            return Err(Error::Descriptors);
        }
        Ok(Received::Message(message, descriptors))
    }
}
