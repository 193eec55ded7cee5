//! Splits a client's input into transactions, with limits on lines and transactions.
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use super::parse::{Refusal, parse};
use super::secret_text::SecretText;
use super::{Access, Operation, Scopes, preshared_keys};
use nix::errno::Errno;
use wgsep_proto::invariant::part;

/// Longest line, in bytes.
const MAX_LINE: usize = 64 * 1024;
/// Longest transaction of a client, in bytes.
pub(super) const MAX_TRANSACTION: usize = 64 * 1024 * 1024;
/// The same on the socket for preshared keys: those of 390 peers.
const MAX_PRESHARED_KEYS: usize = 64 * 1024;

/// The input of a client that was not taken yet.
pub(super) struct Inbox {
    /// What it may say.
    access: Access,
    /// Longest transaction, in bytes.
    max_transaction: usize,
    text: SecretText,
    /// How far `text` was searched for the end of a transaction, so that each byte is searched once.
    searched: usize,
    /// Length of the last line, as far as it was searched.
    line_len: usize,
    /// Number of lines before the last one.
    lines: usize,
    /// The present transaction exceeds a limit: it is read to its end, but not kept.
    refused: Option<Refusal>,
}

impl Inbox {
    /// Creates one of a client that may do so much.
    pub(super) fn new(access: Access) -> Self {
        let max_transaction = match access {
            Access::Everything => MAX_TRANSACTION,
            Access::PresharedKeys => MAX_PRESHARED_KEYS,
        };
        Self {
            access,
            max_transaction,
            text: SecretText::default(),
            searched: 0,
            line_len: 0,
            lines: 0,
            refused: None,
        }
    }

    /// Adds what was read.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.text.push(bytes);
    }

    /// Length of the input, in bytes.
    pub(super) fn len(&self) -> usize {
        self.text.as_bytes().len()
    }

    /// True if part of a transaction was received.
    pub(super) fn has_begun(&self) -> bool {
        self.lines > 0 || self.line_len > 0 || !self.text.as_bytes().is_empty()
    }

    /// Takes the next complete transaction, parsed or refused; `None` until its blank line was received.
    ///
    /// One that is longer than `limit` bytes is refused, too; other clients hold the rest of the memory.
    pub(super) fn next_transaction(
        &mut self,
        scopes: &dyn Scopes,
        limit: usize,
    ) -> Option<Result<Operation, Refusal>> {
        let Some(end) = self.find_end(limit) else {
            if self.refused.is_some() {
                self.text.clear();
                self.searched = 0;
            }
            return None;
        };
        let text = part(self.text.as_bytes(), 0..end);
        let result = match (self.refused.take(), self.access) {
            (Some(refusal), _) => Err(refusal),
            (None, Access::Everything) => parse(text, scopes),
            (None, Access::PresharedKeys) => preshared_keys::parse(text).map(Operation::Set),
        };
        self.text.consume(end);
        (self.searched, self.line_len, self.lines) = (0, 0, 0);
        Some(result)
    }

    /// The end of the first transaction, past its blank line.
    fn find_end(&mut self, limit: usize) -> Option<usize> {
        loop {
            let text = self.text.as_bytes();
            let rest = part(text, self.searched..text.len());
            if rest.is_empty() {
                return None;
            }
            let part = rest.iter().position(|byte| *byte == b'\n');
            let len = part.unwrap_or(rest.len());
            if part == Some(0) && self.line_len == 0 {
                return Some(self.searched.saturating_add(1));
            }
            self.searched = self.searched.saturating_add(len);
            self.line_len = self.line_len.saturating_add(len);
            self.check_bounds(limit);
            if part.is_some() {
                self.searched = self.searched.saturating_add(1);
                self.lines = self.lines.saturating_add(1);
                self.line_len = 0;
            }
        }
    }

    fn check_bounds(&mut self, limit: usize) {
        let (errno, reason) = if self.line_len > MAX_LINE {
            (Errno::EPROTO, "a line is longer than 64 KiB")
        } else if self.searched > self.max_transaction {
            (
                Errno::ENOMEM,
                match self.access {
                    Access::Everything => "a transaction is longer than 64 MiB",
                    Access::PresharedKeys => "a transaction is longer than 64 KiB",
                },
            )
        } else if self.searched > limit {
            (Errno::EBUSY, "all clients' transactions are longer than 64 MiB; let the others end")
        } else {
            return;
        };
        let (text, line) = (self.text.as_bytes(), self.lines.saturating_add(1));
        self.refused.get_or_insert_with(|| Refusal::new(text, errno, line, reason));
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::unwrap_used)]
mod tests {
    use super::super::parse::tests::Eth0;
    use super::*;
    use nix::libc;

    /// What comes out: the mark of a set, or the refusal's errno and line.
    type Outcome = Result<Option<u32>, (i32, usize)>;

    fn drain(inbox: &mut Inbox) -> Vec<Outcome> {
        let next = || {
            inbox.next_transaction(&Eth0, usize::MAX).map(|transaction| match transaction {
                Ok(Operation::Set(configuration)) => Ok(configuration.fwmark),
                Ok(Operation::Get | Operation::Statistics) => Ok(None),
                Err(refusal) => Err((refusal.errno, refusal.line)),
            })
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn transactions_are_the_same_however_the_bytes_arrive() {
        let text =
            b"set=1\nfwmark=1\n\nget=1\n\n\nset=1\nfwmark=x\n\nnonsense\n\nset=1\nfwmark=2\n\n";
        let expected: [Outcome; 6] = [
            Ok(Some(1)),
            Ok(None),
            Err((-libc::EPROTO, 1)),
            Err((-libc::EINVAL, 2)),
            Err((-libc::EPROTO, 1)),
            Ok(Some(2)),
        ];
        for size in 1..=text.len() {
            let mut inbox = Inbox::new(Access::Everything);
            let mut outcomes = Vec::new();
            for part in text.chunks(size) {
                inbox.push(part);
                outcomes.extend(drain(&mut inbox));
            }
            assert_eq!(outcomes, expected, "in parts of {size}");
            assert!(!inbox.has_begun());
        }
    }

    #[test]
    fn a_transaction_has_begun_until_its_blank_line() {
        let mut inbox = Inbox::new(Access::Everything);
        for byte in b"set=1\n" {
            inbox.push(&[*byte]);
            assert!(inbox.has_begun());
            assert_eq!(drain(&mut inbox), []);
            assert!(inbox.has_begun());
        }
        inbox.push(b"\n");
        assert_eq!(drain(&mut inbox), [Ok(None)]);
        assert!(!inbox.has_begun());
    }

    /// Refuses one byte too much with the line it is in, keeps none of what follows in that
    /// transaction, and takes the next one.
    #[test]
    fn a_line_has_64_kib_and_no_more() {
        let fits = format!("set=1\nfwmark={:0>65529}\n\n", 7);
        let mut inbox = Inbox::new(Access::Everything);
        inbox.push(fits.as_bytes());
        assert_eq!(drain(&mut inbox), [Ok(Some(7))]);
        for size in [1000, 1 << 20] {
            for tail in ["", "\n", "\nfwmark=1", "fwmark=1"] {
                let long = format!("set=1\nfwmark={:0>65530}{tail}\n\nset=1\nfwmark=8\n\n", 7);
                let mut outcomes = Vec::new();
                for part in long.as_bytes().chunks(size) {
                    inbox.push(part);
                    outcomes.extend(drain(&mut inbox));
                }
                let refused = (-libc::EPROTO, 2);
                if tail == "\n" {
                    // The blank line came early; what follows starts with another blank line.
                    assert_eq!(outcomes, [Err(refused), Err((-libc::EPROTO, 1)), Ok(Some(8))]);
                } else {
                    assert_eq!(outcomes, [Err(refused), Ok(Some(8))], "{tail:?}");
                }
            }
        }
        let long = format!("get={}\n\n", "1".repeat(MAX_LINE));
        inbox.push(long.as_bytes());
        assert_eq!(drain(&mut inbox), [Err((libc::EPROTO, 1))]);
    }

    #[test]
    fn a_client_that_sets_preshared_keys_alone_has_64_kib_and_no_more() {
        let peer = format!("public_key={0}\npreshared_key={0}\n", "a".repeat(64));
        let most = (MAX_PRESHARED_KEYS - "set=1\n".len()) / peer.len();
        for (count, expected) in [(most, Ok(None)), (most + 1, Err(-libc::ENOMEM))] {
            let mut inbox = Inbox::new(Access::PresharedKeys);
            inbox.push(format!("set=1\n{}\n", peer.repeat(count)).as_bytes());
            let outcomes: Vec<_> = drain(&mut inbox);
            let outcomes: Vec<_> =
                outcomes.into_iter().map(|outcome| outcome.map_err(|(errno, _)| errno)).collect();
            assert_eq!(outcomes, [expected], "{count} peers");
            assert_eq!(inbox.text.as_bytes(), b"");
        }
        let mut inbox = Inbox::new(Access::PresharedKeys);
        inbox.push(b"set=1\n");
        for _ in 0..100 {
            inbox.push(peer.repeat(100).as_bytes());
            let _none = drain(&mut inbox);
            assert!(inbox.len() <= MAX_PRESHARED_KEYS);
        }
    }

    #[test]
    fn a_transaction_is_bounded_to_the_byte_and_not_kept_beyond() {
        let mut inbox = Inbox { max_transaction: 1 << 20, ..Inbox::new(Access::Everything) };
        let line = format!("fwmark={:0>1016}\n", 7);
        assert_eq!(line.len(), 1 << 10);
        let full = format!("set=1\n{}fwmark={:0>1010}\n", line.repeat(1023), 8);
        assert_eq!(full.len(), 1 << 20);

        inbox.push(full.as_bytes());
        inbox.push(b"\n");
        assert_eq!(drain(&mut inbox), [Ok(Some(8))]);

        inbox.push(full.as_bytes());
        inbox.push(b"fwmark=1");
        for _ in 0..10 {
            inbox.push(line.as_bytes());
            assert_eq!(drain(&mut inbox), []);
            assert_eq!(inbox.text.as_bytes(), b"");
        }
        inbox.push(b"\nget=1\n\n");
        assert_eq!(drain(&mut inbox), [Err((-libc::ENOMEM, 1026)), Ok(None)]);
    }
}
