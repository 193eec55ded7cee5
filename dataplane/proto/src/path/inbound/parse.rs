//! Stage 2 of the way in: what each datagram is, and the keypair of a transport message.

use super::{InboundBatch, Origin, Receive, ReceivingKeypair, TransportMessage};
use crate::invariant::part;
use crate::path::data_path::{DataPath, DropCause};
use crate::session::peer::Endpoint;
use crate::wire::ip::Ecn;
use crate::wire::messages::{Message, ReceiverIndex, TRANSPORT_HEADER_LEN, TransportHeader};
use core::ops::Range;

/// The latest keypairs of a batch that are searched for a receiver index: consecutive messages mostly belong to one.
pub(super) const LOOK_BACK: usize = 8;

/// What a datagram is that is not dropped.
pub(crate) enum Parsed {
    /// A transport message, which was added to the batch.
    Transport,
    /// A handshake message or a cookie reply.
    Handshake,
}

impl InboundBatch {
    /// Stage 2: finds out what each datagram of `memory` is, in ascending order. Keeps the transport messages with their
    /// keypairs; calls `handshake` with each handshake message and cookie reply, and where it came from. Anything else
    /// is counted and dropped.
    pub fn parse(
        &mut self,
        data_path: &DataPath,
        memory: &[u8],
        receives: &[Receive],
        mut handshake: impl FnMut(Endpoint, &[u8]),
    ) {
        for &Receive { ref bytes, segment_len, endpoint, ecn } in receives {
            self.origins.push(Origin { endpoint, ecn });
            let mut start = bytes.start;
            loop {
                let end = bytes.end.min(start.saturating_add(segment_len.max(1)));
                if let Ok(Parsed::Handshake) = self.parse_datagram(data_path, memory, start..end) {
                    handshake(endpoint, part(memory, start..end));
                }
                start = end;
                if start >= bytes.end {
                    break;
                }
            }
        }
    }

    /// Stage 2 for one datagram, which is all that was read.
    ///
    /// # Errors
    /// Why it is dropped, which is counted.
    pub(crate) fn parse_one(
        &mut self,
        data_path: &DataPath,
        datagram: &[u8],
        endpoint: Endpoint,
        ecn: Ecn,
    ) -> Result<Parsed, DropCause> {
        self.origins.push(Origin { endpoint, ecn });
        self.parse_datagram(data_path, datagram, 0..datagram.len())
    }

    /// Finds out what a datagram of the latest read is.
    fn parse_datagram(
        &mut self,
        data_path: &DataPath,
        memory: &[u8],
        bytes: Range<usize>,
    ) -> Result<Parsed, DropCause> {
        let parsed = match Message::parse(part(memory, bytes.clone())) {
            Some(Message::Transport(header)) => self.keep(data_path, header, bytes),
            Some(_) => Ok(Parsed::Handshake),
            None => Err(DropCause::InboundMalformed),
        };
        parsed.inspect_err(|cause| data_path.drops.add(*cause, 1))
    }

    /// Adds a transport message of the latest read, if its receiver index names a keypair.
    fn keep(
        &mut self,
        data_path: &DataPath,
        header: TransportHeader,
        bytes: Range<usize>,
    ) -> Result<Parsed, DropCause> {
        let (Some(keypair), Some(origin)) = (
            self.find_keypair(data_path, header.receiver_index),
            self.origins.len().checked_sub(1),
        ) else {
            return Err(DropCause::UnknownIndex);
        };
        self.messages.push(TransportMessage {
            sealed: bytes.start.saturating_add(TRANSPORT_HEADER_LEN)..bytes.end,
            counter: header.counter,
            origin,
            keypair,
            is_authentic: false,
            dropped: None,
            has_moved: false,
            packet: None,
        });
        Ok(Parsed::Transport)
    }

    /// The index of the keypair that a receiver index names, among the keypairs of this batch, to which it is
    /// added if necessary.
    fn find_keypair(&mut self, data_path: &DataPath, index: ReceiverIndex) -> Option<usize> {
        let mut latest = self.keypairs.iter().enumerate().rev().take(LOOK_BACK);
        if let Some((known, _)) = latest.find(|(_, keypair)| keypair.receiver_index == index) {
            return Some(known);
        }
        let (peer, keypair) = data_path.index_table.lookup_keypair(index)?;
        self.keypairs.push(ReceivingKeypair { receiver_index: index, peer, keypair });
        self.keypairs.len().checked_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::messages::COOKIE_REPLY_LEN;

    fn receive(bytes: Range<usize>, segment_len: usize) -> Receive {
        let endpoint = Endpoint::new(([192, 0, 2, 1], 7).into());
        Receive { bytes, segment_len, endpoint, ecn: Ecn::NOT_CAPABLE }
    }

    #[test]
    fn each_datagram_of_a_read_is_parsed_also_a_shorter_last_and_an_empty_one() {
        let (data_path, mut batch) = (DataPath::default(), InboundBatch::with_capacity(3, 8));
        let malformed = || data_path.drops.count(DropCause::InboundMalformed);
        let receives = [receive(0..100, 40), receive(100..100, 0), receive(100..228, 64)];
        let mut memory = [0; 228];
        for start in [100, 164] {
            memory[start] = 3;
        }
        let mut handshakes = 0;
        batch.parse(&data_path, &memory, &receives, |_, message| {
            assert_eq!(message.len(), COOKIE_REPLY_LEN);
            handshakes += 1;
        });
        assert_eq!((handshakes, malformed()), (2, 3 + 1));
    }
}
