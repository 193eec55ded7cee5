//! What `make bench` passes on, and what comes of it.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::net::SocketAddrV4;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use wgsep_tests::wg::KeyPair;

use crate::bed::{FORWARD, VethOffload};
use crate::contender::Contender;
use crate::forwarder::Forwarder;
use crate::machine::{self, Machine};
use crate::results::{Failure, Results};
use crate::round::{Common, Measure, Pace, Run, say};
use crate::{readme, table};

/// Rounds of a full run.
const ROUNDS: u32 = 3;

fn command() -> Command {
    let value = |name: &'static str, placeholder: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(placeholder).help(help)
    };
    let words = |arg: Arg| arg.value_delimiter(' ').action(ArgAction::Append);
    let measures = Measure::ALL.map(|(name, _)| name);
    let veth = VethOffload::ALL.map(|(name, _)| name);
    Command::new("suite")
        .about("Measures wgsep beside its peers and a forwarder without cryptography")
        .arg(words(
            value("measures", "WORDS", "What to measure [default: all]").value_parser(measures),
        ))
        .arg(words(
            value("peers", "NAMES", "What to measure beside each other [default: all]")
                .value_parser(Contender::ALL.map(Contender::name)),
        ))
        .arg(
            value("runs", "N", "Rounds [default: 3, or 1 if quick]")
                .value_parser(value_parser!(u32).range(1..)),
        )
        .arg(
            value("pace", "PACE", "How long each measure lasts")
                .value_parser(["full", "quick", "brief"])
                .default_value("full"),
        )
        .arg(
            value("veth", "OFFLOAD", "What the network between the ends can do")
                .value_parser(veth)
                .default_value("default"),
        )
        .arg(
            value("said", "LINE", "The command to be shown with the results")
                .default_value("make bench"),
        )
        .arg(
            value("out", "DIRECTORY", "Where the results go")
                .value_parser(value_parser!(PathBuf))
                .default_value("bench"),
        )
        // cargo bench says so to every benchmark.
        .arg(Arg::new("bench").long("bench").action(ArgAction::SetTrue).hide(true))
        .subcommand(
            Command::new(FORWARD)
                .about("One end of a tunnel without cryptography")
                .arg(Arg::new("interface").required(true))
                .arg(Arg::new("local").required(true).value_parser(value_parser!(SocketAddrV4)))
                .arg(Arg::new("peer").required(true).value_parser(value_parser!(SocketAddrV4))),
        )
        .subcommand(
            Command::new("publish")
                .about("Writes the sections on speed of README and tests/speed/README.md from the results of a run")
                .arg(Arg::new("results").required(true).value_parser(value_parser!(PathBuf)))
                .arg(Arg::new("bench").long("bench").action(ArgAction::SetTrue).hide(true)),
        )
}

/// Does what the command line says.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let matches = match command().try_get_matches_from(arguments) {
        Ok(matches) => matches,
        Err(error) => error.exit(),
    };
    let outcome = match matches.subcommand() {
        Some((FORWARD, matches)) => forward(matches),
        Some((_publish, matches)) => publish(matches),
        None => measure(&matches),
    };
    match outcome {
        Ok(code) => code,
        Err(line) => {
            say(&format!("bench: {line}"));
            ExitCode::FAILURE
        }
    }
}

fn forward(matches: &ArgMatches) -> Result<ExitCode, String> {
    let interface = matches.get_one::<String>("interface").map_or("", String::as_str);
    let address = |name| matches.get_one::<SocketAddrV4>(name).copied().ok_or("no address");
    let forwarder = Forwarder::open(interface, address("local")?, address("peer")?)?;
    forwarder.run().map_err(|error| format!("forward: {error}"))?;
    Ok(ExitCode::SUCCESS)
}

fn publish(matches: &ArgMatches) -> Result<ExitCode, String> {
    let file = matches.get_one::<PathBuf>("results").ok_or("no results")?;
    readme::publish(file)?;
    Ok(ExitCode::SUCCESS)
}

fn measure(matches: &ArgMatches) -> Result<ExitCode, String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("it makes network namespaces: run it as root".to_owned());
    }
    let text = |name: &str| matches.get_one::<String>(name).map_or("", String::as_str);
    let start = Instant::now();
    let (pace, rounds) = match text("pace") {
        "quick" => (Pace::QUICK, 1),
        "brief" => (Pace::BRIEF, 1),
        _ => (Pace::FULL, ROUNDS),
    };
    let veth = VethOffload::ALL.into_iter().find(|(name, _)| *name == text("veth"));
    let veth = veth.map_or(VethOffload::Default, |(_, offload)| offload);
    let measures = named(matches, "measures", Measure::named, &Measure::ALL.map(|(_, all)| all));
    let contenders = named(matches, "peers", Contender::named, &Contender::ALL);
    let mut results = Results {
        date: machine::date(),
        command: text("said").to_owned(),
        commit: machine::commit(),
        machine: Machine::this(),
        veth,
        rounds: matches.get_one("runs").copied().unwrap_or(rounds),
        contenders: Vec::new(),
        samples: Vec::new(),
        loads: Vec::new(),
        failures: Vec::new(),
    };
    let asked_for = matches.contains_id("peers");
    let contenders = present(&contenders, asked_for, &mut results)?;
    let common = Common { veth, pace, key: KeyPair::generate() };
    Run { contenders: &contenders, measures: &measures, common, results: &mut results, start }
        .run();
    let out = matches.get_one::<PathBuf>("out").ok_or("no directory for the results")?;
    let kept = keep(&results, out)?;
    let _nobody_reads = writeln!(io::stdout(), "{}\n{}", table::of(&results), kept.display());
    let code = if results.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    Ok(code)
}

/// What an option names, in the order of `all`; all of it without the option.
fn named<T: Copy + PartialEq>(
    matches: &ArgMatches,
    option: &str,
    parse: impl Fn(&str) -> Option<T>,
    all: &[T],
) -> Vec<T> {
    let Some(words) = matches.get_many::<String>(option) else { return all.to_vec() };
    let wanted: Vec<T> = words.filter_map(|word| parse(word)).collect();
    all.iter().filter(|one| wanted.contains(one)).copied().collect()
}

/// The contenders that are installed. One that is not is an error if it was asked for, and else a
/// failure that the tables show.
fn present(
    contenders: &[Contender],
    asked_for: bool,
    results: &mut Results,
) -> Result<Vec<Contender>, String> {
    let mut present = Vec::new();
    for contender in contenders.iter().copied() {
        match contender.version() {
            Ok(version) => {
                results.contenders.push((contender.name().to_owned(), version));
                present.push(contender);
            }
            Err(reason) if asked_for => return Err(reason),
            Err(reason) => {
                let (contender, measure) = (contender.name().to_owned(), "start".to_owned());
                results.failures.push(Failure { contender, round: 0, measure, reason });
            }
        }
    }
    Ok(present)
}

/// Keeps results, table and charts in a directory of their own, and says which.
fn keep(results: &Results, out: &Path) -> Result<PathBuf, String> {
    let name: String =
        results.date.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let directory = out.join(&name);
    let json = serde_json::to_string_pretty(results).map_err(|error| error.to_string())?;
    let write = || -> io::Result<()> {
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("results.json"), json + "\n")?;
        fs::write(directory.join("table.md"), table::of(results))?;
        for (name, chart) in readme::charts(results) {
            fs::write(directory.join(name), chart)?;
        }
        let latest = out.join("latest");
        let _none_yet = fs::remove_file(&latest);
        symlink(&name, latest)
    };
    write().map_err(|error| format!("keep the results in {}: {error}", directory.display()))?;
    Ok(directory)
}
