//! Handing the tunnel over to the dataplane of another pair, and taking it over there.
//!
//! The helpers pass the descriptors, and the ends of one socket to the two dataplanes. What passes there is one message
//! each, in this order; the UDP sockets follow, as they are after the old dataplane's last request:
//!
//! 1. The old dataplane stops its workers and sends the version of its state, and the state, record by record
//!    (`saved` of the protocol). From then on it neither sends nor receives.
//! 2. The new one restores it and says so ([`RESTORED`]). It does not send or receive yet.
//! 3. The old one gives it away ([`YOURS`]) and exits. The new one starts.
//!
//! Whoever sees the other end closed or waits for longer than the socket's timeout before the third step goes back: the
//! old one goes on with what it has, the new one exits. So at any time at most one of the two seals, and no nonce is
//! used twice, whichever process is killed when.

use super::{Action, Control, End};
use crate::clock;
use nix::errno::Errno;
use nix::unistd::{read, write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use wgsep_policy::described;
use wgsep_proto::device::control_plane::Restore;
use wgsep_proto::saved::{self, MAX_RECORD_LEN, Refused};

/// The new dataplane has the whole state.
const RESTORED: &[u8] = b"restored";
/// The old dataplane uses nothing of it any more.
const YOURS: &[u8] = b"yours";

/// Rounds of handshake messages that are consumed before; the rest is dropped, as in a flood.
const LAST_ROUNDS: usize = 16;

/// Time that the processes of the old pair have to end after they have given everything away.
const PREDECESSOR_ENDS: Duration = Duration::from_secs(5);

/// Why a hand-over failed, before anything was given away.
struct Failed(String);

impl From<Refused> for Failed {
    fn from(refused: Refused) -> Self {
        Self(format!("the state makes no sense: {refused}"))
    }
}

/// Repeats an operation that fails with EINTR: one on a socket with a timeout does so after SIGSTOP and SIGCONT, or a freezer,
/// although no signal has a handler (signal(7)).
fn uninterrupted<T>(mut operation: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match operation() {
            Err(Errno::EINTR) => {}
            done => return done,
        }
    }
}

fn send(socket: BorrowedFd<'_>, message: &[u8]) -> Result<(), Failed> {
    match uninterrupted(|| write(socket, message)) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN) => Err(Failed("the other dataplane reads nothing".to_owned())),
        Err(Errno::EPIPE | Errno::ECONNRESET) => {
            Err(Failed("the other dataplane is gone".to_owned()))
        }
        Err(errno) => Err(Failed(format!("send to the other dataplane: {}", described(errno)))),
    }
}

fn receive<'b>(socket: BorrowedFd<'_>, buffer: &'b mut [u8]) -> Result<&'b [u8], Failed> {
    match uninterrupted(|| read(socket, buffer)) {
        Ok(0) | Err(Errno::ECONNRESET) => Err(Failed("the other dataplane is gone".to_owned())),
        Ok(len) => Ok(buffer.get(..len).unwrap_or_default()),
        Err(Errno::EAGAIN) => Err(Failed("the other dataplane says nothing".to_owned())),
        Err(errno) => {
            Err(Failed(format!("receive from the other dataplane: {}", described(errno))))
        }
    }
}

fn expect(socket: BorrowedFd<'_>, expected: &[u8]) -> Result<(), Failed> {
    if receive(socket, &mut [0; 16])? == expected {
        Ok(())
    } else {
        Err(Failed("the other dataplane says something else than expected".to_owned()))
    }
}

impl Control {
    // ------------------------------------------------------------ the old dataplane

    /// Hands everything over by a socket, and ends; or goes on if that fails.
    pub(super) fn hand_over(&mut self, socket: &OwnedFd) {
        // While the workers run: what this sends is not lost.
        self.catch_up_before_hand_over();
        self.shared.pause.stop(&self.shared.leader, self.workers);
        let handed_over = self.give_away(socket.as_fd());
        match handed_over {
            Ok(()) => {
                self.bye();
            }
            Err(Failed(why)) => {
                self.shared.pause.end();
                tracing::warn!("the tunnel was not handed over: {why}; going on with it");
                if let Err(error) = self.helper.pong() {
                    self.cannot("answer", error);
                }
                self.flush();
            }
        }
    }

    fn catch_up_before_hand_over(&mut self) {
        let mut rounds = 0..LAST_ROUNDS;
        while rounds.next().is_some() && self.consume_handshakes() {}
        self.flush();
    }

    fn give_away(&mut self, socket: BorrowedFd<'_>) -> Result<(), Failed> {
        // What the workers had under way when they stopped.
        self.catch_up_before_hand_over();
        while let Some(peer) = self.shared.take_staged() {
            self.device.put_back_staged(&peer);
        }
        send(socket, &saved::VERSION.to_le_bytes())?;
        let mut buffer = vec![0; MAX_RECORD_LEN];
        self.device.save(self.shared.local_drops.counts(), |record| {
            let len = saved::encode(&record, &mut buffer)?;
            send(socket, buffer.get(..len).unwrap_or_default())
        })?;
        expect(socket, RESTORED)?;
        send(socket, YOURS)
    }

    // ------------------------------------------------------------ the new dataplane

    /// Takes over the state that comes by `state`, and asks for the UDP sockets. If that fails, this process ends.
    pub(super) fn take_over(&mut self, state: &OwnedFd) -> bool {
        if let Err(Failed(why)) = self.restore(state.as_fd()) {
            tracing::error!(
                "cannot take over the tunnel: {why}; the old daemon goes on if it runs (see its log)"
            );
            self.end = Some(End::Failed);
            return false;
        }
        // As it was; the kernel's answer to the first query says what has changed.
        self.link_state.up = self.device.is_up();
        self.predecessor_ends = Some(clock::instant().after(PREDECESSOR_ENDS));
        if self.link_state.up {
            self.awaits_sockets = true;
            self.actions.push_back(Action::OpenPort);
        }
        if let Err(error) = self.helper.pong() {
            self.cannot("answer", error);
            return false;
        }
        true
    }

    fn restore(&mut self, socket: BorrowedFd<'_>) -> Result<(), Failed> {
        let mut buffer = vec![0; MAX_RECORD_LEN + 1];
        if receive(socket, &mut buffer)? != saved::VERSION.to_le_bytes() {
            return Err(Failed("its state is of another version; restart that daemon".to_owned()));
        }
        let mut restore = Restore::new(&mut self.device);
        while !restore.add_record(saved::decode(receive(socket, &mut buffer)?)?)? {}
        self.shared.local_drops.add_counts(restore.other_drops());
        send(socket, RESTORED)?;
        expect(socket, YOURS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::helper::Helper;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::thread;
    use wgsep_ipc::{Channel, LogLevel, Startup};
    use wgsep_proto::{AllowedIp, AllowedIpChange, Configuration, PeerConfiguration, PublicKey};

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC;
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
    }

    fn control() -> Box<Control> {
        let startup = Startup {
            interface: "wg0".to_owned(),
            workers: 1,
            udp_gso: true,
            avx512: true,
            log_level: LogLevel::Silent,
            listen_port: 0,
            lowest_port: 1,
            highest_port: 65_535,
            fwmark: 0,
            listens_everywhere: true,
            bind_device: String::new(),
        };
        // Nobody answers at the other end.
        let channel = Channel::new(pair().0).unwrap();
        Control::new(Helper::new(channel), startup, None).unwrap()
    }

    /// One with some peers and counters.
    fn old() -> Box<Control> {
        let mut control = control();
        let peer = |number: u8| {
            let mut peer = PeerConfiguration::new(PublicKey::from_bytes([number; 32]));
            let allowed_ip = AllowedIp::new([10, 0, 0, number].into(), 32).unwrap();
            peer.allowed_ips.push(AllowedIpChange { allowed_ip, remove: false });
            peer
        };
        let peers = (1..=5).map(peer).collect();
        control.device.configure(Configuration { peers, ..Configuration::default() });
        control
    }

    /// Passes messages on between two sockets, `most` at most; then both ends see the other closed.
    fn relay(sockets: &[OwnedFd; 2], most: usize) {
        let mut buffer = vec![0; MAX_RECORD_LEN + 1];
        let mut passed = 0;
        while passed < most {
            let mut ready =
                sockets.each_ref().map(|one| PollFd::new(one.as_fd(), PollFlags::POLLIN));
            poll(&mut ready, PollTimeout::NONE).unwrap();
            let from = usize::from(!ready[0].any().unwrap());
            match read(&sockets[from], &mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(len) => {
                    let _gone = write(&sockets[1 - from], &buffer[..len]);
                    passed += 1;
                }
            }
        }
    }

    /// Hands over through a relay that passes `most` messages; whether the old one has given everything away, and
    /// whether the new one may start.
    fn hand_over(most: usize) -> (bool, bool) {
        let ((old_end, old_relay), (new_end, new_relay)) = (pair(), pair());
        thread::scope(|scope| {
            scope.spawn(move || relay(&[old_relay, new_relay], most));
            let restored = scope.spawn(move || {
                let mut new = control();
                let restored = new.restore(new_end.as_fd()).is_ok();
                assert!(!restored || new.device.endpoints(None).count() == 5);
                restored
            });
            let mut old = old();
            let given = old.give_away(old_end.as_fd()).is_ok();
            drop(old_end);
            (given, restored.join().unwrap())
        })
    }

    #[test]
    fn wherever_a_hand_over_is_cut_at_most_one_of_the_two_goes_on() {
        assert_eq!(hand_over(usize::MAX), (true, true));
        let (mut went_on, mut most) = (0, 0);
        loop {
            match hand_over(most) {
                (true, true) => break,
                // The old one goes on, and the new one has not started.
                (false, false) => went_on += 1,
                // What crosses with the end is lost, and the tunnel with it. Nothing is sealed by either.
                (true, false) => {}
                (false, true) => panic!("both go on after {most} messages"),
            }
            most += 1;
        }
        // The version, the interface, five peers with their allowed IPs, and the end.
        assert!(went_on >= 13, "{went_on}");
    }

    #[test]
    fn a_state_of_another_version_or_none_is_refused() {
        for messages in [
            vec![],
            vec![vec![0]],
            vec![(saved::VERSION + 1).to_le_bytes().to_vec()],
            vec![saved::VERSION.to_le_bytes().to_vec(), vec![0xff; 100]],
            vec![saved::VERSION.to_le_bytes().to_vec(), vec![0; MAX_RECORD_LEN + 1]],
        ] {
            let (ours, theirs) = pair();
            for message in &messages {
                write(&theirs, message).unwrap();
            }
            drop(theirs);
            assert!(control().restore(ours.as_fd()).is_err(), "{} messages", messages.len());
        }
    }
}
