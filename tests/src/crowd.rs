//! A thousand clients of a socket that less trusted users may reach.
#![allow(clippy::unwrap_used, reason = "a test fails there")]

use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use crate::link::Family;
use crate::procfs;
use crate::traffic::{Pinging, until_ping};
use crate::tunnel::End;

const CLIENTS: usize = 1000;

/// Whose socket it is, and what its clients may take together.
#[derive(Debug)]
pub struct Crowd {
    /// The socket.
    pub path: PathBuf,
    /// Descriptors of the dataplane.
    pub most_descriptors: usize,
    /// Kilobytes of its memory.
    pub most_memory: u64,
    /// Sends what the client of a number has to say; one that was hung up on says nothing more.
    pub speak: fn(usize, &mut UnixStream),
}

impl Crowd {
    /// Connects one.
    ///
    /// # Panics
    /// If it is refused.
    #[must_use]
    pub fn connect(&self) -> UnixStream {
        let client = UnixStream::connect(&self.path).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    /// Connects all, and has them speak until ten pings of `left` to `right` were answered meanwhile; what they take stays
    /// bounded, no ping is lost, and the UAPI is served.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    #[must_use]
    pub fn disturbs_nothing(&self, left: &End, right: &End) -> Vec<UnixStream> {
        let daemon = &left.daemon;
        let dataplane = daemon.dataplane();
        let inner = right.side.inner(Family::V4);
        until_ping(&daemon.netns, inner);
        let pinging = Pinging::start(&daemon.netns, inner);
        let descriptors = || procfs::descriptors(dataplane).len();
        let memory = || procfs::memory(dataplane, "VmRSS").unwrap();
        // What an answer to wg(8) takes is not theirs.
        daemon.wg("show", "dump");
        let (before, used) = (descriptors(), memory());

        let mut clients = Vec::new();
        for number in 0..CLIENTS {
            let mut client = self.connect();
            (self.speak)(number, &mut client);
            clients.push(client);
            assert!(descriptors() <= before + self.most_descriptors, "after {number} clients");
        }
        let begun = pinging.replies();
        while pinging.replies() < begun + 10 {
            for (number, client) in clients.iter_mut().enumerate() {
                (self.speak)(number, client);
            }
            assert!(descriptors() <= before + self.most_descriptors);
            let more = memory().saturating_sub(used);
            assert!(more <= self.most_memory, "{more} kB more");
            assert_eq!(daemon.listen_port(), left.port);
        }
        let pings = pinging.stop();
        assert!(pings.received + 2 >= pings.sent, "{pings:?}");
        clients
    }
}
