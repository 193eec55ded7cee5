//! The answer to a transaction, of which a `get` is formatted in parts while its client reads it.

use super::format;
use super::secret_text::SecretText;
use crate::drops::Drops;
use nix::libc::EINTR;
use std::collections::VecDeque;
use wgsep_proto::device::control_plane::{ControlPlane, StatusCursor, StatusItem};

/// Most bytes of a part: all that a client that does not read takes, unless the configuration changes meanwhile.
pub(super) const PART_LEN: usize = 16 * 1024;

/// What of an answer is not written yet. An empty one is complete.
#[derive(Default)]
pub(super) struct Answer {
    /// Formatted; none of them is empty.
    parts: VecDeque<SecretText>,
    /// Bytes of the first part that are written.
    written: usize,
    /// What of a `get` is not formatted.
    rest: Option<StatusCursor>,
}

impl From<SecretText> for Answer {
    fn from(text: SecretText) -> Self {
        Self { parts: [text].into(), ..Self::default() }
    }
}

impl Answer {
    /// Creates the answer to a `get`, with its first part.
    pub(super) fn get(device: &ControlPlane, drops: Drops<'_>) -> Self {
        let mut answer = Self { rest: Some(StatusCursor::default()), ..Self::default() };
        answer.format_into(format::device(&device.status(), drops), device);
        answer
    }

    /// Formats the next part if all that is formatted is written.
    pub(super) fn format_if_written(&mut self, device: &ControlPlane) {
        if self.parts.is_empty() {
            self.format_part(device);
        }
    }

    fn format_part(&mut self, device: &ControlPlane) {
        self.format_into(SecretText::with_capacity(PART_LEN), device);
    }

    /// Adds a part that begins with `text`. It ends with a whole line.
    fn format_into(&mut self, mut text: SecretText, device: &ControlPlane) {
        let Some(mut cursor) = self.rest.take() else { return };
        while let Some(item) = device.next_status(&mut cursor) {
            match item {
                StatusItem::Peer(peer) => format::peer(&mut text, &peer),
                StatusItem::AllowedIp(allowed_ip) => format::allowed_ip(&mut text, allowed_ip),
            }
            if text.as_bytes().len() > PART_LEN - format::LONGEST_ITEM {
                self.rest = Some(cursor);
                break;
            }
        }
        if self.rest.is_none() {
            format::end(&mut text, 0);
        }
        self.parts.push_back(text);
    }

    /// Formats what is left, because the configuration will change, so that it shows one configuration throughout. If
    /// that takes more than `most` parts it ends with EINTR instead. Returns how many parts it has.
    pub(super) fn complete(&mut self, device: &ControlPlane, most: usize) -> usize {
        while self.rest.is_some() && self.parts.len() < most {
            self.format_part(device);
        }
        if self.rest.take().is_some() || self.parts.len() > most.max(1) {
            self.parts.truncate(1);
            let mut text = SecretText::with_capacity(32);
            format::end(&mut text, EINTR);
            self.parts.push_back(text);
        }
        self.parts.len()
    }

    /// The text that comes next, as far as it is formatted.
    pub(super) fn unwritten(&self) -> &[u8] {
        let first = self.parts.front().and_then(|part| part.as_bytes().get(self.written..));
        first.unwrap_or_default()
    }

    /// Removes the first `len` bytes of what is unwritten, of which there are so many.
    pub(super) fn advance(&mut self, len: usize) {
        self.written += len;
        if self.unwritten().is_empty() {
            self.parts.pop_front();
            self.written = 0;
        }
    }

    /// True if all of it is written.
    pub(super) fn is_complete(&self) -> bool {
        self.parts.is_empty() && self.rest.is_none()
    }

    /// Number of parts that are formatted.
    #[cfg(test)]
    pub(super) fn parts(&self) -> usize {
        self.parts.len()
    }
}
