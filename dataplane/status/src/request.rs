//! What a client may send.
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

/// Most bytes of a request, with its blank line. A client whose request is longer is refused and disconnected.
pub const MAX_REQUEST: usize = 32;

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// `get=1`.
    Get,
    /// `watch=1`.
    Watch,
}

/// What was sent is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// The input of a client that was not taken yet: at most two requests long.
#[derive(Debug, Default)]
pub struct Requests(Vec<u8>);

impl Requests {
    /// Most bytes that it takes at present.
    #[must_use]
    pub fn room(&self) -> usize {
        MAX_REQUEST.saturating_sub(self.0.len())
    }

    /// Adds what was read, of which it keeps as much as there is room for.
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend(bytes.iter().take(self.room()));
    }

    /// Whether part of a request was received.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        !self.0.is_empty()
    }

    /// Takes the next request; `None` until its blank line was received.
    pub fn take(&mut self) -> Option<Result<Request, Refused>> {
        let end = self.0.windows(2).position(|pair| pair == b"\n\n");
        let Some(end) = end else {
            let is_hopeless = self.room() == 0 || self.0.first() == Some(&b'\n');
            return is_hopeless.then_some(Err(Refused));
        };
        let rest = self.0.split_off(end.saturating_add(2));
        let request = core::mem::replace(&mut self.0, rest);
        Some(match request.get(..end) {
            Some(b"get=1") => Ok(Request::Get),
            Some(b"watch=1") => Ok(Request::Watch),
            _ => Err(Refused),
        })
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::unwrap_used)]
mod tests {
    use super::*;

    fn all(bytes: &[u8], piece: usize) -> Vec<Result<Request, Refused>> {
        let mut requests = Requests::default();
        let mut taken = Vec::new();
        for bytes in bytes.chunks(piece) {
            requests.push(bytes);
            while let Some(request) = requests.take() {
                taken.push(request);
                if request.is_err() {
                    return taken;
                }
            }
        }
        taken
    }

    #[test]
    fn two_requests_exist_however_their_bytes_arrive() {
        for piece in 1..20 {
            assert_eq!(
                all(b"get=1\n\nwatch=1\n\nget=1\n\nge", piece),
                [Ok(Request::Get), Ok(Request::Watch), Ok(Request::Get)],
                "in pieces of {piece}"
            );
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for bytes in [
            &b"\n"[..],
            b"\n\n",
            b"get=2\n\n",
            b"get=1\nget=1\n\n",
            b"get=1 \n\n",
            b"GET=1\n\n",
            b"set=1\n\n",
            b"set=1\nprivate_key=00\n\n",
            b"get=1\r\n\r\n\n\n",
            b"\0\xff\n\n",
            &[b'a'; MAX_REQUEST],
            &[b'g'; 1 << 16],
        ] {
            for piece in [1, 7, 1 << 16] {
                assert_eq!(all(bytes, piece), [Err(Refused)], "{bytes:?} in pieces of {piece}");
            }
        }
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut requests = Requests::default();
        requests.push(&[b'a'; 1 << 20]);
        assert_eq!((requests.0.len(), requests.room()), (MAX_REQUEST, 0));
    }
}
