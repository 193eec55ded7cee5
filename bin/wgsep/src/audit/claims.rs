//! What the helper wrote down when both processes were sealed: the only word there is on layers that
//! the kernel does not show.

use super::processes::DIRECTORY;
use std::collections::BTreeMap;
use std::fs;

/// The states of a process's layers by their names, as `applied` or `degraded(EPERM)`.
type Layers = BTreeMap<String, String>;

/// Both processes' claims; or why they cannot be read.
pub(super) struct Claims(Result<BTreeMap<String, Layers>, String>);

/// Reads `IF.sandbox` beside the socket.
pub(super) fn read(interface: &str) -> Claims {
    let path = format!("{DIRECTORY}/{interface}.sandbox");
    Claims(fs::read_to_string(&path).map(|text| parse(&text)).map_err(|e| format!("{path}: {e}")))
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
