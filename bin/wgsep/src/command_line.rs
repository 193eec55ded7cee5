//! Options and the environment that the other implementations understand, turned into [`Options`].

use clap::builder::PossibleValue;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use wgsep_launch::{
    Access, Format, Grants, Listen, LogLevel, MAX_LISTEN_ADDRESSES, Offload, Options, check_name,
    print_error,
};

/// What `make` calls this build (`bin/dist/version`); with cargo alone, the workspace's version.
pub const VERSION: &str = match option_env!("WGSEP_VERSION") {
    Some(version) => version,
    None => env!("CARGO_PKG_VERSION"),
};

const USES: &str = "\
Three common uses:
  wgsep -f wg0          serve under your eyes; then: wg setconf wg0 wg0.conf
  sudo WG_QUICK_USERSPACE_IMPLEMENTATION=wgsep wg-quick up wg0   with routes
  wgsep audit wg0       show what confines the daemon of wg0; more in wgsep(8)";

/// One screen of 80 columns and 24 lines: no headings, and the arguments only in the usage.
const HELP: &str = "{about}\n{usage-heading} {usage}\n\n{options}{after-help}";

/// Options of the other implementations that change nothing here, and why. Those that mean the same
/// by another name are aliases of ours.
const NEEDLESS: [(&str, &str); 3] = [
    (
        "disable-drop-privileges",
        "privileges are always dropped, and marks and ports can be changed all the same",
    ),
    ("disable-connected-udp", "no socket is ever connected to a peer"),
    ("disable-multi-queue", "the number of workers is what counts: see --workers"),
];

/// Options of theirs that are variables here, because descriptors come with the environment.
const ENVIRONMENT_INSTEAD: [(&str, &str); 2] = [("tun-fd", "WG_TUN_FD"), ("uapi-fd", "WG_UAPI_FD")];

/// The levels, by the names they have here and elsewhere.
fn levels() -> [PossibleValue; 4] {
    let [silent, error, info, debug] = LogLevel::ALL.map(LogLevel::name).map(PossibleValue::new);
    [silent.alias("off"), error, info, debug.aliases(["verbose", "trace"])]
}

/// What is asked of a running daemon.
pub struct Question {
    /// Whose daemon.
    pub interface: String,
    /// For programs.
    pub json: bool,
}

/// What is asked of running daemons.
pub struct StatsQuestion {
    /// Whose daemons.
    pub interfaces: Vec<String>,
    /// For programs.
    pub json: bool,
    /// For Prometheus.
    pub prometheus: bool,
    /// Again and again, in this interval.
    pub watch: Option<Duration>,
}

/// What to do.
pub enum Invocation {
    /// Serve an interface.
    Serve(Box<Options>),
    /// Tell what confines a running daemon.
    Audit(Question),
    /// Tell what running daemons dropped, and the states of their peers.
    Stats(StatsQuestion),
    /// Tell what happens in a running daemon.
    Watch(Question),
    /// Replace the running daemon of an interface by the installed one.
    Upgrade(String),
    /// Print the help, or the version.
    Print(String),
}

/// What `wgsep` understands.
pub fn command() -> Command {
    let value = |name: &'static str, placeholder: &'static str| {
        Arg::new(name).long(name).value_name(placeholder)
    };
    let flag = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
    Command::new("wgsep")
        .version(VERSION)
        .about("WireGuard in userspace: the process that reads packets can do nothing else")
        .help_template(HELP)
        .after_help(USES)
        .arg(Arg::new("interface").value_name("IF").required(true).help("Interface to create, or wg%d for the first free number"))
        .arg(flag("foreground").short('f').help("Stay in the foreground, log to standard error"))
        .arg(value("user", "NAME").help("The dataplane's account [wgsep, or an unused uid]"))
        .arg(value("sandbox", "MODE").value_parser(["strict", "report"]).default_value("report").hide_possible_values(true).hide_default_value(true).help("strict: refuse to run with a layer degraded"))
        .arg(value("listen-port", "PORT").value_parser(value_parser!(u16).range(1..)).help("The only UDP port that wg(8) may choose"))
        .arg(value("fwmark", "MARK[/MASK]").value_parser(parse_mark).help("The only marks that wg(8) may choose"))
        .arg(value("listen-address", "ADDR").value_delimiter(',').action(ArgAction::Append).hide(true))
        .arg(value("bind-device", "DEV").hide(true))
        .arg(flag("allow-low-ports").help("Let wg(8) choose a port below 1024"))
        .arg(value("socket-netns", "NAME").help("Network namespace the UDP sockets live in"))
        .arg(value("tun-netns", "NAME").help("Network namespace the interface is created in"))
        .arg(value("workers", "N").alias("threads").short_alias('t').value_parser(value_parser!(u8).range(1..=64)).help("Worker threads [default: one per core]"))
        .arg(value("without", "OFFLOAD").value_delimiter(',').value_parser(Offload::ALL.map(Offload::name)).action(ArgAction::Append).hide_possible_values(true).help("Do without an offload: see wgsep(8)"))
        .arg(value("log-level", "LEVEL").alias("verbosity").short_alias('v').value_parser(levels()).hide_possible_values(true).help("silent, error, info or debug [LOG_LEVEL, or info]"))
        .arg(value("log-format", "FORMAT").value_parser(["text", "json"]).default_value("text").hide_possible_values(true).hide_default_value(true).help("text, or json: an object a line"))
        .arg(value("status-group", "GROUP").help("Whose members may read the status [wgsep]"))
        .arg(value("status-mode", "MODE").value_parser(parse_mode).hide(true))
        .arg(value("psk-group", "GROUP").hide_short_help(true).help("Whose members may set preshared keys alone [none]"))
        .arg(value("log-file", "PATH").alias("log").short_alias('l').value_parser(value_parser!(PathBuf)).help("Log there, not to standard error or syslog"))
        .args(NEEDLESS.map(|(name, _)| Arg::new(name).long(name).num_args(0..=1).require_equals(true).action(ArgAction::Append).hide(true)))
        .args(ENVIRONMENT_INSTEAD.map(|(name, _)| value(name, "FD").allow_negative_numbers(true).hide(true)))
        .arg(Arg::new("extra").num_args(0..).hide(true))
        // The last one counts, so that arguments can be appended to defaults (of a wrapper, say).
        .args_override_self(true)
        .subcommand_negates_reqs(true)
        .override_usage("wgsep [OPTIONS] IF, or wgsep audit|stats|watch|upgrade IF")
        .disable_help_subcommand(true)
        .subcommand(question("audit")
            .about("Tell what confines the running processes of an interface, layer by layer")
            .after_help("Exit status: 0 every layer in force, 1 one degraded, 3 something unreadable, 2 no such daemon."))
        .subcommand(Command::new("upgrade")
            .about("Replace the running daemon of an interface by this program; the tunnel goes on")
            .arg(Arg::new("interface").value_name("IF").required(true).help("Interface of a running wgsep"))
            .after_help("Exit status: 0, or 1 if the running daemon goes on."))
        .subcommand(question("watch")
            .about("Tell what happens: peers that connect, re-key, move, disconnect; handshakes that fail")
            .after_help("Exit status: 0, or 2 if no wgsep serves the interface, it may not be asked, or it has ended."))
        .subcommand(question("stats")
            .mut_arg("interface", |interface| interface.num_args(1..).help("Interface of a running wgsep, or several"))
            .arg(flag("prometheus").conflicts_with_all(["json", "watch"]).help("As Prometheus reads it"))
            .arg(value("watch", "SECONDS").num_args(0..=1).require_equals(true).default_missing_value("2").value_parser(value_parser!(u32).range(1..)).help("Again and again [default interval: 2]"))
            .about("Tell how many packets an interface dropped and why, and how each peer is")
            .after_help("Exit status: 0, or 2 if no wgsep serves the interface or it may not be asked."))
}

/// What is asked of a running daemon.
fn question(name: &'static str) -> Command {
    Command::new(name)
        .arg(
            Arg::new("interface")
                .value_name("IF")
                .required(true)
                .help("Interface of a running wgsep"),
        )
        .arg(
            Arg::new("json")
                .long("json")
                .action(ArgAction::SetTrue)
                .help("As JSON instead of a table"),
        )
}

/// The command line and environment as options; or how to exit, after having said why.
pub fn parse() -> Result<Invocation, ExitCode> {
    let matches = match command().try_get_matches() {
        Ok(matches) => matches,
        Err(error) if error.use_stderr() => {
            print_error(&one_line(&error));
            return Err(ExitCode::from(2));
        }
        // The help, or the version.
        Err(error) => return Ok(Invocation::Print(error.render().to_string())),
    };
    let invocation = match matches.subcommand() {
        Some((name, _)) if is_any_given(&matches) => {
            let json = if name == "upgrade" { "" } else { " [--json]" };
            Err(format!("options belong behind `{name}`; type: wgsep {name}{json} IF"))
        }
        Some(("upgrade", matches)) => {
            let interface = matches.get_one::<String>("interface").cloned().unwrap_or_default();
            Ok(Invocation::Upgrade(interface))
        }
        Some(("stats", matches)) => stats_asked(matches).map(Invocation::Stats),
        Some((name, matches)) => asked(matches).map(|question| match name {
            "watch" => Invocation::Watch(question),
            _audit => Invocation::Audit(question),
        }),
        None => check_words(&matches, std::env::args_os().any(|word| word == "--"))
            .and_then(|()| options(&matches, &|name| std::env::var_os(name)))
            .map(|options| Invocation::Serve(Box::new(options))),
    };
    invocation.map_err(|line| {
        print_error(&line);
        ExitCode::from(2)
    })
}

/// Words that are taken for a command rather than for the name of an interface, and what was meant.
const RESERVED: [(&[&str], &str); 8] = [
    (&["help"], "wgsep --help"),
    (&["version"], "wgsep --version"),
    (&["status", "stat"], "wgsep stats IF, or wg show"),
    (&["stats", "audit", "watch"], "wgsep stats IF, wgsep watch IF, or wgsep audit IF"),
    (
        &[
            "show", "showconf", "set", "setconf", "addconf", "syncconf", "genkey", "genpsk",
            "pubkey",
        ],
        "the same word behind wg, as in wg show",
    ),
    (
        &["up", "down", "save", "strip", "resolve"],
        "the same word behind wg-quick, as in wg-quick up IF",
    ),
    (&["start", "stop", "restart", "reload", "enable", "disable"], "systemctl start wgsep@IF"),
    (&["install", "run", "list"], "wgsep --help"),
];

/// A slip of the keyboard or of the memory must not start a daemon: a word that is a command somewhere is
/// no interface, unless it follows `--`, and neither is the first of two words.
fn check_words(matches: &ArgMatches, is_escaped: bool) -> Result<(), String> {
    let interface = matches.get_one::<String>("interface").map(String::as_str).unwrap_or_default();
    let extra = matches.get_one::<String>("extra");
    let meant = RESERVED.iter().find(|(words, _)| words.contains(&interface));
    match (meant, extra) {
        (Some((_, meant)), _) if !is_escaped => Err(format!(
            "{interface:?} is no command of wgsep, and not taken for an interface; did you mean: {meant}? (an interface of that name: wgsep -- {interface}; wg-quick and the unit do not pass --: rename {interface}.conf)"
        )),
        (_, Some(extra)) => Err(match near_subcommand(interface) {
            Some(command) => {
                format!("{interface:?} is no command; did you mean: wgsep {command} {extra}?")
            }
            None => format!(
                "one interface at a time, and behind {interface:?} there is {extra:?}; start wgsep once for each; `wgsep --help` lists the options"
            ),
        }),
        _ => Ok(()),
    }
}

/// The command that a word is a misspelling of: one letter wrong, missing or too many, or two swapped.
fn near_subcommand(word: &str) -> Option<&'static str> {
    let sorted = |word: &str| {
        let mut bytes = word.as_bytes().to_vec();
        bytes.sort_unstable();
        bytes
    };
    ["audit", "stats", "upgrade", "watch"].into_iter().find(|command| {
        let [typed, meant] = [word, command].map(str::as_bytes);
        let same_start = typed.iter().zip(meant).take_while(|(a, b)| a == b).count();
        let ends = typed.iter().rev().zip(meant.iter().rev());
        let same_end = ends.take_while(|(a, b)| a == b).count();
        let longest = typed.len().max(meant.len());
        same_start + same_end + 1 >= longest || sorted(word) == sorted(command)
    })
}

/// Whether there is anything of the daemon's on the command line.
fn is_any_given(matches: &ArgMatches) -> bool {
    matches.ids().any(|id| matches.value_source(id.as_str()) == Some(ValueSource::CommandLine))
}

fn asked(matches: &ArgMatches) -> Result<Question, String> {
    let interface = matches.get_one::<String>("interface").cloned().unwrap_or_default();
    check_name(&interface).map_err(|error| error.to_string())?;
    Ok(Question { interface, json: matches.get_flag("json") })
}

fn stats_asked(matches: &ArgMatches) -> Result<StatsQuestion, String> {
    let interfaces = matches.get_many::<String>("interface").unwrap_or_default();
    let interfaces: Vec<_> = interfaces.cloned().collect();
    interfaces
        .iter()
        .try_for_each(|interface| check_name(interface))
        .map_err(|error| error.to_string())?;
    let watch = matches.get_one::<u32>("watch");
    Ok(StatsQuestion {
        interfaces,
        json: matches.get_flag("json"),
        prometheus: matches.get_flag("prometheus"),
        watch: watch.map(|seconds| Duration::from_secs(u64::from(*seconds))),
    })
}

/// What is wrong and what to do about it, without the usage around it.
fn one_line(error: &clap::Error) -> String {
    let rendered = error.render().to_string();
    let text = rendered.split("\n\n").next().unwrap_or_default();
    let words = text.split_whitespace().skip_while(|word| *word == "error:").collect::<Vec<_>>();
    format!("{}; `wgsep --help` lists the options", words.join(" "))
}

fn options(
    matches: &ArgMatches,
    variable: &dyn Fn(&str) -> Option<OsString>,
) -> Result<Options, String> {
    let text = |name: &str| matches.get_one::<String>(name).cloned();
    // Empty is unset, as a service's Environment=WG_THREADS= means it.
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let interface = text("interface").unwrap_or_default();
    check_name(&interface).map_err(|error| error.to_string())?;
    let foreground = matches.get_flag("foreground") || is_on(variable("WG_PROCESS_FOREGROUND"));
    for (name, why) in NEEDLESS {
        if matches.contains_id(name) {
            print_error(&format!("--{name} changes nothing: {why}; leave it out"));
        }
    }
    if is_on(variable("WG_SUDO")) {
        print_error("WG_SUDO changes nothing: privileges are always dropped; unset it");
    }
    for (name, instead) in ENVIRONMENT_INSTEAD {
        if let Some(number) = text(name) {
            return Err(format!("--{name} is not for the command line; set {instead}={number}"));
        }
    }
    let log_level = match text("log-level") {
        Some(level) => level_from("--log-level", Some(level.into()))?,
        None => match variable("LOG_LEVEL") {
            Some(level) => level_from("LOG_LEVEL", Some(level))?,
            None => level_from("WG_LOG_LEVEL", variable("WG_LOG_LEVEL"))?,
        },
    };
    let port = matches.get_one("listen-port").copied();
    let low_ports = matches.get_flag("allow-low-ports") || is_on(variable("WGSEP_ALLOW_LOW_PORTS"));
    let workers = match matches.get_one::<u8>("workers") {
        Some(workers) => usize::from(*workers),
        None => workers_from(variable("WG_THREADS"))?,
    };
    let log_file = matches.get_one("log-file").cloned();
    let addresses = match matches.get_many("listen-address") {
        Some(addresses) => addresses.cloned().collect(),
        None => words_from("WGSEP_LISTEN_ADDRESS", variable("WGSEP_LISTEN_ADDRESS"))?,
    };
    let one = |option: &str, name| {
        text(option).map_or_else(|| word_from(name, variable(name)), |text| Ok(Some(text)))
    };
    let device = one("bind-device", "WGSEP_BIND_DEVICE")?;
    Ok(Options {
        version: VERSION,
        listen: listen(&addresses, device.as_deref(), &interface)?,
        interface,
        foreground,
        user: text("user"),
        strict: text("sandbox").as_deref() == Some("strict"),
        grants: Grants {
            port,
            mark: matches.get_one("fwmark").copied(),
            low_ports,
            // Known once the sockets' network namespace is.
            first_unprivileged: None,
        },
        socket_netns: text("socket-netns"),
        tun_netns: text("tun-netns"),
        without: matches
            .get_many::<String>("without")
            .unwrap_or_default()
            .filter_map(|name| name.parse().ok())
            .collect(),
        workers,
        log_level,
        log_format: if text("log-format").as_deref() == Some("json") {
            Format::Json
        } else {
            Format::Text
        },
        status: Access {
            group: text("status-group"),
            mode: matches.get_one("status-mode").copied(),
        },
        psk: Access { group: one("psk-group", "WGSEP_PSK_GROUP")?, mode: None },
        log_file: log_file.or_else(|| variable("WG_LOG_FILE").map(PathBuf::from)),
    })
}

/// The words of a variable, with commas or blanks between them. Separators alone are what a script leaves whose own
/// variables are empty.
fn words_from(name: &str, value: Option<OsString>) -> Result<Vec<String>, String> {
    let Some(value) = value else { return Ok(Vec::new()) };
    let value = value.to_string_lossy();
    let words = value.split([',', ' ']).filter(|word| !word.is_empty()).map(str::to_owned);
    let words = Some(words.collect::<Vec<_>>()).filter(|words| !words.is_empty());
    words.ok_or_else(|| format!("{name} is {value:?}, which names nothing; unset it"))
}

/// The word of a variable that takes one.
fn word_from(name: &str, value: Option<OsString>) -> Result<Option<String>, String> {
    let mut words = words_from(name, value)?;
    let word = words.pop();
    let is_one = words.is_empty().then_some(word);
    is_one.ok_or_else(|| format!("{name} names more than one; set it to one, or unset it"))
}

/// Where the UDP sockets listen.
fn listen(addresses: &[String], device: Option<&str>, ours: &str) -> Result<Listen, String> {
    let mut listen = Listen::default();
    if let Some(device) = device {
        check_device(device, ours)?;
        listen.device.iter_mut().zip(device.bytes()).for_each(|(to, byte)| *to = byte);
    }
    let given = addresses.iter().map(|address| {
        address.parse().map_err(|_| format!("--listen-address {address:?} is no IP address; write one of this machine's (ip address)"))
    });
    let given: Vec<IpAddr> = given.collect::<Result<_, _>>()?;
    if given.len() > MAX_LISTEN_ADDRESSES {
        return Err(format!(
            "--listen-address takes up to {MAX_LISTEN_ADDRESSES} addresses, and there are {}; leave some out, or listen on all of a family: 0.0.0.0, or ::",
            given.len()
        ));
    }
    for (slot, address) in listen.addresses.iter_mut().zip(&given) {
        let is_among_others =
            given.iter().filter(|other| other.is_ipv4() == address.is_ipv4()).count() > 1;
        let is_repeated = given.iter().filter(|other| *other == address).count() > 1;
        let wrong = match address {
            _ if is_repeated => "is there twice; leave one out",
            _ if address.is_unspecified() && is_among_others => {
                "is every address of its family; leave out the others, or this one"
            }
            _ if address.is_multicast() || *address == IpAddr::from([255; 4]) => {
                "is of a group, not of this machine; write one of this machine's (ip address)"
            }
            IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
                "is an IPv4 address; write it as one"
            }
            IpAddr::V6(v6) if v6.is_unicast_link_local() && device.is_none() => {
                "is link-local, so of one interface; name that, too: --bind-device DEV"
            }
            _ => {
                *slot = Some(*address);
                continue;
            }
        };
        return Err(format!("--listen-address {address} {wrong}"));
    }
    Ok(listen)
}

/// The name of an existing interface, or of one that is created later, but not that of the tunnel.
fn check_device(name: &str, ours: &str) -> Result<(), String> {
    let is_wrong = |letter: char| letter.is_whitespace() || "/:".contains(letter);
    if (1..16).contains(&name.len()) && !name.contains(is_wrong) && name != ours {
        Ok(())
    } else {
        Err(format!(
            "--bind-device {name:?} is no name of another interface; write one of: ip link"
        ))
    }
}

/// WG_THREADS, or one for each core.
fn workers_from(value: Option<OsString>) -> Result<usize, String> {
    let Some(value) = value else {
        return Ok(std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(64));
    };
    let number = value.to_str().and_then(|value| value.parse().ok());
    number
        .filter(|number| (1..=64).contains(number))
        .ok_or_else(|| format!("WG_THREADS is {}; it must be 1 to 64", value.display()))
}

/// A level as the other implementations spell it, from `source`.
fn level_from(source: &str, value: Option<OsString>) -> Result<LogLevel, String> {
    let value = value.unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    match value.as_str() {
        "" => Ok(LogLevel::Info),
        "off" => Ok(LogLevel::Silent),
        "verbose" | "trace" => Ok(LogLevel::Debug),
        name => name.parse().map_err(|()| {
            format!("{source} is {value:?}; it must be silent, error, info, debug or verbose")
        }),
    }
}

fn is_on(value: Option<OsString>) -> bool {
    value.is_some_and(|value| ["1", "true", "yes"].iter().any(|on| value.eq_ignore_ascii_case(on)))
}

/// The mode of a socket's file, octal.
fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| mode & !0o666 == 0);
    mode.ok_or_else(|| format!("{text:?} is not an octal mode up to 0666; write one such as 0660"))
}

/// `MARK` or `MARK/MASK`, decimal or 0x-hexadecimal; without a mask every bit counts.
fn parse_mark(text: &str) -> Result<(u32, u32), String> {
    let number = |text: &str| {
        let parsed = match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16),
            None => text.parse(),
        };
        parsed.map_err(|_| format!("{text:?} is not a 32-bit number, such as 51820 or 0xca6c"))
    };
    match text.split_once('/') {
        Some((mark, mask)) => Ok((number(mark)?, number(mask)?)),
        None => Ok((number(text)?, u32::MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str], environment: &[(&str, &str)]) -> Result<Options, String> {
        let words = ["wgsep"].iter().chain(words);
        let matches = command().try_get_matches_from(words).map_err(|error| error.to_string())?;
        options(&matches, &|name| {
            environment.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into())
        })
    }

    #[test]
    fn options_are_what_was_typed() {
        let words = [
            "-f",
            "wg0",
            "--fwmark",
            "0x100/0xff00",
            "--listen-port=51820",
            "--workers",
            "3",
            "--sandbox",
            "strict",
        ];
        let words = [&words[..], &["--without", "uso,udp-gro", "--without=tso"]].concat();
        let options = parsed(&words, &[]).unwrap();
        let without: Vec<_> =
            Offload::ALL.into_iter().filter(|one| options.without.contains(one)).collect();
        assert_eq!(without, [Offload::Tso, Offload::Uso, Offload::UdpGro]);
        assert!(options.foreground && options.strict);
        assert_eq!((options.interface.as_str(), options.workers), ("wg0", 3));
        assert_eq!(options.grants.mark, Some((0x100, 0xff00)));
        assert_eq!(options.grants.port, Some(51820));
        assert_eq!(
            parsed(&["wg0", "--fwmark", "51820"], &[]).unwrap().grants.mark,
            Some((51820, u32::MAX))
        );
    }

    #[test]
    fn the_environment_of_the_others_is_understood() {
        for value in ["1", "true", "YES"] {
            assert!(parsed(&["wg0"], &[("WG_PROCESS_FOREGROUND", value)]).unwrap().foreground);
        }
        assert!(!parsed(&["wg0"], &[("WG_PROCESS_FOREGROUND", "0")]).unwrap().foreground);
        assert_eq!(
            parsed(&["wg0"], &[("LOG_LEVEL", "verbose")]).unwrap().log_level,
            LogLevel::Debug
        );
        assert!(parsed(&["wg0"], &[("LOG_LEVEL", "loud")]).is_err());
        let same = parsed(
            &["wg0"],
            &[("WG_LOG_LEVEL", "trace"), ("WG_THREADS", "3"), ("WG_LOG_FILE", "/var/log/wg")],
        )
        .unwrap();
        assert_eq!((same.log_level, same.workers), (LogLevel::Debug, 3));
        assert_eq!(same.log_file, Some("/var/log/wg".into()));
        let both = [("LOG_LEVEL", "error"), ("WG_LOG_LEVEL", "trace")];
        assert_eq!(parsed(&["wg0"], &both).unwrap().log_level, LogLevel::Error);
        for (name, value) in [("WG_THREADS", "0"), ("WG_THREADS", "many"), ("WG_LOG_LEVEL", "x")] {
            assert!(parsed(&["wg0"], &[(name, value)]).err().unwrap().contains(name));
        }
    }

    #[test]
    fn an_empty_variable_is_as_one_that_is_not_set() {
        let empty = [
            "LOG_LEVEL",
            "WG_LOG_FILE",
            "WG_THREADS",
            "WG_PROCESS_FOREGROUND",
            "WG_SUDO",
            "WGSEP_ALLOW_LOW_PORTS",
            "WGSEP_LISTEN_ADDRESS",
            "WGSEP_BIND_DEVICE",
            "WGSEP_PSK_GROUP",
        ];
        let mut variables = vec![("WG_LOG_LEVEL", "trace")];
        variables.extend(empty.map(|name| (name, "")));
        let Options { log_level, log_file, workers, foreground, listen, psk, grants, .. } =
            parsed(&["wg0"], &variables).unwrap();
        let unset = parsed(&["wg0"], &[]).unwrap();
        assert_eq!((log_level, log_file), (LogLevel::Debug, None));
        assert_eq!((workers, foreground), (unset.workers, false));
        assert!(listen.is_everywhere() && listen.device().is_none());
        assert!(psk.group.is_none() && !grants.low_ports);
        assert_eq!(parsed(&["wg0"], &[("WG_LOG_LEVEL", "")]).unwrap().log_level, LogLevel::Info);
    }

    /// Every option of boringtun-cli and gotatun-cli.
    #[test]
    fn the_options_of_the_others_mean_the_same_or_change_nothing_or_say_what_to_do() {
        for words in [
            &["-t", "3", "-v", "trace", "-l", "/var/log/wg", "wg0"][..],
            &["--threads", "3", "--verbosity", "debug", "--log", "/var/log/wg", "wg0"],
        ] {
            let options = parsed(words, &[]).unwrap();
            assert_eq!((options.log_level, options.workers), (LogLevel::Debug, 3));
            assert_eq!(options.log_file, Some("/var/log/wg".into()));
        }
        for spelling in [
            "--disable-drop-privileges",
            "--disable-drop-privileges=1",
            "--disable-drop-privileges=true",
            "--disable-connected-udp",
            "--disable-multi-queue",
        ] {
            assert!(parsed(&["wg0", spelling], &[]).is_ok());
        }
        for (option, variable) in [("--tun-fd", "WG_TUN_FD=7"), ("--uapi-fd", "WG_UAPI_FD=7")] {
            assert!(parsed(&["wg0", option, "7"], &[]).err().unwrap().contains(variable));
        }
    }

    #[test]
    fn mistakes_are_errors_that_name_the_option() {
        for (words, named) in [
            (&["wg0", "--fwmark", "red"][..], "fwmark"),
            (&["wg0", "--listen-port", "0"], "listen-port"),
            (&["wg0", "--listen-port", "70000"], "listen-port"),
            (&["wg0", "--workers", "0"], "workers"),
            (&["wg0", "--sandbox", "off"], "sandbox"),
            (&["wg0", "--without", "speed"], "without"),
            (&["wg0", "--loud"], "--loud"),
            (&["a/b"], "bad interface name"),
            (&[], "<IF>"),
        ] {
            let error = parsed(words, &[]).err().unwrap();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_mistake_gives_one_line() {
        for (words, line) in [
            (&["wg0", "--loud"][..], "unexpected argument '--loud' found"),
            (
                &["wg0", "--workers", "0"],
                "invalid value '0' for '--workers <N>': 0 is not in 1..=64",
            ),
            (&[], "the following required arguments were not provided: <IF>"),
            (&["wg0", "--log-level", "loud"], "[possible values: silent, error, info, debug]"),
        ] {
            let words = ["wgsep"].iter().chain(words);
            let text = one_line(&command().try_get_matches_from(words).unwrap_err());
            assert!(text.contains(line) && !text.contains('\n'), "{text}");
            assert!(text.ends_with("; `wgsep --help` lists the options"), "{text}");
            assert!(!text.contains("error:") && !text.contains("For more"), "{text}");
        }
    }

    fn words(words: &[&str]) -> Result<(), String> {
        let all = ["wgsep"].iter().chain(words);
        check_words(&command().try_get_matches_from(all).unwrap(), words.contains(&"--"))
    }

    #[test]
    fn words_that_are_commands_somewhere_are_no_interfaces_unless_escaped() {
        for (word, meant) in [
            ("help", "wgsep --help"),
            ("version", "wgsep --version"),
            ("status", "wgsep stats IF"),
            ("show", "wg show"),
            ("up", "wg-quick up IF"),
            ("restart", "systemctl start wgsep@IF"),
        ] {
            for line in [&[word][..], &["-f", word], &[word, "wg0"]] {
                let said = words(line).unwrap_err();
                assert!(said.contains(meant), "{said}");
                assert!(said.contains(&format!("wgsep -- {word}")), "{said}");
                assert!(said.contains(&format!("rename {word}.conf")), "{said}");
            }
            assert_eq!(words(&["--", word]), Ok(()));
        }
        for name in ["wg0", "wg%d", "server", "client", "home", "vpn", "status0", "upstream"] {
            assert_eq!(words(&[name]), Ok(()), "{name} is a name that people use");
        }
        assert_eq!(words(&["--", "audit"]), Ok(()));
    }

    #[test]
    fn a_misspelt_command_is_suggested_and_a_second_interface_is_refused() {
        for (word, meant) in [
            ("audti", "wgsep audit wg0"),
            ("audi", "wgsep audit wg0"),
            ("auditt", "wgsep audit wg0"),
            ("stast", "wgsep stats wg0"),
            ("sats", "wgsep stats wg0"),
            ("atats", "wgsep stats wg0"),
        ] {
            let said = words(&[word, "wg0"]).unwrap_err();
            assert!(said.contains(meant), "{said}");
        }
        let said = words(&["wg0", "wg1"]).unwrap_err();
        assert!(said.contains("one interface at a time") && said.contains("\"wg1\""), "{said}");
    }

    /// As the default arguments of wrappers such as kilo's do, to which an operator adds others.
    #[test]
    fn a_repeated_option_counts_once_and_the_last_value_wins() {
        let line = ["--foreground", "--foreground", "-f", "wg0", "--workers", "2", "--workers=3"];
        let options = parsed(&line, &[]).unwrap();
        assert!(options.foreground);
        assert_eq!(options.workers, 3);
        let line = ["--without", "tso", "--without", "uso", "wg0"];
        assert_eq!(parsed(&line, &[]).unwrap().without, [Offload::Tso, Offload::Uso]);
    }

    #[test]
    fn addresses_and_device_come_from_options_or_variables() {
        let [first, second] =
            ["192.0.2.1", "2001:db8::1"].map(|one| one.parse::<IpAddr>().unwrap());
        let variables =
            [("WGSEP_LISTEN_ADDRESS", "192.0.2.1, 2001:db8::1"), ("WGSEP_BIND_DEVICE", "vrf-blue")];
        let line: &[&str] =
            &["--listen-address", "192.0.2.1,2001:db8::1", "--bind-device=vrf-blue", "wg0"];
        let repeated: &[&str] = &[
            "--listen-address=192.0.2.1",
            "--listen-address=2001:db8::1",
            "--bind-device=vrf-blue",
            "wg0",
        ];
        for (line, variables) in [(line, &[][..]), (repeated, &[]), (&["wg0"], &variables)] {
            let Listen { addresses, .. } = parsed(line, variables).unwrap().listen;
            assert_eq!(addresses, [Some(first), Some(second), None, None]);
            assert_eq!(parsed(line, variables).unwrap().listen.device(), Some("vrf-blue".as_ref()));
        }
        assert!(parsed(&["wg0"], &[]).unwrap().listen.is_everywhere());
        // Of `$A,$B`, neither of which is set.
        for separators in [",", " ", " , "] {
            let refused = parsed(&["wg0"], &[("WGSEP_LISTEN_ADDRESS", separators)]).err().unwrap();
            assert!(refused.contains("names nothing"), "{refused}");
        }
        for variable in ["WGSEP_BIND_DEVICE", "WGSEP_PSK_GROUP"] {
            for (words, why) in
                [(",", "nothing"), (" ", "nothing"), ("a,b", "more than one"), ("a b", "more")]
            {
                let refused = parsed(&["wg0"], &[(variable, words)]).err().unwrap();
                assert!(refused.contains(variable) && refused.contains(why), "{refused}");
            }
        }
        let both = parsed(&["--listen-address", "192.0.2.1", "wg0"], &variables).unwrap();
        assert_eq!(both.listen.addresses, [Some(first), None, None, None], "the option counts");
    }

    #[test]
    fn addresses_that_cannot_be_listened_on_are_refused_with_a_remedy() {
        for (addresses, meant) in [
            ("localhost", "is no IP address"),
            ("192.0.2.1:51820", "is no IP address"),
            ("192.0.2.1,192.0.2.1", "is there twice"),
            ("0.0.0.0,192.0.2.1", "is every address of its family"),
            ("224.0.0.1", "is of a group"),
            ("255.255.255.255", "is of a group"),
            ("ff02::1", "is of a group"),
            ("::ffff:192.0.2.1", "write it as one"),
            ("fe80::1", "--bind-device DEV"),
            ("192.0.2.1,192.0.2.2,192.0.2.3,192.0.2.4,192.0.2.5", "there are 5"),
        ] {
            let said = parsed(&["--listen-address", addresses, "wg0"], &[]).err().unwrap();
            assert!(said.contains(meant) && !said.contains('\n'), "{said}");
        }
        for device in ["", "sixteen-letters-", "a/b", "eth 0", "wg0"] {
            let said = parsed(&["--bind-device", device, "wg0"], &[]).err().unwrap();
            assert!(said.contains("ip link"), "{said}");
        }
        for fine in [
            &["--listen-address=0.0.0.0,::"][..],
            &["--listen-address=fe80::1", "--bind-device=eth0"],
        ] {
            assert!(parsed(&[fine, &["wg0"]].concat(), &[]).is_ok(), "{fine:?}");
        }
    }

    #[test]
    fn help_fits_a_screen() {
        let help = command().render_help().to_string();
        assert!(help.lines().count() <= 24, "{} lines\n{help}", help.lines().count());
        for line in help.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
        let (_, uses) = help.split_once("Three common uses:\n").unwrap();
        assert_eq!(uses.lines().filter(|line| line.starts_with("  ")).count(), 3, "{uses}");
    }
}
