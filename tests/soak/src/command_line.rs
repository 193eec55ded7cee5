//! What `make soak` passes on.

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgAction, Command, value_parser};

use crate::events::EVENTS;
use crate::soak::{Plan, random_seed, soak};

fn command() -> Command {
    let events = |name: &'static str, help: &'static str| {
        let names: Vec<_> = EVENTS.iter().map(|event| event.name).collect();
        let arg = Arg::new(name).long(name).value_delimiter(' ').action(ArgAction::Append);
        arg.value_parser(names).help(help)
    };
    Command::new("soak")
        .about("Random events on a live tunnel, which must recover from each")
        .arg(
            Arg::new("minutes")
                .long("minutes")
                .value_parser(value_parser!(u64).range(1..))
                .default_value("3")
                .help("How long"),
        )
        .arg(
            Arg::new("seed")
                .long("seed")
                .value_parser(value_parser!(u64))
                .help("Which events [default: random, printed]"),
        )
        .arg(events("events", "Only these events [default: all]"))
        .arg(events("except", "Not these events"))
        // cargo bench passes it to every benchmark.
        .arg(Arg::new("bench").long("bench").action(ArgAction::SetTrue).hide(true))
}

/// Runs what the command line asks for.
///
/// # Panics
///
/// When the tunnel does not recover from an event, or anything else is not as it must be.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let matches = match command().try_get_matches_from(arguments) {
        Ok(matches) => matches,
        Err(error) => error.exit(),
    };
    if !nix::unistd::geteuid().is_root() {
        let _ = writeln!(io::stderr(), "soak: it makes network namespaces: run it as root");
        return ExitCode::FAILURE;
    }
    let minutes: u64 = matches.get_one("minutes").copied().unwrap_or(3);
    let names = |option: &str| -> Option<Vec<String>> {
        matches.get_many::<String>(option).map(|names| names.cloned().collect())
    };
    let plan = Plan {
        duration: Duration::from_secs(60 * minutes),
        seed: matches.get_one("seed").copied().unwrap_or_else(random_seed),
        only: names("events"),
        except: names("except").unwrap_or_default(),
    };
    soak(&plan);
    ExitCode::SUCCESS
}
