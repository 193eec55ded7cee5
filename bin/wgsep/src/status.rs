//! Connects to the status socket of a running daemon, or for its counters alone to its UAPI socket.

use crate::uapi;
use nix::errno::Errno;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long the daemon may take for all of it, from accepting a client to the end of its answer. It does so between two
/// packets.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// More than an answer has, in bytes: two kilobytes for each of 60,000 peers.
const MAX_ANSWER: usize = 128 << 20;

/// The path of an interface's status socket.
fn path(interface: &str) -> String {
    format!("{}/{interface}.status", uapi::DIRECTORY)
}

/// A connection to a daemon.
pub struct Daemon {
    socket: UnixStream,
    request: &'static [u8],
    was_asked: bool,
}

impl Daemon {
    /// Connects to the daemon of an interface.
    ///
    /// # Errors
    /// One line, if none serves it or it may not be asked.
    pub fn connect(interface: &str, deadline: Instant) -> Result<Self, String> {
        let (socket, request) = match connect(interface, deadline) {
            Ok(socket) => (Ok(socket), &b"get=1\n\n"[..]),
            // Of a daemon without a status socket, or of another program.
            Err(Errno::ENOENT | Errno::ECONNREFUSED) => {
                let socket = uapi::connect_until(&uapi::path(interface), deadline);
                let socket = socket.map_err(|errno| uapi::refusal(interface, errno));
                (socket, &b"get=statistics\n\n"[..])
            }
            Err(errno) => (Err(refusal(interface, errno)), &b""[..]),
        };
        Ok(Self { socket: socket?, request, was_asked: false })
    }

    /// Asks once.
    ///
    /// # Errors
    /// If there is no answer before the deadline; UnexpectedEof if the daemon has closed the connection since the last.
    pub fn ask(&mut self, deadline: Instant) -> io::Result<String> {
        let asked_before = self.was_asked;
        self.socket.set_nonblocking(false)?;
        self.socket.set_write_timeout(Some(remaining(deadline)?))?;
        self.socket.write_all(self.request).map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe => ErrorKind::UnexpectedEof.into(),
            _ => error,
        })?;
        let (mut answer, mut buffer) = (Vec::new(), [0; 16 * 1024]);
        while answer.len() < MAX_ANSWER {
            self.socket.set_read_timeout(Some(remaining(deadline)?))?;
            match self.socket.read(&mut buffer) {
                Ok(0) if asked_before => return Err(ErrorKind::UnexpectedEof.into()),
                // Of another program, say.
                Ok(0) => break,
                Ok(len) => {
                    debug_assert!(len <= buffer.len(), "read(2) fills no more than the buffer");
                    answer.extend_from_slice(buffer.get(..len).unwrap_or_default());
                    if answer.ends_with(b"\n\n") {
                        self.was_asked = true;
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        String::from_utf8(answer).map_err(|_| ErrorKind::InvalidData.into())
    }
}

/// Connects to the status socket of an interface.
///
/// # Errors
/// As connect(2).
pub fn connect(interface: &str, deadline: Instant) -> nix::Result<UnixStream> {
    uapi::connect_until(&path(interface), deadline)
}

/// The line for a status socket that cannot be connected to.
pub fn refusal(interface: &str, errno: Errno) -> String {
    let path = path(interface);
    match errno {
        Errno::EACCES => format!(
            "{path}: {}; become a member of the group that has it (ls -l {path}), or run as root",
            errno.desc()
        ),
        Errno::ENOENT | Errno::ECONNREFUSED => format!(
            "no daemon serves {interface} with a status socket: no process listens on {path}; start it: wgsep {interface}"
        ),
        errno => uapi::refusal(interface, errno),
    }
}

/// The line for a daemon that does not answer.
pub fn no_answer(interface: &str, error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => format!(
            "the daemon of {interface} does not answer within {} s; see its log, and if it is stopped or hangs, restart it",
            PATIENCE.as_secs()
        ),
        _ => format!("the daemon of {interface} does not answer: {error}; see its log"),
    }
}

/// The line for what serves the interface and is no wgsep of this version.
pub fn other_program(interface: &str) -> String {
    format!(
        "{interface} is served by another program, or by another version of wgsep; use `wg show`, or restart wgsep"
    )
}

/// How long there is until a deadline.
///
/// # Errors
/// If it has passed.
pub fn remaining(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
}
