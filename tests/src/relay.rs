//! A UDP relay in front of a daemon that keeps what passes, for a test to send again.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::netns::Netns;

/// How often, in milliseconds, a silent relay looks whether it is to end.
const TICK: u8 = 50;

/// The largest UDP payload.
const LARGEST: usize = 65_535;

/// A relay between one client and one server; it ends when dropped.
#[derive(Debug)]
pub struct Relay {
    sockets: Arc<Sockets>,
    recorded: Arc<Mutex<Vec<Vec<u8>>>>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Sockets {
    towards_client: UdpSocket,
    /// Connected: to the server, all that comes out of it comes from the client.
    towards_server: UdpSocket,
}

impl Relay {
    /// Listens on `listen` in `netns` and relays to `server`, keeping what the client sends.
    ///
    /// # Panics
    ///
    /// When the sockets cannot be made.
    #[track_caller]
    #[must_use]
    pub fn start(netns: &Netns, listen: SocketAddr, server: SocketAddr) -> Self {
        let sockets = match netns.inside(|| Sockets::open(listen, server)) {
            Ok(sockets) => Arc::new(sockets),
            Err(error) => panic!("cannot relay {listen} to {server}: {error}"),
        };
        let recorded = Arc::new(Mutex::new(Vec::new()));
        let ending = Arc::new(AtomicBool::new(false));
        let thread = {
            let (sockets, recorded, ending) =
                (Arc::clone(&sockets), Arc::clone(&recorded), Arc::clone(&ending));
            thread::spawn(move || {
                let mut client = None;
                while !ending.load(Ordering::Relaxed) {
                    // What fails is a datagram's loss, as on any network.
                    let _ = sockets.relay(&mut client, &recorded);
                }
            })
        };
        Self { sockets, recorded, ending, thread: Some(thread) }
    }

    /// The datagrams the client has sent so far.
    #[must_use]
    pub fn recorded(&self) -> Vec<Vec<u8>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sends a datagram to the server from the address it knows the client by.
    ///
    /// # Errors
    ///
    /// Of send(2).
    pub fn send(&self, datagram: &[u8]) -> io::Result<()> {
        self.sockets.towards_server.send(datagram).map(|_length| ())
    }
}

impl Sockets {
    fn open(listen: SocketAddr, server: SocketAddr) -> io::Result<Self> {
        let towards_client = UdpSocket::bind(listen)?;
        let towards_server = UdpSocket::bind(SocketAddr::new(listen.ip(), 0))?;
        towards_server.connect(server)?;
        towards_client.set_nonblocking(true)?;
        towards_server.set_nonblocking(true)?;
        Ok(Self { towards_client, towards_server })
    }

    /// Waits a tick for datagrams and forwards at most one each way.
    fn relay(
        &self,
        client: &mut Option<SocketAddr>,
        recorded: &Mutex<Vec<Vec<u8>>>,
    ) -> io::Result<()> {
        let mut ready = [&self.towards_client, &self.towards_server]
            .map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN));
        poll(&mut ready, PollTimeout::from(TICK))?;
        let [from_client, from_server] = ready.map(|socket| socket.any().unwrap_or(false));
        let mut buffer = vec![0; LARGEST];
        if from_client {
            let (length, sender) = self.towards_client.recv_from(&mut buffer)?;
            *client = Some(sender);
            let datagram = &buffer[..length];
            recorded.lock().unwrap_or_else(PoisonError::into_inner).push(datagram.to_vec());
            self.towards_server.send(datagram)?;
        }
        if let (true, Some(client)) = (from_server, *client) {
            let length = self.towards_server.recv(&mut buffer)?;
            self.towards_client.send_to(&buffer[..length], client)?;
        }
        Ok(())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
