//! The bytes of rtnetlink: messages and their attributes (rtnetlink(7), linux/netlink.h).

use nix::libc;

/// Flags of a request for a whole table.
pub(crate) const DUMP: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
/// Length of struct nlmsghdr.
pub(crate) const HEADER_LEN: usize = 16;
const ATTRIBUTE_HEADER_LEN: usize = 4;

/// A message in a datagram.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NetlinkMessage<'a> {
    /// RTM_NEWLINK and the like.
    pub(crate) kind: u16,
    /// NLM_F_*.
    pub(crate) flags: u16,
    /// Sequence number of the request that it answers.
    pub(crate) sequence: u32,
    /// The socket that it answers, or whose request caused the change, 0 for the kernel.
    pub(crate) port: u32,
    /// The fixed header of its type, and attributes.
    pub(crate) body: &'a [u8],
}

/// Splits off the first message; `None` at the end, and if it is truncated.
pub(crate) fn split_message(bytes: &[u8]) -> Option<(NetlinkMessage<'_>, &[u8])> {
    let len = usize::try_from(word(bytes, 0)?).ok()?;
    let (kind, flags, sequence) = (half(bytes, 4)?, half(bytes, 6)?, word(bytes, 8)?);
    let (port, body) = (word(bytes, 12)?, bytes.get(HEADER_LEN..len)?);
    let message = NetlinkMessage { kind, flags, sequence, port, body };
    Some((message, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// The value of the first attribute of a type.
pub(crate) fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let (len, kind) = (usize::from(half(bytes, 0)?), half(bytes, 2)?);
        let value = bytes.get(ATTRIBUTE_HEADER_LEN..len)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(len.next_multiple_of(4)..)?;
    }
}

/// The number in the first attribute of a type.
pub(crate) fn number(bytes: &[u8], wanted: u16) -> Option<u32> {
    attribute(bytes, wanted).and_then(|value| word(value, 0))
}

/// The 32-bit number at an offset, in the machine's byte order.
pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_ne_bytes(*word))
}

/// The error number of an NLMSG_ERROR or NLMSG_DONE, 0 for none.
pub(crate) fn errno(body: &[u8]) -> i32 {
    word(body, 0).map_or(0, |negative| negative.cast_signed().wrapping_neg())
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|half| u16::from_ne_bytes(*half))
}

/// Builds a message from a fixed header and attributes.
pub(crate) fn message(
    kind: u16,
    flags: u16,
    sequence: u32,
    fixed: &[u8],
    attributes: &[(u16, &[u8])],
) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_LEN];
    bytes.extend_from_slice(fixed);
    for (kind, value) in attributes {
        let len = (ATTRIBUTE_HEADER_LEN + value.len()) as u16;
        bytes.extend_from_slice(&len.to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    let len = bytes.len() as u32;
    bytes[..4].copy_from_slice(&len.to_ne_bytes());
    bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
    bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
    bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_reads_as_it_was_written() {
        let mut bytes = message(26, 1, 7, &[9; 12], &[(1, &[1, 2, 3]), (5, &6u32.to_ne_bytes())]);
        bytes.extend(message(24, 0, 8, &[], &[]));
        let (first, rest) = split_message(&bytes).unwrap();
        assert_eq!((first.kind, first.flags, first.sequence), (26, 1, 7));
        assert_eq!(first.body[..12], [9; 12]);
        assert_eq!(attribute(&first.body[12..], 1), Some(&[1, 2, 3][..]));
        assert_eq!(number(&first.body[12..], 5), Some(6));
        assert_eq!(number(&first.body[12..], 2), None);
        let (second, rest) = split_message(rest).unwrap();
        assert_eq!((second.kind, second.sequence, rest.len()), (24, 8, 0));
        assert!(split_message(rest).is_none());
    }
}
