//! What must not be seen during a run: plaintext or inner addresses on the underlay, errors that no
//! event declares, and a client of the daemons that crashes.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvfrom, sendto, socket,
};
use wgsep_tests::link::{Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::nft::Counter;

use crate::probe::PATTERN;

/// How often a thread that waits looks whether it is to end, in ms.
const TICK: u8 = 100;
/// The bytes of a frame that are looked at.
const SEEN: usize = 2048;
/// The time between two clients that read the configuration.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// What the witnesses found, for the run to read after each event.
#[derive(Clone, Debug, Default)]
pub(crate) struct Findings(Arc<Mutex<Vec<String>>>);

impl Findings {
    fn add(&self, finding: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(finding);
    }

    /// What was found since it was last taken.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A thread that works until it is dropped.
#[derive(Debug)]
pub(crate) struct Background {
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Calls `work` over and over.
    pub(crate) fn start(mut work: impl FnMut() + Send + 'static) -> Self {
        let ending = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&ending);
        let thread = thread::spawn(move || {
            while !flag.load(Ordering::Relaxed) {
                work();
            }
        });
        Self { ending, thread: Some(thread) }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// All frames of a namespace, in and out.
fn frames(netns: &Netns) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let open = || socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll);
    match netns.inside(open) {
        Ok(socket) => socket,
        Err(error) => panic!("cannot capture in {}: {error}", netns.name()),
    }
}

/// The next frame within a tick, with where it was seen; the rest of a long one is cut off.
fn next_frame(socket: &OwnedFd, buffer: &mut [u8; SEEN]) -> Option<(usize, LinkAddr)> {
    let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    poll(&mut ready, PollTimeout::from(TICK)).ok()?;
    let (length, address) = recvfrom::<LinkAddr>(socket.as_raw_fd(), buffer).ok()?;
    Some((length, address?))
}

/// Looks for the payload of the traffic in the frames of a namespace. Under load not all of them are
/// captured; the [`leak_counters`] miss none.
pub(crate) fn sniff(netns: &Netns, findings: Findings) -> Background {
    let socket = frames(netns);
    let mut buffer = [0; SEEN];
    Background::start(move || {
        let Some((length, _address)) = next_frame(&socket, &mut buffer) else { return };
        let frame = buffer.get(..length).unwrap_or_default();
        if frame.windows(PATTERN.len()).any(|window| window == PATTERN) {
            findings.add(format!("plaintext on the underlay: {}", hex(&frame[..64.min(length)])));
        }
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Counts packets that a namespace receives to an address inside the tunnel. All that belongs inside
/// has such a destination. A datagram of the daemon's own may have such a source: while the underlay has
/// no address, the kernel takes one of another interface.
pub(crate) fn leak_counters(netns: &Arc<Netns>) -> Vec<Counter> {
    let count = |side: Side, family: Family| {
        let (ip, version) = if family == Family::V4 { ("ip", 4) } else { ("ip6", 6) };
        let expression = format!("{ip} daddr {}", side.inner(family));
        let name = format!("to{}v{version}", side as u8);
        Counter::new(netns, &name, "prerouting", &expression)
    };
    let sides = [Side::Left, Side::Right].into_iter();
    sides.flat_map(|side| [Family::V4, Family::V6].map(|family| count(side, family))).collect()
}

/// Sends some of the frames that leave a namespace once more, a little later: duplicates, and
/// reordered ones where the first copy is lost on its way.
pub(crate) fn repeat(netns: &Netns, one_in: usize) -> Background {
    /// Frames that are held back before the oldest of them is sent again.
    const HELD: usize = 16;
    /// As in linux/if_packet.h.
    const PACKET_OUTGOING: u8 = 4;
    let socket = frames(netns);
    let mut buffer = [0; SEEN];
    let mut held: Vec<(Vec<u8>, LinkAddr)> = Vec::new();
    let mut repeated: Vec<Vec<u8>> = Vec::new();
    let mut count = 0;
    Background::start(move || {
        let Some((length, address)) = next_frame(&socket, &mut buffer) else { return };
        let frame = buffer.get(..length).unwrap_or_default().to_vec();
        // What is longer was cut off, or is for segmentation.
        if address.pkttype() != PACKET_OUTGOING || length > 1600 {
            return;
        }
        // The copies are captured too.
        if let Some(place) = repeated.iter().position(|sent| *sent == frame) {
            repeated.swap_remove(place);
            return;
        }
        count += 1;
        if count % one_in == 0 {
            held.push((frame, address));
        }
        if held.len() > HELD {
            let (frame, address) = held.remove(0);
            if sendto(socket.as_raw_fd(), &frame, &address, MsgFlags::empty()).is_ok() {
                repeated.push(frame);
            }
            // A copy that was not captured is not waited for.
            let surplus = repeated.len().saturating_sub(HELD);
            repeated.drain(..surplus);
        }
    })
}

/// Runs wg(8) on one interface after the other, which must never crash. It may fail: the daemon may
/// be gone at that moment.
pub(crate) fn poll_configuration(
    places: [(Arc<Netns>, String); 2],
    findings: Findings,
) -> Background {
    let mut places = places.into_iter().cycle();
    Background::start(move || {
        let Some((netns, interface)) = places.next() else { return };
        let mut command = netns.command("wg");
        command.args(["show", &interface, "dump"]).stdin(Stdio::null());
        let status = command.output().map(|output| output.status);
        if let Ok(Some(signal)) = status.as_ref().map(ExitStatusExt::signal) {
            findings.add(format!("wg show {interface} ended by signal {signal}"));
        }
        thread::sleep(POLL_INTERVAL);
    })
}

/// The lines of a log that say that something is wrong.
pub(crate) fn errors(log: &str) -> impl Iterator<Item = &str> {
    log.lines().filter(|line| line.contains(" ERROR ") || line.contains("panicked"))
}
