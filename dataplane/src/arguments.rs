//! The command line that the helper writes for the dataplane.

use crate::log;
use std::ops::RangeInclusive;

/// The helper's command line for the dataplane.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Name of the interface, for the log and to follow it.
    pub(crate) interface: String,
    /// Worker threads.
    pub(crate) workers: usize,
    /// Whether to send many datagrams at once.
    pub(crate) udp_gso: bool,
    /// As `log::set_verbosity` takes it.
    pub(crate) verbosity: u8,
    /// UDP port to start with, 0 for any.
    pub(crate) listen_port: u16,
    /// Ports that the helper opens. It refuses others only when asked to open them.
    pub(crate) ports: RangeInclusive<u16>,
    /// Mark to start with, 0 for none.
    pub(crate) fwmark: u32,
}

impl Default for Arguments {
    fn default() -> Self {
        Self {
            interface: String::new(),
            workers: 1,
            udp_gso: true,
            verbosity: 3,
            listen_port: 0,
            ports: 1..=u16::MAX,
            fwmark: 0,
        }
    }
}

impl Arguments {
    /// Parses what follows the build's version.
    ///
    /// # Errors
    /// The line for the operator, if the helper is of another build.
    pub(crate) fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut arguments = Self::default();
        while let Some(option) = words.next() {
            let value = words
                .next()
                .ok_or(format!("{option} needs a value; install both programs from one build"))?;
            let bad =
                || format!("{option}: bad value {value:?}; install both programs from one build");
            match option.as_str() {
                "--interface" => arguments.interface = value,
                "--workers" => arguments.workers = value.parse().map_err(|_| bad())?,
                "--udp-gso" => arguments.udp_gso = parse_switch(&value).ok_or_else(bad)?,
                "--log-level" => arguments.verbosity = log::verbosity(&value).ok_or_else(bad)?,
                "--listen-port" => arguments.listen_port = value.parse().map_err(|_| bad())?,
                "--ports" => arguments.ports = parse_ports(&value).ok_or_else(bad)?,
                "--fwmark" => arguments.fwmark = value.parse().map_err(|_| bad())?,
                _ => {
                    return Err(format!(
                        "unknown option {option}; install both programs from one build"
                    ));
                }
            }
        }
        Ok(arguments)
    }
}

/// Refuses a helper of another build than `version`: an update that was interrupted or that replaced
/// one program only. The same options and messages may have another meaning there.
pub(crate) fn check_build(
    version: &str,
    words: &mut impl Iterator<Item = String>,
) -> Result<(), String> {
    let helper = match (words.next().as_deref(), words.next()) {
        (Some("--build"), Some(helper)) => helper,
        _ => "unknown".to_owned(),
    };
    if helper == version {
        return Ok(());
    }
    Err(format!(
        "wgsep-dataplane is version {version}, but wgsep is version {helper}; install both programs from one build"
    ))
}

fn parse_ports(value: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = value.split_once('-')?;
    Some(first.parse().ok()?..=last.parse().ok()?)
}

fn parse_switch(value: &str) -> Option<bool> {
    match value {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        Arguments::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn arguments_are_what_the_helper_passes() {
        let line = "--interface wg0 --workers 2 --udp-gso off --log-level debug --listen-port 7 --ports 7-8 --fwmark 9";
        let expected = Arguments {
            interface: "wg0".to_owned(),
            workers: 2,
            udp_gso: false,
            verbosity: 4,
            listen_port: 7,
            ports: 7..=8,
            fwmark: 9,
        };
        assert_eq!(parse(line), Ok(expected));
        for bad in [
            "--workers",
            "--workers x",
            "--log-level loud",
            "--fwmark -1",
            "--udp-gso 1",
            "--ports 7",
            "wg0 x",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_helper_of_another_build_is_refused() {
        let check = |line: &str| check_build("2", &mut line.split(' ').map(str::to_owned));
        assert_eq!(check("--build 2 --interface wg0"), Ok(()));
        for other in ["--build 1 --interface wg0", "--interface 2", "--build", ""] {
            let error = check(other).unwrap_err();
            assert!(error.ends_with("install both programs from one build"), "{error}");
        }
    }
}
