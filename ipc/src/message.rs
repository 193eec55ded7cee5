//! What the dataplane sends, and the one place where messages become bytes and back.
//!
//! A frame is a version byte, a sequence number (u32, little-endian) and a body in bincode. It holds
//! no string and no path, and is at most [`MAX_FRAME`] bytes.

use crate::Error;
use serde::{Deserialize, Serialize};

/// The longest frame, in bytes.
pub const MAX_FRAME: usize = 256;
/// Version of the contract; both programs are built together, so only equal ones talk.
pub const VERSION: u8 = 5;
/// Layers in a [`SandboxReport`].
pub const REPORT_LAYERS: usize = 19;

const HEADER_LEN: usize = 5;

/// What the dataplane asks of the helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The dataplane is locked down, which the helper verifies. Answered by [`crate::Reply::Granted`].
    LockedDown(SandboxReport),
    /// Open UDP sockets for both families on one port, 0 for any, marked. Answered by
    /// [`crate::Reply::UdpOpened`]; the sockets before are given up only if it succeeds.
    OpenUdp {
        /// UDP port, 0 for any.
        port: u16,
        /// SO_MARK, 0 for none.
        mark: u32,
    },
    /// Give up the sockets, so that the port is free.
    CloseUdp,
    /// Change the mark of the open sockets.
    SetMark {
        /// SO_MARK, 0 for none.
        mark: u32,
    },
    /// The dataplane ends in good order: the interface was deleted, or handed over.
    Bye,
    /// The answer to [`crate::Notice::Ping`], and others: the dataplane serves. It gets no reply.
    Pong,
}

impl Request {
    /// Its name in logs.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::LockedDown(_) => "LockedDown",
            Self::OpenUdp { .. } => "OpenUdp",
            Self::CloseUdp => "CloseUdp",
            Self::SetMark { .. } => "SetMark",
            Self::Bye => "Bye",
            Self::Pong => "Pong",
        }
    }
}

/// How each layer of the dataplane's sandbox turned out, as the policy encodes it.
pub type SandboxReport = [[u8; 3]; REPORT_LAYERS];

/// A frame's bytes.
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    bytes: [u8; MAX_FRAME],
    len: usize,
}

impl Frame {
    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// Encodes a body.
    pub(crate) fn encode(sequence: u32, body: impl Serialize) -> Result<Self, Error> {
        let mut bytes = [0; MAX_FRAME];
        let (header, rest) = bytes.split_at_mut(HEADER_LEN);
        header[0] = VERSION;
        header[1..].copy_from_slice(&sequence.to_le_bytes());
        let len =
            bincode::serde::encode_into_slice(body, rest, CODEC).map_err(|_| Error::TooLong)?;
        Ok(Self { bytes, len: HEADER_LEN + len })
    }
}

pub(crate) const CODEC: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<MAX_FRAME>,
> = bincode::config::standard().with_limit::<MAX_FRAME>();

/// Decodes a frame into its sequence number and body.
///
/// # Errors
/// [`Error::Malformed`] for anything but exactly one whole frame of this version.
pub fn decode<T: serde::de::DeserializeOwned>(frame: &[u8]) -> Result<(u32, T), Error> {
    let (header, body) = frame.split_first_chunk::<HEADER_LEN>().ok_or(Error::Malformed)?;
    let [version, sequence @ ..] = *header;
    if version != VERSION || frame.len() > MAX_FRAME {
        return Err(Error::Malformed);
    }
    let (message, len) =
        bincode::serde::decode_from_slice(body, CODEC).map_err(|_| Error::Malformed)?;
    if len != body.len() {
        return Err(Error::Malformed);
    }
    Ok((u32::from_le_bytes(sequence), message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FromHelper, Reply, TunOffload};

    fn requests() -> Vec<Request> {
        vec![
            Request::LockedDown([[0xff; 3]; REPORT_LAYERS]),
            Request::OpenUdp { port: 65535, mark: u32::MAX },
            Request::CloseUdp,
            Request::SetMark { mark: 7 },
            Request::Bye,
            Request::Pong,
        ]
    }

    #[test]
    fn every_message_fits_a_frame_and_survives_it() {
        for request in requests() {
            let frame = Frame::encode(u32::MAX, request).unwrap();
            assert!(frame.len <= MAX_FRAME);
            assert_eq!(decode(frame.as_bytes()), Ok((u32::MAX, request)));
        }
        let reply = Reply::Granted {
            ifindex: u32::MAX,
            netns: Some(i32::MAX),
            follows_moves: true,
            tun_queues: 255,
            offload: TunOffload::default(),
            status: true,
            psk: true,
            take_over: true,
        };
        let said = FromHelper::Reply { sequence: 3, reply };
        assert_eq!(decode(Frame::encode(0, said).unwrap().as_bytes()), Ok((0, said)));
        assert_eq!(said.descriptors(), 260);
    }

    #[test]
    fn short_long_and_foreign_frames_are_refused() {
        for request in requests() {
            let frame = Frame::encode(1, request).unwrap();
            let bytes = frame.as_bytes();
            for len in 0..bytes.len() {
                assert!(decode::<Request>(&bytes[..len]).is_err(), "{request:?} cut to {len}");
            }
            let mut trailing = bytes.to_vec();
            trailing.push(0);
            assert!(decode::<Request>(&trailing).is_err());
            let mut foreign = bytes.to_vec();
            foreign[0] = VERSION + 1;
            assert!(decode::<Request>(&foreign).is_err());
        }
        assert!(decode::<Request>(&[VERSION, 0, 0, 0, 0, 6]).is_err());
        assert!(decode::<Request>(&[VERSION; MAX_FRAME + 1]).is_err());
    }

    #[test]
    fn no_single_byte_makes_decoding_panic() {
        for request in requests() {
            let frame = Frame::encode(1, request).unwrap();
            for at in 0..frame.len {
                for byte in 0..=255 {
                    let mut bytes = frame.as_bytes().to_vec();
                    bytes[at] = byte;
                    let _either = decode::<Request>(&bytes);
                }
            }
        }
    }
}
