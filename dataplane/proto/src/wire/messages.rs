//! The four messages on the wire (whitepaper, section 5.4), parsed once into fixed-size fields.
//!
//! All integers are little-endian. The type is the first byte; the three reserved bytes after it must
//! be zero, so type and reserved are read as one word.
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use crate::noise::tai64n::TAI64N_LEN;

/// Length of a Poly1305 tag.
pub const TAG_LEN: usize = 16;
/// Length of mac1 and of mac2.
pub const MAC_LEN: usize = 16;
/// Length of a cookie.
pub const COOKIE_LEN: usize = 16;
/// Length of an XChaCha20 nonce.
pub const COOKIE_NONCE_LEN: usize = 24;
/// Length of a handshake initiation.
pub const INITIATION_LEN: usize = 148;
/// Length of a handshake response.
pub const RESPONSE_LEN: usize = 92;
/// Length of a cookie reply.
pub const COOKIE_REPLY_LEN: usize = 64;
/// Length of a transport message's header.
pub const TRANSPORT_HEADER_LEN: usize = 16;
/// What a transport message adds to the packet inside; also its least length.
pub const TRANSPORT_OVERHEAD: usize = TRANSPORT_HEADER_LEN + TAG_LEN;
/// The longest packet that fits into a UDP datagram of 65,535 bytes with its overhead, which the
/// IP and UDP headers of the datagram bound further.
pub const MAX_INNER_LEN: usize = 65_535 - TRANSPORT_OVERHEAD;

const TYPE_INITIATION: u32 = 1;
const TYPE_RESPONSE: u32 = 2;
const TYPE_COOKIE_REPLY: u32 = 3;
const TYPE_TRANSPORT: u32 = 4;

/// The sender's own index, which it puts into `sender_index`.
pub type SenderIndex = u32;
/// The receiver's index, as the receiver chose it.
pub type ReceiverIndex = u32;

/// First message of a handshake, 148 bytes.
#[derive(Clone)]
pub struct Initiation {
    /// The initiator's index.
    pub sender_index: SenderIndex,
    /// The initiator's ephemeral public key.
    pub ephemeral: [u8; 32],
    /// The initiator's static public key, sealed.
    pub sealed_static: [u8; 32 + TAG_LEN],
    /// The initiator's timestamp, sealed.
    pub sealed_timestamp: [u8; TAI64N_LEN + TAG_LEN],
}

/// Second message of a handshake, 92 bytes.
#[derive(Clone)]
pub struct Response {
    /// The responder's index.
    pub sender_index: SenderIndex,
    /// The initiator's index.
    pub receiver_index: ReceiverIndex,
    /// The responder's ephemeral public key.
    pub ephemeral: [u8; 32],
    /// An empty plaintext, sealed, which proves that the responder has the keys.
    pub sealed_nothing: [u8; TAG_LEN],
}

/// The answer of a responder under load, 64 bytes.
#[derive(Clone)]
pub struct CookieReply {
    /// The sender index of the message that this answers.
    pub receiver_index: ReceiverIndex,
    /// Nonce of the sealed cookie.
    pub nonce: [u8; COOKIE_NONCE_LEN],
    /// The cookie, sealed.
    pub sealed_cookie: [u8; COOKIE_LEN + TAG_LEN],
}

/// Header of a transport message; the sealed packet follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransportHeader {
    /// Which of the receiver's keypairs.
    pub receiver_index: ReceiverIndex,
    /// The nonce.
    pub counter: u64,
}

/// Any datagram that has one of the four forms.
pub enum Message {
    /// 148 bytes, macs still to be validated.
    Initiation(Initiation),
    /// 92 bytes, macs still to be validated.
    Response(Response),
    /// 64 bytes.
    CookieReply(CookieReply),
    /// At least 32 bytes; the rest of the datagram is the sealed packet.
    Transport(TransportHeader),
}

/// Takes fixed-size fields off the front of a datagram.
struct FieldReader<'a>(&'a [u8]);

impl FieldReader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

impl Message {
    /// Parses a datagram; `None` for anything that is not exactly one of the four forms.
    #[must_use]
    pub fn parse(datagram: &[u8]) -> Option<Self> {
        let mut reader = FieldReader(datagram);
        match (reader.u32()?, datagram.len()) {
            (TYPE_TRANSPORT, TRANSPORT_OVERHEAD..) => Some(Self::Transport(TransportHeader {
                receiver_index: reader.u32()?,
                counter: reader.u64()?,
            })),
            (TYPE_INITIATION, INITIATION_LEN) => Some(Self::Initiation(Initiation {
                sender_index: reader.u32()?,
                ephemeral: reader.array()?,
                sealed_static: reader.array()?,
                sealed_timestamp: reader.array()?,
            })),
            (TYPE_RESPONSE, RESPONSE_LEN) => Some(Self::Response(Response {
                sender_index: reader.u32()?,
                receiver_index: reader.u32()?,
                ephemeral: reader.array()?,
                sealed_nothing: reader.array()?,
            })),
            (TYPE_COOKIE_REPLY, COOKIE_REPLY_LEN) => Some(Self::CookieReply(CookieReply {
                receiver_index: reader.u32()?,
                nonce: reader.array()?,
                sealed_cookie: reader.array()?,
            })),
            _ => None,
        }
    }
}

/// Writes consecutive fixed-size fields.
struct Writer<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Writer<N> {
    fn new(message_type: u32) -> Self {
        Self { bytes: [0; N], at: 0 }.field(&message_type.to_le_bytes())
    }

    fn field(mut self, field: &[u8]) -> Self {
        let end = self.at.saturating_add(field.len());
        if let Some(destination) = self.bytes.get_mut(self.at..end) {
            destination.copy_from_slice(field);
        }
        self.at = end;
        self
    }
}

impl Initiation {
    /// The message with both macs still zero.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; INITIATION_LEN] {
        Writer::new(TYPE_INITIATION)
            .field(&self.sender_index.to_le_bytes())
            .field(&self.ephemeral)
            .field(&self.sealed_static)
            .field(&self.sealed_timestamp)
            .bytes
    }
}

impl Response {
    /// The message with both macs still zero.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; RESPONSE_LEN] {
        Writer::new(TYPE_RESPONSE)
            .field(&self.sender_index.to_le_bytes())
            .field(&self.receiver_index.to_le_bytes())
            .field(&self.ephemeral)
            .field(&self.sealed_nothing)
            .bytes
    }
}

impl CookieReply {
    /// The whole message.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; COOKIE_REPLY_LEN] {
        Writer::new(TYPE_COOKIE_REPLY)
            .field(&self.receiver_index.to_le_bytes())
            .field(&self.nonce)
            .field(&self.sealed_cookie)
            .bytes
    }
}

impl TransportHeader {
    /// The header's 16 bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; TRANSPORT_HEADER_LEN] {
        Writer::new(TYPE_TRANSPORT)
            .field(&self.receiver_index.to_le_bytes())
            .field(&self.counter.to_le_bytes())
            .bytes
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn datagram(message_type: u8, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[0] = message_type;
        bytes
    }

    #[test]
    fn each_type_has_its_exact_length() {
        for (message_type, len) in [(1, 148), (2, 92), (3, 64)] {
            assert!(Message::parse(&datagram(message_type, len)).is_some());
            assert!(Message::parse(&datagram(message_type, len - 1)).is_none());
            assert!(Message::parse(&datagram(message_type, len + 1)).is_none());
        }
    }

    #[test]
    fn transport_is_at_least_32_bytes() {
        assert!(Message::parse(&datagram(4, 31)).is_none());
        assert!(Message::parse(&datagram(4, 32)).is_some());
        assert!(Message::parse(&datagram(4, 65_507)).is_some());
    }

    #[test]
    fn reserved_bytes_must_be_zero_and_types_known() {
        for at in 1..4 {
            let mut bytes = datagram(4, 64);
            bytes[at] = 1;
            assert!(Message::parse(&bytes).is_none());
        }
        for message_type in [0, 5, 255] {
            assert!(Message::parse(&datagram(message_type, 148)).is_none());
        }
        assert!(Message::parse(&[]).is_none());
    }

    #[test]
    fn fields_survive_the_wire() {
        let header =
            TransportHeader { receiver_index: 0x0403_0201, counter: 0x0807_0605_0403_0201 };
        let mut bytes = header.to_bytes().to_vec();
        assert_eq!(bytes, [4, 0, 0, 0, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8]);
        bytes.resize(32, 0);
        let Some(Message::Transport(parsed)) = Message::parse(&bytes) else { panic!() };
        assert_eq!(parsed, header);
        let initiation = Initiation {
            sender_index: 7,
            ephemeral: [1; 32],
            sealed_static: [2; 48],
            sealed_timestamp: [3; 28],
        };
        let Some(Message::Initiation(parsed)) = Message::parse(&initiation.to_bytes()) else {
            panic!()
        };
        assert_eq!(parsed.to_bytes(), initiation.to_bytes());
        assert_eq!(initiation.to_bytes()[116..], [0; 32]);
    }
}
