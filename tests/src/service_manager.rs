//! A service manager as wgsep sees one (sd_notify(3), sd_listen_fds(3)): it receives notifications, stores descriptors,
//! and hands them to the next start.

use std::fs::{self, Permissions};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

use crate::netns::Netns;
use crate::scratch::Scratch;
use crate::wait;

/// How long a message may take.
const LIMIT: Duration = Duration::from_secs(10);
/// The name that wgsep stores its queues under.
pub const QUEUE: &str = "wgsep-tun";

/// What has been received.
#[derive(Debug, Default)]
struct Received {
    messages: Vec<String>,
    stored: Vec<OwnedFd>,
}

/// A manager that receives for as long as it lives.
#[derive(Debug)]
pub struct ServiceManager {
    _scratch: Scratch,
    path: PathBuf,
    received: Arc<Mutex<Received>>,
}

impl Default for ServiceManager {
    #[track_caller]
    fn default() -> Self {
        let scratch = Scratch::new();
        let path = scratch.join("notify");
        let Ok(socket) = UnixDatagram::bind(&path) else {
            panic!("cannot bind {}", path.display());
        };
        // A daemon that a user starts may send too.
        if let Err(error) = fs::set_permissions(&path, Permissions::from_mode(0o777)) {
            panic!("cannot open {} to others: {error}", path.display());
        }
        let received = Arc::new(Mutex::new(Received::default()));
        let shared = Arc::clone(&received);
        // Ends with the process of the tests: it holds nothing then.
        thread::spawn(move || {
            while let Ok((message, descriptors)) = receive(&socket) {
                let mut received = lock(&shared);
                if message.starts_with("FDSTORE=1\n") {
                    received.stored.extend(descriptors);
                } else if message.starts_with("FDSTOREREMOVE=1\n") {
                    received.stored.clear();
                }
                received.messages.push(message);
            }
        });
        Self { _scratch: scratch, path, received }
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        self.store(Vec::new());
    }
}

impl ServiceManager {
    /// Has a command notify this manager, which stores up to `capacity` descriptors.
    pub fn supervise(&self, command: &mut Command, capacity: usize) {
        command.env("NOTIFY_SOCKET", &self.path).env("FDSTORE", capacity.to_string());
    }

    /// All messages so far.
    #[must_use]
    pub fn messages(&self) -> Vec<String> {
        lock(&self.received).messages.clone()
    }

    /// Waits for a message that begins like that.
    ///
    /// # Panics
    ///
    /// When none comes.
    #[track_caller]
    pub fn until_message(&self, begin: &str) {
        wait::until(&format!("the service manager receives {begin}"), LIMIT, || {
            self.messages().iter().any(|message| message.starts_with(begin))
        });
    }

    /// Waits until all that was sent before is received.
    ///
    /// # Panics
    ///
    /// When it cannot be sent to, or does not receive.
    #[track_caller]
    pub fn catch_up(&self) {
        let mark = format!("MARK={}", self.messages().len());
        let sent = UnixDatagram::unbound().and_then(|to| to.send_to(mark.as_bytes(), &self.path));
        assert!(sent.is_ok(), "cannot send to {}: {sent:?}", self.path.display());
        self.until_message(&mark);
    }

    /// Duplicates of what is stored.
    ///
    /// # Panics
    ///
    /// When there are no more descriptors.
    #[track_caller]
    #[must_use]
    pub fn stored(&self) -> Vec<OwnedFd> {
        let duplicates = lock(&self.received).stored.iter().map(OwnedFd::try_clone).collect();
        match duplicates {
            Ok(duplicates) => duplicates,
            Err(error) => panic!("cannot duplicate what is stored: {error}"),
        }
    }

    /// Stores these and nothing else, and forgets all messages.
    pub fn store(&self, stored: Vec<OwnedFd>) {
        *lock(&self.received) = Received { stored, messages: Vec::new() };
    }
}

fn lock(received: &Mutex<Received>) -> MutexGuard<'_, Received> {
    received.lock().unwrap_or_else(PoisonError::into_inner)
}

fn receive(socket: &UnixDatagram) -> nix::Result<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; 4096];
    let mut control = nix::cmsg_space!([libc::c_int; 253]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            // SAFETY: the kernel has just made these descriptors for us alone.
            descriptors
                .extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    let length = message.bytes;
    Ok((String::from_utf8_lossy(&bytes[..length]).into_owned(), descriptors))
}

/// Has a command start with these descriptors from 3 on, by these names, as a service manager starts its own. The
/// environment may be changed afterwards.
///
/// # Panics
///
/// When they cannot be duplicated.
#[track_caller]
pub fn listen(command: &mut Command, netns: &Netns, descriptors: &[OwnedFd], names: &[&str]) {
    // The shell becomes the program, so that the number is that program's.
    let mut shell = netns.command("sh");
    shell.args(["-c", "export LISTEN_PID=${LISTEN_PID:-$$}; exec \"$@\"", "sh"]);
    shell.arg(command.get_program()).args(command.get_args());
    let variables = command.get_envs().filter_map(|(name, value)| Some((name, value?)));
    shell.envs(variables);
    shell.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
    // Out of the way of the numbers that they are to have.
    let high = descriptors.iter().map(|descriptor| {
        let number = fcntl(descriptor, FcntlArg::F_DUPFD_CLOEXEC(500))?;
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    });
    let high: Vec<_> = match high.collect::<nix::Result<_>>() {
        Ok(high) => high,
        Err(error) => panic!("cannot duplicate a descriptor: {error}"),
    };
    let place = move || {
        for (number, descriptor) in (3..).zip(&high) {
            // SAFETY: plain integers; the child uses nothing that is open at a low number but standard streams.
            Errno::result(unsafe { libc::dup2(descriptor.as_raw_fd(), number) })
                .map_err(io::Error::from)?;
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are allowed: it makes bare
    // system calls on what it owns, and allocates nothing.
    unsafe {
        shell.pre_exec(place);
    }
    *command = shell;
}
