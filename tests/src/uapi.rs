//! The cross-platform UAPI spoken raw, for what wg(8) would never send.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::daemon::socket_path;

/// How long an answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A connection to a daemon's UAPI socket.
#[derive(Debug)]
pub struct Uapi {
    stream: UnixStream,
}

impl Uapi {
    /// Connects to the daemon of an interface.
    ///
    /// # Errors
    ///
    /// Of connect(2): `NotFound` without a socket, `ConnectionRefused` when its daemon is gone.
    pub fn connect(interface: &str) -> io::Result<Self> {
        Self::connect_to(interface, "sock")
    }

    /// Connects to the status socket of the daemon of an interface.
    ///
    /// # Errors
    ///
    /// As [`Uapi::connect`].
    pub fn connect_status(interface: &str) -> io::Result<Self> {
        Self::connect_to(interface, "status")
    }

    /// Connects to the socket for preshared keys of the daemon of an interface.
    ///
    /// # Errors
    ///
    /// As [`Uapi::connect`].
    pub fn connect_psk(interface: &str) -> io::Result<Self> {
        Self::connect_to(interface, "psk")
    }

    fn connect_to(interface: &str, extension: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(socket_path(interface).with_extension(extension))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        Ok(Self { stream })
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    ///
    /// When the daemon has closed the connection or stopped reading.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Reads one answer, up to and without its empty line.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` when the daemon closes the connection first, `WouldBlock` when it stays
    /// silent.
    pub fn receive(&mut self) -> io::Result<String> {
        let mut answer = Vec::new();
        let mut byte = [0];
        while !answer.ends_with(b"\n\n") {
            self.stream.read_exact(&mut byte)?;
            answer.push(byte[0]);
        }
        answer.truncate(answer.len() - 1);
        String::from_utf8(answer).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// One request and its answer.
    ///
    /// # Errors
    ///
    /// As [`Uapi::send`] and [`Uapi::receive`].
    pub fn transact(&mut self, request: &str) -> io::Result<String> {
        self.send(request.as_bytes())?;
        self.receive()
    }
}

/// The `errno=` of an answer, if it has one.
#[must_use]
pub fn errno(answer: &str) -> Option<i32> {
    answer.lines().find_map(|line| line.strip_prefix("errno=")).and_then(|text| text.parse().ok())
}

/// Whether the daemon of an interface answers a request for its configuration.
#[must_use]
pub fn is_answering(interface: &str) -> bool {
    let answer = Uapi::connect(interface).and_then(|mut uapi| uapi.transact("get=1\n\n"));
    answer.is_ok_and(|answer| errno(&answer) == Some(0))
}
