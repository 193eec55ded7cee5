//! What the helper wrote down when both processes were locked down: the only word there is on layers that
//! the kernel does not show.

use crate::uapi::DIRECTORY;
use nix::fcntl::OFlag;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use wgsep_policy::described;

/// The states of a process's layers by their names, as `applied` or `degraded(EPERM)`.
type Layers = BTreeMap<String, String>;

/// Both processes' claims; or why they cannot be read.
pub(super) struct Claims(Result<BTreeMap<String, Layers>, Unread>);

/// Why there are no claims, and what to do about it.
struct Unread {
    reason: String,
    remedy: &'static str,
}

const RESTART: &str = "start wgsep again, which writes it anew";

/// Most bytes of a report; the helper's own has some 500.
const MAX_LEN: u64 = 16 * 1024;

/// Reads `IF.sandbox` beside the socket, if it is root's or the daemon's.
pub(super) fn read(interface: &str, daemon: Option<u32>) -> Claims {
    let path = format!("{DIRECTORY}/{interface}.sandbox");
    let claims = text(&path, daemon).and_then(|text| {
        let claims = parse(&text);
        let is_whole = ["helper", "dataplane"].iter().all(|process| claims.contains_key(*process));
        let incomplete = || Unread { reason: "incomplete".to_owned(), remedy: RESTART };
        is_whole.then_some(claims).ok_or_else(incomplete)
    });
    Claims(claims.map_err(|Unread { reason, remedy }| Unread {
        reason: format!("{path}: {reason}"),
        remedy,
    }))
}

impl From<std::io::Error> for Unread {
    fn from(error: std::io::Error) -> Self {
        let reason = error
            .raw_os_error()
            .map_or_else(|| error.to_string(), |errno| described(nix::Error::from_raw(errno)));
        let remedy = match error.kind() {
            ErrorKind::NotFound => {
                "the helper could not write it, which its log says, or it was removed, or the socket was renamed; start wgsep again, which writes it anew"
            }
            ErrorKind::PermissionDenied => "run as root",
            _ => RESTART,
        };
        Self { reason, remedy }
    }
}

/// The text of a file in a directory that others may be able to write: it need not be what it should be.
fn text(path: &str, daemon: Option<u32>) -> Result<String, Unread> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    let foreign = |what: String| Unread {
        reason: format!("{what}, so that the helper did not write it"),
        remedy: "remove it, and find out who put it there; then start wgsep again, which writes it anew",
    };
    let status = file.metadata()?;
    if !status.is_file() {
        return Err(foreign("no regular file".to_owned()));
    }
    let owner = status.uid();
    if owner != 0 && Some(owner) != daemon {
        return Err(foreign(format!("uid {owner}'s")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_LEN + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_LEN {
        return Err(foreign(format!("longer than {MAX_LEN} bytes")));
    }
    String::from_utf8(bytes).map_err(|error| foreign(error.to_string()))
}

/// A line a process: its name and a colon, then `layer=state` by layer.
fn parse(text: &str) -> BTreeMap<String, Layers> {
    let process = |line: &str| {
        let (process, layers) = line.split_once(": ")?;
        let layers = layers.split_whitespace().filter_map(|layer| layer.split_once('='));
        let layers = layers.map(|(layer, state)| (layer.to_owned(), state.to_owned())).collect();
        Some((process.to_owned(), layers))
    };
    text.lines().filter_map(process).collect()
}

impl Claims {
    /// What is claimed of a layer: `None` if nothing is, an error if that could not be read.
    pub(super) fn of(&self, process: &str, layer: &str) -> Result<Option<&str>, &str> {
        let processes = self.0.as_ref().map_err(|unread| &*unread.reason)?;
        Ok(processes.get(process).and_then(|layers| layers.get(layer)).map(String::as_str))
    }

    /// The errno by which a layer is claimed to be refused.
    pub(super) fn errno_of(&self, process: &str, layer: &str) -> Option<&str> {
        let state = self.of(process, layer).ok()??;
        let errno = state.strip_prefix("degraded(")?.split([':', ')']).next()?;
        errno.bytes().all(|byte| byte.is_ascii_alphanumeric()).then_some(errno)
    }

    #[cfg(test)]
    pub(super) fn parsed(text: &str) -> Self {
        Self(Ok(parse(text)))
    }

    /// What to do if they cannot be read, with the reason.
    pub(super) fn remedy(&self) -> Option<String> {
        let Unread { reason, remedy } = self.0.as_ref().err()?;
        Some(format!("{reason}: {remedy}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_found_by_process_and_layer() {
        let claims = Claims::parsed(
            "helper: landlock=applied\ndataplane: landlock=degraded(EPERM) x=y namespaces=degraded(ENOSPC:uts)\n",
        );
        assert_eq!(claims.errno_of("dataplane", "landlock"), Some("EPERM"));
        assert_eq!(claims.errno_of("dataplane", "namespaces"), Some("ENOSPC"));
        assert_eq!(claims.errno_of("helper", "landlock"), None);
        assert_eq!(claims.of("helper", "landlock"), Ok(Some("applied")));
        assert_eq!(claims.of("dataplane", "landlock"), Ok(Some("degraded(EPERM)")));
        assert_eq!(claims.of("helper", "x"), Ok(None));
        assert_eq!(claims.of("nobody", "x"), Ok(None));
        let gone = Unread { reason: "gone".to_owned(), remedy: RESTART };
        let gone = Claims(Err(gone));
        assert_eq!(gone.of("helper", "landlock"), Err("gone"));
        assert_eq!(gone.remedy(), Some(format!("gone: {RESTART}")));
    }
}
