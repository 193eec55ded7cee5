//! What the helper gives the dataplane to start with: descriptors at fixed numbers and a command line. What both call
//! by the same name is here too.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::str::FromStr;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// Descriptor of the channel. Those below it are the null device, twice, and the log.
pub const CHANNEL: i32 = 3;
/// Descriptor of the vmclock device, open only where there is one.
pub const VM_CLOCK: i32 = 4;
/// Most addresses that UDP sockets are bound to.
pub const MAX_LISTEN_ADDRESSES: usize = 4;
/// What every error of the command line comes down to.
const REMEDY: &str = "install both programs from one build";
/// The first option, before what another build may call otherwise.
const BUILD: &str = "--build";

/// Threads of a dataplane: the workers, the control thread, and the first one, which waits for it.
#[must_use]
pub const fn threads(workers: usize) -> usize {
    workers + 2
}

/// Where the UDP sockets listen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listen {
    /// The addresses, a socket for each; none for a socket of each family on every address.
    pub addresses: [Option<IpAddr>; MAX_LISTEN_ADDRESSES],
    /// The only interface, or VRF, padded with zeros; all zero for any.
    pub device: [u8; 16],
}

impl Listen {
    /// The addresses to bind to.
    pub fn bound(&self) -> impl Iterator<Item = IpAddr> {
        let everywhere = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let is_everywhere = self.addresses.iter().flatten().next().is_none();
        let everywhere = everywhere.into_iter().filter(move |_| is_everywhere);
        self.addresses.into_iter().flatten().chain(everywhere)
    }

    /// Whether it is every address and every interface.
    #[must_use]
    pub fn is_everywhere(&self) -> bool {
        *self == Self::default()
    }

    /// The name of the only interface.
    #[must_use]
    pub fn device(&self) -> Option<&OsStr> {
        let len = self.device.iter().position(|byte| *byte == 0).unwrap_or(self.device.len());
        self.device.get(..len).filter(|name| !name.is_empty()).map(OsStr::from_bytes)
    }
}

/// Defines an enum whose values have names, a row for each.
macro_rules! named {
    ($(#[$meta:meta])* $type:ident {
        $($(#[$doc:meta])* $value:ident $(= $number:literal)? as $name:literal,)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum $type {
            $($(#[$doc])* $value $(= $number)?,)*
        }

        impl $type {
            /// All of them.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$value),*];

            /// Its name in command lines, or in lines of the log.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$value => $name,)*
                }
            }
        }

        impl FromStr for $type {
            type Err = ();

            fn from_str(name: &str) -> Result<Self, ()> {
                Self::ALL.into_iter().find(|value| value.name() == name).ok_or(())
            }
        }
    };
}

named! {
    /// Severity of a line of the log, with the numbers of syslog(3). A line of the dataplane begins with the name.
    Level {
        /// Something failed.
        Error = 3 as "ERROR",
        /// Something an operator should look at.
        Warn = 4 as "WARN",
        /// Something an operator acts on.
        Info = 6 as "INFO",
        /// What explains the rest.
        Debug = 7 as "DEBUG",
    }
}

named! {
    /// How much is logged: the lines whose [`Level`] has at most this number.
    LogLevel {
        /// Nothing.
        Silent = 0 as "silent",
        /// What failed.
        Error = 3 as "error",
        /// What an operator acts on.
        Info = 6 as "info",
        /// What explains the rest.
        Debug = 7 as "debug",
    }
}

named! {
    /// A way of handing over or encrypting many packets at once, or of having many flows beside each other.
    Offload {
        /// A header before each packet of the TUN device, without which it has only plain packets.
        VnetHdr as "vnet-hdr",
        /// TCP super-packets on the TUN device.
        Tso as "tso",
        /// UDP super-packets on the TUN device, since Linux 6.2.
        Uso as "uso",
        /// Queues of the TUN device for different flows, without which all wait in one.
        FlowQueues as "flow-queues",
        /// Many datagrams of one peer in one send, since Linux 4.18.
        UdpGso as "udp-gso",
        /// Many datagrams of one peer in one receive, since Linux 5.0.
        UdpGro as "udp-gro",
        /// Batches of packets in vector registers of the processor.
        Avx512 as "avx512",
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Defines the command line, a row for each option: what its value means, the field, its type, and its name.
macro_rules! command_line {
    ($($(#[$doc:meta])* $field:ident: $type:ty = $option:literal,)*) => {
        /// What the helper tells the dataplane in its command line.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Startup {
            $($(#[$doc])* pub $field: $type,)*
        }

        impl Startup {
            /// The words behind the program's name, for a dataplane of the same build as this helper.
            #[must_use]
            pub fn encode(&self, version: &str) -> Vec<String> {
                let build = (BUILD, version.to_owned());
                let options = [build, $(($option, self.$field.to_string()),)*];
                options.into_iter().flat_map(|(option, value)| [option.to_owned(), value]).collect()
            }

            /// Parses what [`Self::encode`] wrote.
            ///
            /// # Errors
            /// The line for the operator, if the helper is of another build than `version`: an update was
            /// interrupted, or replaced one program only.
            pub fn parse(
                version: &str,
                mut words: impl Iterator<Item = String>,
            ) -> Result<Self, String> {
                let helper = value(&mut words, BUILD).unwrap_or_else(|_| "unknown".to_owned());
                if helper != version {
                    return Err(format!(
                        "wgsep-dataplane is version {version}, but wgsep is version {helper}; {REMEDY}"
                    ));
                }
                let startup = Self { $($field: value(&mut words, $option)?,)* };
                words.next().map_or(Ok(startup), |word| Err(format!("unknown option {word}; {REMEDY}")))
            }
        }
    };
}

command_line! {
    /// Name of the interface, for the log and to follow it.
    interface: String = "--interface",
    /// Worker threads.
    workers: usize = "--workers",
    /// Whether to send many datagrams at once.
    udp_gso: bool = "--udp-gso",
    /// Whether to seal and open many packets at once where the processor can.
    avx512: bool = "--avx512",
    /// How much to log.
    log_level: LogLevel = "--log-level",
    /// UDP port to start with, 0 for any.
    listen_port: u16 = "--listen-port",
    /// The lowest port that the helper opens, when it is asked for one.
    lowest_port: u16 = "--lowest-port",
    /// The highest.
    highest_port: u16 = "--highest-port",
    /// Mark to start with, 0 for none.
    fwmark: u32 = "--fwmark",
    /// Whether the UDP sockets are on every address and interface.
    listens_everywhere: bool = "--listens-everywhere",
    /// Name of the only interface that the UDP sockets are bound to; empty for none.
    bind_device: String = "--bind-device",
}

/// The value of the option that comes next.
fn value<T: FromStr>(words: &mut impl Iterator<Item = String>, option: &str) -> Result<T, String> {
    let (word, value) = (words.next(), words.next());
    let value = value.filter(|_| word.as_deref() == Some(option));
    let value = value.ok_or_else(|| format!("{option} is missing; {REMEDY}"))?;
    value.parse().map_err(|_| format!("{option}: bad value {value:?}; {REMEDY}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn startup(log_level: LogLevel) -> Startup {
        Startup {
            interface: "wg0".to_owned(),
            workers: 64,
            udp_gso: log_level == LogLevel::Info,
            avx512: log_level != LogLevel::Info,
            log_level,
            listen_port: 7,
            lowest_port: 7,
            highest_port: u16::MAX,
            fwmark: u32::MAX,
            listens_everywhere: log_level == LogLevel::Info,
            bind_device: String::new(),
        }
    }

    #[test]
    fn the_dataplane_parses_what_the_helper_encodes() {
        for log_level in LogLevel::ALL {
            let startup = startup(log_level);
            assert_eq!(Startup::parse("2", startup.encode("2").into_iter()), Ok(startup));
        }
    }

    #[test]
    fn what_was_left_out_altered_or_added_is_refused_with_a_remedy() {
        let words = startup(LogLevel::Debug).encode("2");
        let refused = |words: &[String]| {
            let error = Startup::parse("2", words.iter().cloned()).unwrap_err();
            assert!(error.ends_with("; install both programs from one build"), "{error}");
            assert!(!error.contains('\n'), "{error}");
            error
        };
        for len in 0..words.len() {
            refused(&words[..len]);
        }
        for at in 0..words.len() {
            // Any text is the name of an interface.
            let option = &words[at - usize::from(at > 0)];
            if !["--interface", "--bind-device"].contains(&option.as_str()) {
                let mut altered = words.clone();
                altered[at].push('x');
                refused(&altered);
            }
        }
        let added = [&words[..], &["--more".to_owned()]].concat();
        assert!(refused(&added).starts_with("unknown option --more"));
        let bad = words.iter().map(|word| if word == "64" { "many" } else { word }.to_owned());
        assert!(refused(&bad.collect::<Vec<_>>()).starts_with("--workers: bad value \"many\""));
    }

    #[test]
    fn a_helper_of_another_build_is_refused_whatever_its_options_are() {
        let check = |line: &str| Startup::parse("2", line.split(' ').map(str::to_owned));
        for (line, helper) in [
            ("--build 1 --later x", "1"),
            ("--interface 2", "unknown"),
            ("--build", "unknown"),
            ("", "unknown"),
        ] {
            let error = check(line).unwrap_err();
            let expected = format!(
                "wgsep-dataplane is version 2, but wgsep is version {helper}; install both programs from one build"
            );
            assert_eq!(error, expected);
        }
    }

    /// The dataplane decides by level, the helper by number.
    #[test]
    fn as_much_is_logged_as_a_level_says() {
        let logged = |most: LogLevel| {
            Level::ALL.into_iter().filter(move |level| *level as u8 <= most as u8).count()
        };
        assert_eq!(LogLevel::ALL.map(logged), [0, 1, 3, 4]);
    }

    #[test]
    fn each_value_has_a_name_of_its_own() {
        let mut names = Offload::ALL.map(Offload::name).to_vec();
        names.extend(Level::ALL.map(Level::name));
        names.extend(LogLevel::ALL.map(LogLevel::name));
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
        assert!(Offload::ALL.into_iter().all(|offload| offload.name().parse() == Ok(offload)));
    }
}
