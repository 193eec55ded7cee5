//! `wgsep watch IF`: the events of a running daemon, a line each, as they happen.

use crate::command_line::Question;
use crate::json::string;
use crate::stats::{keep_only, key_as_base64};
use crate::status;
use nix::errno::Errno;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant, UNIX_EPOCH};
use wgsep_policy::Capability;

/// Most bytes of an event.
const MAX_EVENT: usize = 4096;
/// How often a daemon that has ended is looked for, and one connected to at most.
const AGAIN: Duration = Duration::from_millis(100);

/// An event: its lines, of which each value is of its form.
#[derive(Debug, Default, PartialEq, Eq)]
struct Event {
    name: String,
    at: Duration,
    public_key: Option<String>,
    endpoint: Option<SocketAddr>,
    cause: Option<String>,
    offload: Option<String>,
    peers: Option<u64>,
    count: Option<u64>,
}

/// Writes events until the daemon ends; `write` returns whether more are wanted. A daemon that takes the place of
/// another is watched in its place.
///
/// # Errors
/// One line, if no wgsep serves the interface, it may not be asked, or it has ended.
pub fn watch(question: &Question, mut write: impl FnMut(&str) -> bool) -> Result<(), String> {
    let interface = &question.interface;
    // The socket may be that of the user who started the daemon.
    keep_only(&[Capability::CAP_DAC_OVERRIDE])?;
    let mut deadline = Instant::now() + status::PATIENCE;
    let mut daemon =
        status::connect(interface, deadline).map_err(|errno| status::refusal(interface, errno))?;
    keep_only(&[])?;
    loop {
        let start = Instant::now();
        match follow(daemon, interface, question.json, &mut write)? {
            End::Unwanted => return Ok(()),
            End::Watched => deadline = Instant::now() + status::PATIENCE,
            // One that is being replaced takes connections until it ends.
            End::Silent if Instant::now() < deadline => {}
            End::Silent => return Err(status::other_program(interface)),
        }
        sleep(AGAIN.saturating_sub(start.elapsed()));
        daemon = successor(interface, deadline)?;
    }
}

/// The daemon that has taken the place of another.
fn successor(interface: &str, deadline: Instant) -> Result<UnixStream, String> {
    loop {
        match status::connect(interface, deadline) {
            Ok(daemon) => return Ok(daemon),
            Err(Errno::ENOENT | Errno::ECONNREFUSED) if Instant::now() < deadline => sleep(AGAIN),
            Err(_) => {
                return Err(format!(
                    "the daemon of {interface} has ended; start it: wgsep {interface}"
                ));
            }
        }
    }
}

/// How it ended that a daemon was watched.
enum End {
    /// No more events are wanted.
    Unwanted,
    /// The daemon closed the connection.
    Watched,
    /// So it did before the first event, which says that it is watched.
    Silent,
}

/// A daemon that is read from, the first event until a deadline: from then on there is something to read only when
/// something happens.
struct Daemon {
    stream: UnixStream,
    deadline: Option<Instant>,
}

impl Read for Daemon {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let left = self.deadline.map(status::remaining).transpose()?;
        self.stream.set_read_timeout(left)?;
        self.stream.read(buffer)
    }
}

/// Writes the events of one daemon to its end.
fn follow(
    mut stream: UnixStream,
    interface: &str,
    json: bool,
    write: &mut impl FnMut(&str) -> bool,
) -> Result<End, String> {
    let failed = |error: std::io::Error| status::no_answer(interface, &error);
    let deadline = Instant::now() + status::PATIENCE;
    stream.set_nonblocking(false).map_err(failed)?;
    if stream.write_all(b"watch=1\n\n").is_err() {
        return Ok(End::Silent);
    }
    let mut lines = BufReader::new(Daemon { stream, deadline: Some(deadline) });
    loop {
        let Some(event) = read_event(&mut lines).map_err(failed)? else {
            let is_first = lines.get_ref().deadline.is_some();
            return Ok(if is_first { End::Silent } else { End::Watched });
        };
        if event == "errno=16\n" {
            return Err(format!(
                "the daemon of {interface} is watched by as many programs as it allows; end one of them"
            ));
        }
        let event = parse(&event).ok_or_else(|| {
            format!("{interface} is served by another version of wgsep; restart it")
        })?;
        lines.get_mut().deadline = None;
        let line = if json { event.as_json(interface) } else { event.as_line() };
        if !write(&line) {
            return Ok(End::Unwanted);
        }
    }
}

/// The lines of the next event; `None` at the end.
fn read_event(lines: &mut impl BufRead) -> std::io::Result<Option<String>> {
    let mut event = String::new();
    loop {
        let mut line = String::new();
        match lines.take(MAX_EVENT as u64).read_line(&mut line) {
            Ok(0) => return Ok(None),
            Ok(_) if line == "\n" => return Ok(Some(event)),
            Ok(_) => event.push_str(&line),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error),
        }
        if event.len() >= MAX_EVENT {
            return Err(ErrorKind::InvalidData.into());
        }
    }
}

/// `None` for what is no event of wgsep. What is printed is not the daemon's to choose.
fn parse(text: &str) -> Option<Event> {
    let name = |value: &str| {
        let is_name = value.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'));
        is_name.then(|| value.to_owned())
    };
    let mut event = Event::default();
    for line in text.lines() {
        let (key, value) = line.split_once('=')?;
        match key {
            "event" => event.name = name(value)?,
            "time_sec" => event.at += Duration::from_secs(value.parse::<u32>().ok()?.into()),
            "time_nsec" => event.at += Duration::from_nanos(value.parse::<u32>().ok()?.into()),
            "public_key" => event.public_key = Some(key_as_base64(value)?),
            "endpoint" => event.endpoint = Some(value.parse().ok()?),
            "cause" => event.cause = Some(name(value)?),
            "offload" => event.offload = Some(name(value)?),
            "peers" => event.peers = Some(value.parse().ok()?),
            "count" => event.count = Some(value.parse().ok()?),
            _ => {}
        }
    }
    (!event.name.is_empty()).then_some(event)
}

impl Event {
    fn time(&self) -> impl std::fmt::Display {
        humantime::format_rfc3339_millis(UNIX_EPOCH + self.at)
    }

    /// For people.
    fn as_line(&self) -> String {
        let peers =
            |count: u64| if count == 1 { "1 peer".into() } else { format!("{count} peers") };
        let what = match self.name.as_str() {
            "watching" => format!("watching, {} connected", peers(self.peers.unwrap_or(0))),
            "connect" => "connected".to_owned(),
            "rekey" => "re-keyed".to_owned(),
            "disconnect" => "disconnected: nothing was received for 180 s".to_owned(),
            "endpoint" => "endpoint moved".to_owned(),
            "handshake_failed" => "handshake failed".to_owned(),
            "configuration" => {
                format!("configuration changed, {}", peers(self.peers.unwrap_or(0)))
            }
            "offload_lost" => "offload lost".to_owned(),
            "offload_regained" => "offload regained".to_owned(),
            "lost" => {
                format!("{} events were not read in time, and are lost", self.count.unwrap_or(0))
            }
            other => other.to_owned(),
        };
        let mut line = format!("{} ", self.time());
        // Writing to memory cannot fail.
        let _infallible = match &self.public_key {
            Some(key) => write!(line, "{key}: {what}"),
            None => write!(line, "{what}"),
        };
        for detail in [&self.offload, &self.cause].into_iter().flatten() {
            let _infallible = write!(line, ": {detail}");
        }
        if let Some(endpoint) = self.endpoint {
            let word = if self.name == "endpoint" { "to" } else { "at" };
            let _infallible = write!(line, " {word} {endpoint}");
        }
        line.push('\n');
        line
    }

    /// For programs: an object with what the event has.
    fn as_json(&self, interface: &str) -> String {
        let mut members = vec![
            ("event", string(&self.name)),
            ("time", string(&self.time().to_string())),
            ("interface", string(interface)),
        ];
        let endpoint = self.endpoint.map(|endpoint| endpoint.to_string());
        let texts = [
            ("public_key", &self.public_key),
            ("endpoint", &endpoint),
            ("cause", &self.cause),
            ("offload", &self.offload),
        ];
        for (name, text) in texts {
            members.extend(text.as_ref().map(|text| (name, string(text))));
        }
        for (name, number) in [("peers", self.peers), ("count", self.count)] {
            members.extend(number.map(|number| (name, number.to_string())));
        }
        let members: Vec<_> =
            members.iter().map(|(name, value)| format!("{}:{value}", string(name))).collect();
        format!("{{{}}}\n", members.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: &str = "time_sec=1795000000\ntime_nsec=5000000\n";

    fn lines(text: &str) -> (String, String) {
        let event = parse(&text.replace("TIME\n", TIME)).unwrap();
        (event.as_line(), event.as_json("wg0"))
    }

    #[test]
    fn an_event_is_a_line() {
        let key = "01".repeat(32);
        let shown = key_as_base64(&key).unwrap();
        for (text, expected) in [
            ("event=watching\nTIME\npeers=1\n".to_owned(), "watching, 1 peer connected".to_owned()),
            (
                format!("event=connect\nTIME\npublic_key={key}\nendpoint=192.0.2.1:7\n"),
                format!("{shown}: connected at 192.0.2.1:7"),
            ),
            (format!("event=rekey\nTIME\npublic_key={key}\n"), format!("{shown}: re-keyed")),
            (
                format!("event=endpoint\nTIME\npublic_key={key}\nendpoint=[2001:db8::1]:7\n"),
                format!("{shown}: endpoint moved to [2001:db8::1]:7"),
            ),
            (
                "event=handshake_failed\nTIME\nendpoint=192.0.2.1:7\ncause=bad_mac1\n".to_owned(),
                "handshake failed: bad_mac1 at 192.0.2.1:7".to_owned(),
            ),
            (
                "event=offload_lost\nTIME\noffload=udp_gso\n".to_owned(),
                "offload lost: udp_gso".to_owned(),
            ),
            (
                "event=lost\nTIME\ncount=7\n".to_owned(),
                "7 events were not read in time, and are lost".to_owned(),
            ),
        ] {
            assert_eq!(lines(&text).0, format!("2026-11-18T11:06:40.005Z {expected}\n"));
        }
    }

    #[test]
    fn json_has_what_the_event_has() {
        let (_, json) = lines("event=lost\nTIME\ncount=7\n");
        assert_eq!(
            json,
            "{\"event\":\"lost\",\"time\":\"2026-11-18T11:06:40.005Z\",\"interface\":\"wg0\",\"count\":7}\n"
        );
    }

    #[test]
    fn what_is_printed_is_not_the_daemons_to_choose() {
        for text in [
            "",
            "event=\x1b[2J\n",
            "event=connect\npublic_key=\x1b\n",
            "event=connect\nendpoint=\x1b\n",
            "event=handshake_failed\ncause=\x1b\n",
            "event=lost\ncount=many\n",
            "event=lost\ntime_sec=99999999999999\n",
            "nonsense\n",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }
}
