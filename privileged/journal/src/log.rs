//! The log: the helper's own lines, and the dataplane's, which reach it through a pipe.
//!
//! What comes from the dataplane is treated as hostile: a line is bounded and has a tag of its own,
//! characters that could move a terminal's cursor or forge a line are escaped, and all lines together have
//! a budget of bytes per hour.

use humantime::format_rfc3339_millis;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{MsgFlags, UnixAddr, sendmsg};
use nix::sys::time::TimeSpec;
use nix::unistd::read;
use std::cell::Cell;
use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant, SystemTime};
use wgsep_ipc::{Level, LogLevel};

/// Longest line that is written whole, in bytes.
const MAX_LINE: usize = 1024;
/// Bytes of the dataplane's lines that are written in a [`PERIOD`], so that it cannot fill a disk or drown
/// out the rest of a system's log: some 30,000 lines. Further lines are counted.
const BUDGET: usize = 4 << 20;
/// The same at level `debug`.
const DEBUG_BUDGET: usize = 64 << 20;
/// One hour.
const PERIOD: Duration = Duration::from_secs(3600);
/// Longest message that is written, escaped, in bytes. Even if JSON escapes all of it once more, a line
/// stays below the 4096 bytes (PIPE_BUF) that a pipe takes whole.
const MAX_MESSAGE: usize = 1536;
/// How often the last line is given to the sink, and how long after another.
const LAST_TRIES: u32 = 21;
const BETWEEN_TRIES: Duration = Duration::from_millis(5);
/// Shortest time between two lines that count lost ones: where the sink takes a few lines at a time, these would take
/// the place of others.
const BETWEEN_COUNTS: Duration = Duration::from_secs(1);
/// What is said of lines beyond the budget once there is a new one,
const SUPPRESSED: &str = "lines of the dataplane were suppressed; its lines are written again";
/// and of lines that the sink did not take.
const LOST: &str = "lines could not be written to the log, or not whole; see whether its disk is full, and whether what reads it keeps up (for syslog, see net.unix.max_dgram_qlen)";
/// Tag of the helper's own lines.
pub(crate) const HELPER: &str = "wgsep";
/// Tag of the dataplane's lines, whatever they contain.
const DATAPLANE: &str = "wgsep-dataplane";
/// Facility of syslog(3) messages: daemon.
const FACILITY: u8 = 3 << 3;

/// How lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

/// What takes the lines.
pub enum Sink {
    /// A file, a pipe or a terminal.
    Stream(File),
    /// A stream of systemd's journal.
    Journal(File),
    /// For the socket at [`SYSLOG`]. Not connected: a log daemon that restarts binds another one there.
    Syslog(UnixDatagram),
}

/// Where the system's log receives lines.
pub const SYSLOG: &str = "/dev/log";

/// What the dataplane has written in the current [`PERIOD`].
struct Budget {
    since: Instant,
    bytes: usize,
    /// Lines that were not written.
    dropped: u64,
}

impl Budget {
    fn new() -> Self {
        Self { since: Instant::now(), bytes: 0, dropped: 0 }
    }
}

/// Where lines go.
pub struct Log {
    pub(crate) sink: Sink,
    pub(crate) format: Format,
    pub(crate) most: LogLevel,
    /// What [`Log::switch_level`] changes to.
    other: LogLevel,
    interface: String,
    /// The sink took only part of the last line, as a file system that became full.
    is_cut: Cell<bool>,
    /// Lines that the sink did not take, or not whole, since it took a line that counts them; and when that was.
    lost: Cell<(u64, Option<Instant>)>,
    partial: Vec<u8>,
    budget: Budget,
    /// Whether the dataplane's first error is kept, for the one line with which a start fails.
    is_starting: bool,
    /// That error, escaped.
    reason: Option<String>,
}

impl Log {
    /// A log of lines up to a level into `sink`.
    #[must_use]
    pub fn new(sink: Sink, format: Format, most: LogLevel) -> Self {
        let other = if most == LogLevel::Debug { LogLevel::Info } else { LogLevel::Debug };
        Self {
            sink,
            format,
            most,
            other,
            interface: String::new(),
            is_cut: Cell::new(false),
            lost: Cell::default(),
            partial: Vec::new(),
            budget: Budget::new(),
            reason: None,
            is_starting: true,
        }
    }

    /// Changes between the level it was started with and `debug`, or `info` if that was it already,
    /// and says so. Returns the level from now on.
    pub fn switch_level(&mut self) -> LogLevel {
        let (before, now) = (self.most, self.other);
        let name = |level: LogLevel| level.name().to_ascii_uppercase();
        // One of the two is at least `info`, so that the line is read.
        self.most = before.max(now);
        self.info(&format!("SIGHUP: log level was {} and is now {}", name(before), name(now)));
        (self.most, self.other) = (now, before);
        // Each level has a budget of its own.
        self.renew_budget();
        now
    }

    /// The start succeeded: from now on the dataplane's errors are lines of their own.
    pub fn started(&mut self) {
        self.is_starting = false;
        if let Some(error) = self.reason.take() {
            self.dataplane_line(Level::Error, &error);
        }
    }

    /// Why a start fails, escaped, if the dataplane logged that. Later its errors are lines of their own only,
    /// because they may be an attacker's.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// The socket of the system's log, where lines go there.
    #[must_use]
    pub fn system_log(&self) -> Option<BorrowedFd<'_>> {
        if let Sink::Syslog(socket) = &self.sink { Some(socket.as_fd()) } else { None }
    }

    /// Names the interface in every line.
    pub fn set_interface(&mut self, interface: &str) {
        interface.clone_into(&mut self.interface);
    }

    /// Writes a line. What the sink does not take is lost, and counted: logging never stops the daemon.
    pub fn line(&self, level: Level, message: &str) {
        self.write(HELPER, level, [&escape(message), ""], 1);
    }

    /// Writes the last line, for which a full sink has 100 ms: what reads it may be slower than a burst of lines. The
    /// lines that were lost before are counted.
    pub fn last_line(&self, level: Level, message: &str) {
        self.write(HELPER, level, [&escape(message), ""], LAST_TRIES);
    }

    /// Writes an escaped message, as JSON with more members, behind a tag; the length of that line, 0 if its level is not wanted. Where it is the
    /// first for a while that the sink takes after others were lost, another line counts those.
    pub(crate) fn write(&self, tag: &str, level: Level, text: [&str; 2], tries: u32) -> usize {
        if !self.is_wanted(level) {
            return 0;
        }
        let line = self.format(tag, level, text);
        let pause = || ppoll(&mut [], Some(BETWEEN_TRIES.into()), None).is_ok();
        let send = |line: &str| self.send(line) || (1..tries).any(|_| pause() && self.send(line));
        let is_written = send(&line);
        let (mut lost, mut counted) = self.lost.get();
        lost += u64::from(!is_written);
        let is_due = tries > 1 || counted.is_none_or(|counted| counted.elapsed() > BETWEEN_COUNTS);
        let count = || self.format(HELPER, Level::Error, [&format!("{lost} {LOST}"), ""]);
        if is_written && lost > 0 && is_due && send(&count()) {
            (lost, counted) = (0, Some(Instant::now()));
        }
        self.lost.set((lost, counted));
        line.len()
    }

    /// The line for an escaped message, as the sink takes it; only JSON has the second text, more members.
    fn format(&self, tag: &str, level: Level, [message, members]: [&str; 2]) -> String {
        let (tag, priority) = (format!("{tag}[{}]", self.interface), level as u8);
        let (time, level) = (format_rfc3339_millis(SystemTime::now()), level.name());
        match (&self.sink, self.format) {
            (Sink::Syslog(_), _) => format!("<{}>{tag}: {message}", FACILITY | priority),
            (Sink::Journal(_), Format::Text) => format!("<{priority}>{tag}: {message}\n"),
            (Sink::Stream(_), Format::Text) => format!("{time} {level} {tag}: {message}\n"),
            (sink, Format::Json) => {
                let is_journal = matches!(sink, Sink::Journal(_));
                let priority = if is_journal { format!("<{priority}>") } else { String::new() };
                let [tag, interface, message] = [&*tag, &*self.interface, message].map(json);
                format!(
                    "{priority}{{\"time\":\"{time}\",\"level\":\"{level}\",\"tag\":\"{tag}\",\"interface\":\"{interface}\",\"message\":\"{message}\"{members}}}\n"
                )
            }
        }
    }

    /// Gives a line to the sink; true if that took all of it.
    fn send(&self, line: &str) -> bool {
        match &self.sink {
            Sink::Syslog(socket) => send_to(socket, line.as_bytes(), SYSLOG).is_ok(),
            Sink::Stream(stream) | Sink::Journal(stream) => write_now(stream, line, &self.is_cut),
        }
    }

    fn is_wanted(&self, level: Level) -> bool {
        level as u8 <= self.most as u8
    }

    /// What an operator acts on.
    pub fn info(&self, message: &str) {
        self.line(Level::Info, message);
    }

    /// What failed.
    pub fn error(&self, message: &str) {
        self.line(Level::Error, message);
    }

    /// Passes on the lines that wait in the dataplane's pipe; false at its end.
    pub fn forward(&mut self, pipe: BorrowedFd<'_>) -> bool {
        let mut buffer = [0; 4096];
        let Ok(len) = read(pipe, &mut buffer) else { return true };
        for byte in buffer.get(..len).unwrap_or_default() {
            self.partial.push(*byte);
            if *byte == b'\n' || self.partial.len() >= MAX_LINE {
                let line = core::mem::take(&mut self.partial);
                self.parse_line(&String::from_utf8_lossy(&line));
            }
        }
        len > 0
    }

    /// A line of the dataplane: its level, then the message.
    fn parse_line(&mut self, line: &str) {
        let line = line.trim();
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let level = Level::ALL.into_iter().find(|level| level.name() == word);
        let (level, message) = level.map_or((Level::Error, line), |level| (level, rest));
        match level {
            _ if line.is_empty() => {}
            Level::Error if self.is_starting => {
                self.reason.get_or_insert_with(|| escape_dataplane(message));
            }
            _ => self.dataplane_line(level, message),
        }
    }

    /// Writes a line of the dataplane within its budget; the one that exhausts it is followed by the time
    /// at which there is a new one.
    fn dataplane_line(&mut self, level: Level, message: &str) {
        self.check_budget();
        let most = if self.most == LogLevel::Debug { DEBUG_BUDGET } else { BUDGET };
        if self.budget.bytes >= most {
            self.budget.dropped += u64::from(self.is_wanted(level));
            return;
        }
        self.budget.bytes += self.write(DATAPLANE, level, [&escape_dataplane(message), ""], 1);
        if self.budget.bytes >= most {
            let end = SystemTime::now() + PERIOD.saturating_sub(self.budget.since.elapsed());
            let (end, mib) = (format_rfc3339_millis(end), most >> 20);
            self.error(&format!(
                "lines of the dataplane are suppressed until {end}: it wrote {mib} MiB within an hour; find out what it repeats, and see SECURITY.md for an attack"
            ));
        }
    }

    /// Renews the dataplane's budget once an hour, and logs how many lines were suppressed. Returns how
    /// long until this is due, which matters only if there are any.
    pub fn check_budget(&mut self) -> Duration {
        let left = PERIOD.saturating_sub(self.budget.since.elapsed());
        if left.is_zero() {
            self.renew_budget();
        }
        if self.budget.dropped > 0 { left } else { Duration::MAX }
    }

    fn renew_budget(&mut self) {
        let Budget { dropped, .. } = core::mem::replace(&mut self.budget, Budget::new());
        if dropped > 0 {
            self.error(&format!("{dropped} {SUPPRESSED}"));
        }
    }
}

/// Writes to a stream if that does not block: a pipe or terminal that no process reads must not stop the
/// helper. A line after one that was cut begins on a line of its own. True if all of it was written.
fn write_now(mut stream: &File, line: &str, is_cut: &Cell<bool>) -> bool {
    let mut polled = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
    if ppoll(&mut polled, Some(TimeSpec::new(0, 0)), None) != Ok(1) {
        return false;
    }
    let line = if is_cut.get() { format!("\n{line}") } else { line.to_owned() };
    let written = stream.write(line.as_bytes());
    is_cut.set(written.as_ref().map_or(is_cut.get(), |written| *written < line.len()));
    written.is_ok() && !is_cut.get()
}

/// Sends a datagram to whatever is at `path` now: a syslog daemon that was started again is another socket.
/// It is the system call that the channel to the dataplane needs anyway.
fn send_to(socket: &UnixDatagram, line: &[u8], path: &str) -> io::Result<usize> {
    let address = UnixAddr::new(path)?;
    let (raw, flags) = (socket.as_raw_fd(), MsgFlags::MSG_NOSIGNAL);
    Ok(sendmsg(raw, &[IoSlice::new(line)], &[], flags, Some(&address))?)
}

/// Makes visible whatever is not printable ASCII, so that nothing moves a cursor, is invisible or looks like
/// something else, and cuts what is too long.
pub(crate) fn escape(message: &str) -> String {
    let mut escaped = String::with_capacity(message.len());
    for character in message.chars() {
        if escaped.len() > MAX_MESSAGE {
            escaped.push('…');
            break;
        }
        // The ellipsis is in the short form of a peer's key.
        if character.is_ascii_graphic() || [' ', '…'].contains(&character) {
            escaped.push(character);
        } else {
            escaped.extend(character.escape_unicode());
        }
    }
    escaped
}

/// Escapes what the dataplane wrote, so that a search for the helper's tag does not find it, and that a
/// terminal does not show what follows many spaces as a line of its own.
fn escape_dataplane(message: &str) -> String {
    let words = message.split(' ').filter(|word| !word.is_empty());
    escape(&words.collect::<Vec<_>>().join(" ")).replace("wgsep[", "wgsep\\u{5b}")
}

/// Inside a JSON string.
fn json(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::OFlag;
    use nix::unistd::{pipe, pipe2, write};

    #[test]
    fn hostile_lines_are_escaped_bounded_and_keep_their_level() {
        let (mut log, written) = piped(Sink::Stream, Format::Text);
        log.started();
        let (reader, writer) = pipe().unwrap();
        let long = "x".repeat(3000);
        let hostile = format!(" INFO fine\nDEBUG hidden\nERROR \x1b[2Jred\r\nno level\n{long}\n");
        write(&writer, hostile.as_bytes()).unwrap();
        drop(writer);
        while log.forward(reader.as_fd()) {}
        let written = written();
        let lines: Vec<&str> = written.lines().collect();
        assert!(lines[0].ends_with(" INFO wgsep-dataplane[wg0]: fine"));
        assert!(lines[1].ends_with(" ERROR wgsep-dataplane[wg0]: \\u{1b}[2Jred"));
        assert!(lines[2].ends_with(" ERROR wgsep-dataplane[wg0]: no level"));
        assert!(lines[3..].iter().all(|line| line.len() < MAX_LINE + 80) && lines.len() == 6);
    }

    #[test]
    fn the_level_goes_to_debug_and_back_and_says_so_at_every_level() {
        for (started, other) in [
            (LogLevel::Silent, LogLevel::Debug),
            (LogLevel::Error, LogLevel::Debug),
            (LogLevel::Info, LogLevel::Debug),
            (LogLevel::Debug, LogLevel::Info),
        ] {
            let (reader, writer) = pipe2(OFlag::O_NONBLOCK).unwrap();
            let mut log = Log::new(Sink::Stream(writer.into()), Format::Text, started);
            assert_eq!(log.switch_level(), other);
            assert_eq!(log.switch_level(), started);
            let mut buffer = [0; 4096];
            let len = read(&reader, &mut buffer).unwrap();
            let text = String::from_utf8_lossy(&buffer[..len]);
            assert_eq!(text.matches("SIGHUP: log level was ").count(), 2, "{text}");
        }
    }

    /// A log into a pipe, and what reads the pipe.
    fn piped(sink: impl Fn(File) -> Sink, format: Format) -> (Log, impl Fn() -> String) {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK).unwrap();
        let mut log = Log::new(sink(writer.into()), format, LogLevel::Info);
        log.set_interface("wg0");
        let written = move || {
            let mut buffer = [0; 8192];
            let len = read(&reader, &mut buffer).unwrap_or(0);
            String::from_utf8_lossy(&buffer[..len]).into_owned()
        };
        (log, written)
    }

    #[test]
    fn the_journal_gets_priorities_and_no_time() {
        let (log, written) = piped(Sink::Journal, Format::Text);
        log.line(Level::Warn, "look");
        log.error("it failed");
        assert_eq!(written(), "<4>wgsep[wg0]: look\n<3>wgsep[wg0]: it failed\n");
        let (log, written) = piped(Sink::Journal, Format::Json);
        log.info("all is well");
        assert!(written().starts_with("<6>{\"time\":\"2"));
    }

    #[test]
    fn the_line_after_one_that_was_cut_begins_on_a_line_of_its_own() {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK).unwrap();
        let (writer, is_cut) = (File::from(writer), Cell::new(false));
        let long = "x".repeat(100_000);
        assert!(!write_now(&writer, &long, &is_cut), "longer than a pipe");
        let taken = read(&reader, &mut vec![0; long.len()]).unwrap();
        assert!(taken < long.len());
        for line in ["next\n", "and another\n"] {
            assert!(write_now(&writer, line, &is_cut));
        }
        let mut written = [0; 100];
        let len = read(&reader, &mut written).unwrap();
        assert_eq!(&written[..len], b"\nnext\nand another\n");
    }

    #[test]
    fn the_first_error_of_a_start_is_kept_for_its_line_and_logged_if_it_succeeds() {
        let (mut log, written) = piped(Sink::Stream, Format::Text);
        assert_eq!(log.reason(), None);
        log.parse_line("ERROR no \u{1b}memory");
        log.parse_line("ERROR the end");
        assert_eq!(log.reason(), Some("no \\u{1b}memory"));
        assert_eq!(written(), "");
        log.started();
        assert!(written().ends_with(" ERROR wgsep-dataplane[wg0]: no \\u{1b}memory\n"));
        assert_eq!(log.reason(), None);
        log.parse_line("ERROR port taken");
        assert_eq!(written().lines().count(), 1);
        assert_eq!(log.reason(), None, "the helper's lines have nothing of it from then on");
    }

    #[test]
    fn printable_ascii_is_left_as_it_is_and_all_else_is_visible() {
        assert_eq!(escape("peer(TjO8…n9wA) ~"), "peer(TjO8…n9wA) ~");
        assert_eq!(escape("a\u{202e}b\u{2028}\0"), "a\\u{202e}b\\u{2028}\\u{0}");
        // Soft hyphen, a variation selector, a Cyrillic letter that looks Latin.
        for like in ["wgsep\u{ad}[", "wgsep\u{fe0f}[", "wgs\u{435}p["] {
            assert!(escape_dataplane(like).is_ascii(), "{like}");
        }
        assert_eq!(escape_dataplane(&format!("a{}b", " ".repeat(200))), "a b");
    }

    #[test]
    fn a_line_of_the_dataplane_has_its_own_tag_and_cannot_have_the_helpers() {
        let forged = "ERROR 2026-11-29T00:00:00.000Z ERROR wgsep[wg0]: ended: SIGTERM\",\"tag\":\"wgsep[wg0]";
        for (sink, format) in [
            (Sink::Stream as fn(File) -> Sink, Format::Text),
            (Sink::Stream, Format::Json),
            (Sink::Journal, Format::Text),
            (Sink::Journal, Format::Json),
        ] {
            let (mut log, written) = piped(sink, format);
            log.started();
            log.parse_line(forged);
            log.info("real");
            let text = written();
            let [its, ours] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text}") };
            let tag = |tag: &str| match format {
                Format::Text => format!("{tag}: "),
                Format::Json => format!("\"tag\":\"{tag}\","),
            };
            assert!(its.contains(&tag("wgsep-dataplane[wg0]")) && !its.contains("wgsep["), "{its}");
            assert!(ours.contains(&tag("wgsep[wg0]")), "{ours}");
        }
    }

    #[test]
    fn an_hours_bytes_are_bounded_and_what_is_suppressed_is_announced_and_counted() {
        for (level, budget) in [(LogLevel::Info, BUDGET), (LogLevel::Debug, DEBUG_BUDGET)] {
            let (mut log, written) = piped(Sink::Stream, Format::Text);
            log.most = level;
            let long = format!("INFO {}", "x".repeat(1000));
            let (mut bytes, mut last) = (0, String::new());
            for _ in 0..budget / 1000 + 7 {
                log.parse_line(&long);
                let text = written();
                bytes += text.len();
                last = if text.is_empty() { last } else { text };
            }
            assert!((budget..budget + 2000).contains(&bytes), "{bytes} of {budget}");
            let (_, announced) = last.split_once(" ERROR wgsep[wg0]: ").unwrap();
            assert!(
                announced.starts_with("lines of the dataplane are suppressed until 20"),
                "{last}"
            );
            let dropped = log.budget.dropped;
            assert!(dropped > 7);
            log.started();
            log.parse_line("ERROR out of memory");
            assert_eq!(log.budget.dropped, dropped + 1);
            assert!(log.check_budget() <= PERIOD && written().is_empty());

            log.budget.since -= PERIOD;
            assert_eq!(log.check_budget(), Duration::MAX);
            let text = written();
            let counted = format!(" ERROR wgsep[wg0]: {} lines of the dataplane", dropped + 1);
            assert!(text.contains(&counted) && text.lines().count() == 1, "{text}");
            log.parse_line("INFO after");
            assert!(written().ends_with(" INFO wgsep-dataplane[wg0]: after\n"));
        }
    }

    #[test]
    fn another_level_has_a_new_budget() {
        let (mut log, written) = piped(Sink::Stream, Format::Text);
        (log.budget.bytes, log.budget.dropped) = (BUDGET, 3);
        log.switch_level();
        assert!(written().contains(" 3 lines of the dataplane were suppressed"));
        log.parse_line("DEBUG more");
        assert!(written().ends_with(" DEBUG wgsep-dataplane[wg0]: more\n"));
    }

    #[test]
    fn a_pipe_that_is_not_read_does_not_stop_the_log() {
        let (_reader, writer) = pipe().unwrap();
        let log = Log::new(Sink::Stream(writer.into()), Format::Json, LogLevel::Info);
        let longest = "\u{1b}\"".repeat(MAX_LINE);
        for _ in 0..100 {
            log.info(&longest);
        }
    }

    /// Fills the pipe of a log; how many lines were lost.
    fn fill(log: &Log) -> u64 {
        while log.lost.get().0 < 3 {
            log.info(&"x".repeat(MAX_LINE));
        }
        log.lost.get().0
    }

    /// What is in a pipe.
    fn drain(read: impl Fn() -> String) -> String {
        std::iter::repeat_with(read).take_while(|text| !text.is_empty()).collect()
    }

    #[test]
    fn lines_that_were_lost_are_counted_behind_the_next_one() {
        for (sink, format) in [
            (Sink::Stream as fn(File) -> Sink, Format::Text),
            (Sink::Stream, Format::Json),
            (Sink::Journal, Format::Text),
            (Sink::Journal, Format::Json),
        ] {
            let (log, written) = piped(sink, format);
            assert_eq!(fill(&log), 3);
            assert!(!drain(&written).contains("could not be written"));
            log.info("there is space again");
            let text = written();
            let [next, count] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text}") };
            assert!(next.contains("there is space again"), "{text}");
            let said = count.contains("3 lines could not be written to the log");
            assert!(said && count.contains("wgsep[wg0]"), "{text}");
            log.info("all is well");
            assert_eq!(written().lines().count(), 1);
        }
    }

    #[test]
    fn lines_that_count_others_are_one_a_second_and_lose_none() {
        let (log, written) = piped(Sink::Stream, Format::Text);
        log.lost.set((4, Some(Instant::now())));
        log.info("soon after another count");
        assert_eq!((log.lost.get().0, written().lines().count()), (4, 1));
        log.lost.set((4, Instant::now().checked_sub(BETWEEN_COUNTS * 2)));
        log.info("long after");
        assert!(written().contains(" ERROR wgsep[wg0]: 4 lines could not be written"));
        // A count that the sink does not take is made again.
        log.lost.set((7, None));
        let lost = fill(&log);
        drain(&written);
        log.info("there is space again");
        assert!(written().contains(&format!(" {lost} lines could not be written")));
    }

    #[test]
    fn the_last_line_waits_a_moment_for_what_reads_and_no_longer() {
        let (log, _unread) = piped(Sink::Stream, Format::Text);
        fill(&log);
        let began = Instant::now();
        log.last_line(Level::Error, "without a reader");
        assert!(began.elapsed() >= BETWEEN_TRIES * (LAST_TRIES - 1), "{:?}", began.elapsed());
        assert_eq!(log.lost.get().0, 4);

        // The reader begins when the log already waits. On a busy machine it may come too late.
        let is_late = || {
            let (log, written) = piped(Sink::Stream, Format::Text);
            let lost = fill(&log);
            let text = std::thread::scope(|scope| {
                let text = scope.spawn(|| {
                    std::thread::sleep(BETWEEN_TRIES * 2);
                    drain(&written)
                });
                log.last_line(Level::Error, "ended: a breach");
                text.join().unwrap()
            });
            let text = text + &drain(&written);
            let counted = format!(" {lost} lines could not be written");
            !(text.contains("wgsep[wg0]: ended: a breach") && text.contains(&counted))
        };
        assert!((0..20).any(|_| !is_late()));
    }

    #[test]
    fn members_of_an_event_are_in_json_and_the_text_has_none() {
        for (format, has_members) in [(Format::Json, true), (Format::Text, false)] {
            let (log, written) = piped(Sink::Stream, format);
            log.event("started: all is well", r#","sandbox":{"helper":{}},"pid":7"#);
            let line = written();
            assert_eq!(
                line.contains(r#"all is well","sandbox":{"helper":{}},"pid":7}"#),
                has_members,
                "{line}"
            );
            assert_eq!(line.contains("sandbox"), has_members, "{line}");
        }
    }

    #[test]
    fn json_lines_are_json() {
        assert_eq!(json(r#"say "\""#), r#"say \"\\\""#);
    }
}
