//! What the helper wrote down when both processes were sealed: the only word there is on layers that
//! the kernel does not show.

use super::processes::DIRECTORY;
use nix::fcntl::OFlag;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

/// The states of a process's layers by their names, as `applied` or `degraded(EPERM)`.
type Layers = BTreeMap<String, String>;

/// Both processes' claims; or why they cannot be read.
pub(super) struct Claims(Result<BTreeMap<String, Layers>, String>);

/// Most bytes of a report; the helper's own has some 500.
const MAX_LEN: u64 = 16 * 1024;

/// Reads `IF.sandbox` beside the socket, if it is root's or the daemon's.
pub(super) fn read(interface: &str, daemon: Option<u32>) -> Claims {
    let path = format!("{DIRECTORY}/{interface}.sandbox");
    let text = text(&path, daemon);
    Claims(text.map(|text| parse(&text)).map_err(|reason| format!("{path}: {reason}")))
}

/// The text of a file in a directory that others may be able to write: it need not be what it should be.
fn text(path: &str, daemon: Option<u32>) -> Result<String, String> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path);
    let file = opened.map_err(|error| error.to_string())?;
    let status = file.metadata().map_err(|error| error.to_string())?;
    if !status.is_file() {
        return Err("no regular file, so that the helper did not write it".to_owned());
    }
    let owner = status.uid();
    if owner != 0 && Some(owner) != daemon {
        return Err(format!("uid {owner}'s, so that the helper did not write it"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_LEN {
        return Err(format!("longer than {MAX_LEN} bytes, so that the helper did not write it"));
    }
    String::from_utf8(bytes).map_err(|error| error.to_string())
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
        let processes = self.0.as_ref().map_err(String::as_str)?;
        Ok(processes.get(process).and_then(|layers| layers.get(layer)).map(String::as_str))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_found_by_process_and_layer() {
        let claims = Claims(Ok(parse(
            "helper: landlock=applied\ndataplane: landlock=degraded(EPERM) x=y\n",
        )));
        assert_eq!(claims.of("helper", "landlock"), Ok(Some("applied")));
        assert_eq!(claims.of("dataplane", "landlock"), Ok(Some("degraded(EPERM)")));
        assert_eq!(claims.of("helper", "x"), Ok(None));
        assert_eq!(claims.of("nobody", "x"), Ok(None));
        assert!(Claims(Err("gone".to_owned())).of("helper", "landlock").is_err());
    }
}
