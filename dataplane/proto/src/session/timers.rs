//! The five timers of a peer and the events that move them (kernel timers.c, names included).
//!
//! Workers arm and cancel timers as packets pass, so the deadlines are atomics. The control thread
//! examines a peer when its earliest deadline is due. A worker wakes it only if it arms a timer that
//! expires before the next examination. Cancelling or postponing a timer needs no wake-up, because the
//! control thread finds the later deadline when it examines the peer.

#[cfg(feature = "internals")]
use crate::saved;
use crate::session::keypair::REJECT_AFTER_TIME;
use crate::time::Instant;
use crate::timer_parameters::TimerParameters;
use core::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use core::time::Duration;

/// Least time between two initiations to a peer, and the time until one is repeated.
pub const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum of the jitter that is added to [`REKEY_TIMEOUT`].
pub const REKEY_TIMEOUT_JITTER_MAX: Duration = Duration::from_millis(333);
/// Time for which initiations are repeated.
pub const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// Repetitions before giving up, if no other [`TimerParameters`] are set: 90 s of one every 5 s, and the one that ends
/// it; with the first initiation that makes 20.
pub const MAX_HANDSHAKE_RETRIES: u32 = 19;
/// Time after receiving data until a keepalive, if nothing else was sent.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Age of a keypair at which its initiator, on receiving, starts a handshake to replace it.
pub const RECEIVE_REKEY_AGE: Duration =
    REJECT_AFTER_TIME.saturating_sub(KEEPALIVE_TIMEOUT).saturating_sub(REKEY_TIMEOUT);
/// Time after the last session began until all keys are erased.
pub const ZERO_KEY_MATERIAL_TIME: Duration = REJECT_AFTER_TIME.saturating_mul(3);

/// The five timers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// An initiation was not answered, or had to wait.
    RetransmitHandshake,
    /// Data was received and nothing sent since.
    SendKeepalive,
    /// Data was sent and nothing received since.
    NewHandshake,
    /// No session began for long.
    ZeroKeyMaterial,
    /// The persistent keepalive is due.
    PersistentKeepalive,
}

impl Timer {
    /// All five, in the order in which those due at the same time expire: after a suspension, what
    /// is old is erased before anything new begins.
    pub const ALL: [Self; 5] = [
        Self::ZeroKeyMaterial,
        Self::RetransmitHandshake,
        Self::SendKeepalive,
        Self::NewHandshake,
        Self::PersistentKeepalive,
    ];
}

/// Deadline of a timer that is not pending.
const IDLE: u64 = u64::MAX;

/// The timers of one peer.
pub struct Timers {
    deadlines: [AtomicU64; Timer::ALL.len()],
    /// When the control thread examines this peer next; [`IDLE`] if no timer is pending.
    examined_at: AtomicU64,
    /// Random nanoseconds, at most [`REKEY_TIMEOUT_JITTER_MAX`], renewed at each examination.
    jitter: AtomicU64,
    need_another_keepalive: AtomicBool,
    persistent_keepalive_interval: AtomicU16,
    handshake_attempts: AtomicU32,
    sent_lastminute_handshake: AtomicBool,
    /// Boot time in nanoseconds; 0 before the first.
    last_sent_handshake: AtomicU64,
    parameters: Parameters,
}

/// The [`TimerParameters`], in nanoseconds. They are read where a timer is armed, not for each packet.
struct Parameters {
    rekey_after_time: AtomicU64,
    rekey_timeout: AtomicU64,
    keepalive_timeout: AtomicU64,
    max_handshake_retries: AtomicU32,
}

impl Parameters {
    fn new(parameters: &TimerParameters) -> Self {
        Self {
            rekey_after_time: AtomicU64::new(nanoseconds(parameters.rekey_after_time())),
            rekey_timeout: AtomicU64::new(nanoseconds(parameters.rekey_timeout())),
            keepalive_timeout: AtomicU64::new(nanoseconds(parameters.keepalive_timeout())),
            max_handshake_retries: AtomicU32::new(parameters.max_handshake_retries()),
        }
    }

    fn set(&self, parameters: &TimerParameters) {
        let Self { rekey_after_time, rekey_timeout, keepalive_timeout, max_handshake_retries } =
            self;
        let new = Self::new(parameters);
        rekey_after_time.store(new.rekey_after_time.into_inner(), Ordering::Relaxed);
        rekey_timeout.store(new.rekey_timeout.into_inner(), Ordering::Relaxed);
        keepalive_timeout.store(new.keepalive_timeout.into_inner(), Ordering::Relaxed);
        max_handshake_retries.store(new.max_handshake_retries.into_inner(), Ordering::Relaxed);
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            deadlines: core::array::from_fn(|_| AtomicU64::new(IDLE)),
            examined_at: AtomicU64::new(IDLE),
            jitter: AtomicU64::new(0),
            need_another_keepalive: AtomicBool::new(false),
            persistent_keepalive_interval: AtomicU16::new(0),
            handshake_attempts: AtomicU32::new(0),
            sent_lastminute_handshake: AtomicBool::new(false),
            last_sent_handshake: AtomicU64::new(0),
            parameters: Parameters::new(&TimerParameters::default()),
        }
    }
}

/// Whether the control thread must examine the peer's timers earlier than scheduled.
#[must_use = "the timer would expire too late"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeedsReschedule(pub bool);

impl core::ops::BitOr for NeedsReschedule {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 || other.0)
    }
}

impl NeedsReschedule {
    /// The scheduled examination is early enough.
    pub const NONE: Self = Self(false);
}

// Deadlines and `examined_at` are written by one side and read by the other in the opposite order,
// so both need sequential consistency: either the worker sees that the next examination is in time, or
// the control thread sees the new deadline.
impl Timers {
    fn deadline(&self, timer: Timer) -> &AtomicU64 {
        &self.deadlines[timer as usize]
    }

    /// True if a timer is armed.
    #[must_use]
    pub fn is_pending(&self, timer: Timer) -> bool {
        self.deadline(timer).load(Ordering::SeqCst) != IDLE
    }

    fn arm(&self, timer: Timer, deadline: Instant) -> NeedsReschedule {
        let deadline = deadline.as_nanos();
        self.deadline(timer).store(deadline, Ordering::SeqCst);
        NeedsReschedule(deadline < self.examined_at.load(Ordering::SeqCst))
    }

    fn arm_unless_pending(&self, timer: Timer, deadline: Instant) -> NeedsReschedule {
        let deadline = deadline.as_nanos();
        let armed = self.deadline(timer).compare_exchange(
            IDLE,
            deadline,
            Ordering::SeqCst,
            Ordering::SeqCst,
        );
        NeedsReschedule(armed.is_ok() && deadline < self.examined_at.load(Ordering::SeqCst))
    }

    /// Cancels a timer. It reads first, because on the packet path the timer is mostly not pending and a
    /// write would take the cache line from the other threads.
    fn cancel(&self, timer: Timer) {
        if self.is_pending(timer) {
            self.deadline(timer).store(IDLE, Ordering::SeqCst);
        }
    }

    fn jitter(&self) -> Duration {
        Duration::from_nanos(self.jitter.load(Ordering::Relaxed))
    }

    /// Age at which the initiator of a keypair starts the next handshake.
    pub(crate) fn rekey_after_time(&self) -> Duration {
        Duration::from_nanos(self.parameters.rekey_after_time.load(Ordering::Relaxed))
    }

    fn rekey_timeout(&self) -> Duration {
        Duration::from_nanos(self.parameters.rekey_timeout.load(Ordering::Relaxed))
    }

    fn keepalive_timeout(&self) -> Duration {
        Duration::from_nanos(self.parameters.keepalive_timeout.load(Ordering::Relaxed))
    }

    // ------------------------------------------------------------ for the control thread

    /// Sets the times of timers that are armed, and of keypairs that are derived, from now on.
    pub(crate) fn set_parameters(&self, parameters: &TimerParameters) {
        self.parameters.set(parameters);
    }

    /// Sets the jitter of timers that are armed from now on.
    pub fn set_jitter(&self, random: u32) {
        let most = u64::try_from(REKEY_TIMEOUT_JITTER_MAX.as_nanos()).unwrap_or(0);
        self.jitter.store((u64::from(random) * most) >> 32, Ordering::Relaxed);
    }

    /// True if a timer is due, which is then no longer pending, so that it expires once.
    #[must_use]
    pub fn take_expired(&self, timer: Timer, now: Instant) -> bool {
        self.deadline(timer)
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |deadline| {
                (deadline <= now.as_nanos()).then_some(IDLE)
            })
            .is_ok()
    }

    /// Schedules the next examination at the earliest deadline, which is returned.
    #[must_use]
    pub fn schedule(&self) -> Option<Instant> {
        loop {
            let earliest = self.earliest();
            self.examined_at.store(earliest, Ordering::SeqCst);
            // A worker that armed a timer between the two lines above did not see the new value.
            if self.earliest() >= earliest {
                return (earliest != IDLE).then_some(Instant::from_nanos(earliest));
            }
        }
    }

    /// The timers for another process.
    #[cfg(feature = "internals")]
    pub(crate) fn save(&self) -> saved::Timers {
        saved::Timers {
            deadlines: Timer::ALL.map(|timer| self.deadline(timer).load(Ordering::SeqCst)),
            examined_at: self.examined_at.load(Ordering::SeqCst),
            jitter: self.jitter.load(Ordering::Relaxed),
            need_another_keepalive: self.need_another_keepalive.load(Ordering::Relaxed),
            persistent_keepalive_interval: self.persistent_keepalive_interval(),
            handshake_attempts: self.handshake_attempts.load(Ordering::Relaxed),
            sent_lastminute_handshake: self.sent_lastminute_handshake.load(Ordering::Relaxed),
            last_sent_handshake: self.last_sent_handshake.load(Ordering::Relaxed),
        }
    }

    /// Goes on with the timers that [`Self::save`] returned. Returns when they must be examined; `None` if none is
    /// pending.
    #[cfg(feature = "internals")]
    pub(crate) fn restore(&self, saved: &saved::Timers) -> Option<Instant> {
        for (timer, deadline) in Timer::ALL.into_iter().zip(saved.deadlines) {
            self.deadline(timer).store(deadline, Ordering::SeqCst);
        }
        self.jitter.store(saved.jitter, Ordering::Relaxed);
        self.need_another_keepalive.store(saved.need_another_keepalive, Ordering::Relaxed);
        self.persistent_keepalive_interval
            .store(saved.persistent_keepalive_interval, Ordering::Relaxed);
        self.handshake_attempts.store(saved.handshake_attempts, Ordering::Relaxed);
        self.sent_lastminute_handshake.store(saved.sent_lastminute_handshake, Ordering::Relaxed);
        self.last_sent_handshake.store(saved.last_sent_handshake, Ordering::Relaxed);
        let examined_at = saved.examined_at.min(self.earliest());
        self.examined_at.store(examined_at, Ordering::SeqCst);
        (examined_at != IDLE).then_some(Instant::from_nanos(examined_at))
    }

    fn earliest(&self) -> u64 {
        self.deadlines.iter().map(|deadline| deadline.load(Ordering::SeqCst)).min().unwrap_or(IDLE)
    }

    /// Cancels all timers and resets their state when the interface goes down or the peer is removed
    /// (kernel wg_timers_stop).
    pub fn stop(&self) {
        for timer in Timer::ALL {
            self.cancel(timer);
        }
        self.need_another_keepalive.store(false, Ordering::Relaxed);
        self.reset_last_sent_handshake();
    }

    /// Seconds between persistent keepalives, 0 for none.
    #[must_use]
    pub fn persistent_keepalive_interval(&self) -> u16 {
        self.persistent_keepalive_interval.load(Ordering::Relaxed)
    }

    /// Sets the interval. It applies from the next expiry of a pending timer on.
    pub fn set_persistent_keepalive_interval(&self, seconds: u16) {
        self.persistent_keepalive_interval.store(seconds, Ordering::Relaxed);
        if seconds == 0 {
            self.cancel(Timer::PersistentKeepalive);
        }
    }

    /// Allows an initiation at once, however recent the last.
    pub fn reset_last_sent_handshake(&self) {
        self.last_sent_handshake.store(0, Ordering::Relaxed);
    }

    /// Counts a repetition; `None` when there have been enough.
    #[must_use]
    pub fn count_handshake_attempt(&self) -> Option<u32> {
        let attempts = self.handshake_attempts.load(Ordering::Relaxed);
        if attempts >= self.parameters.max_handshake_retries.load(Ordering::Relaxed) {
            return None;
        }
        self.handshake_attempts.store(attempts + 1, Ordering::Relaxed);
        Some(attempts + 1)
    }

    /// Resets the count of repetitions, when there is a new reason for a handshake.
    pub fn reset_handshake_attempts(&self) {
        if self.handshake_attempts.load(Ordering::Relaxed) != 0 {
            self.handshake_attempts.store(0, Ordering::Relaxed);
        }
    }

    /// False within [`REKEY_TIMEOUT`], or the time that is set instead, of the last handshake message we sent.
    #[must_use]
    pub fn may_send_initiation(&self, now: Instant) -> bool {
        match self.last_sent_handshake.load(Ordering::Relaxed) {
            0 => true,
            last => now.since(Instant::from_nanos(last)) >= self.rekey_timeout(),
        }
    }

    /// True if a scheduled initiation should have been sent by now: [`REKEY_TIMEOUT`] and the most jitter
    /// after the last handshake message.
    #[must_use]
    pub fn is_initiation_overdue(&self, now: Instant) -> bool {
        match self.last_sent_handshake.load(Ordering::Relaxed) {
            0 => true,
            last => {
                let due = Instant::from_nanos(last).after(self.rekey_timeout());
                now >= due.after(REKEY_TIMEOUT_JITTER_MAX)
            }
        }
    }

    /// Records that an initiation or a response is sent now.
    pub fn record_handshake_sent(&self, now: Instant) {
        self.last_sent_handshake.store(now.as_nanos().max(1), Ordering::Relaxed);
    }

    /// True the first time after a completed handshake: the initiator replaces an old keypair early only
    /// once.
    #[must_use]
    pub fn take_lastminute_handshake(&self) -> bool {
        !self.sent_lastminute_handshake.load(Ordering::Relaxed)
            && !self.sent_lastminute_handshake.swap(true, Ordering::Relaxed)
    }

    /// Arms the keepalive timer again if data was received since it was armed.
    pub fn keepalive_expired(&self, now: Instant) -> NeedsReschedule {
        if self.need_another_keepalive.swap(false, Ordering::Relaxed) {
            self.arm(Timer::SendKeepalive, now.after(self.keepalive_timeout()))
        } else {
            NeedsReschedule::NONE
        }
    }

    /// Arms the timer that erases the keys, after all initiations went unanswered.
    pub fn handshake_given_up(&self, now: Instant) -> NeedsReschedule {
        self.cancel(Timer::SendKeepalive);
        self.arm_unless_pending(Timer::ZeroKeyMaterial, now.after(ZERO_KEY_MATERIAL_TIME))
    }

    // ------------------------------------------------------------ events, as the kernel names them

    /// A packet that is not a keepalive was sent.
    pub fn data_sent(&self, now: Instant) -> NeedsReschedule {
        if self.is_pending(Timer::NewHandshake) {
            return NeedsReschedule::NONE;
        }
        // The keepalive is the peer's, whose times are the whitepaper's or close to them.
        let deadline =
            now.after(KEEPALIVE_TIMEOUT).after(self.rekey_timeout()).after(self.jitter());
        self.arm_unless_pending(Timer::NewHandshake, deadline)
    }

    /// A packet that is not a keepalive was received.
    pub fn data_received(&self, now: Instant) -> NeedsReschedule {
        if self.is_pending(Timer::SendKeepalive) {
            if !self.need_another_keepalive.load(Ordering::Relaxed) {
                self.need_another_keepalive.store(true, Ordering::Relaxed);
            }
            return NeedsReschedule::NONE;
        }
        self.arm_unless_pending(Timer::SendKeepalive, now.after(self.keepalive_timeout()))
    }

    /// Anything authenticated was sent: data, keepalive or handshake.
    pub fn any_authenticated_packet_sent(&self) {
        self.cancel(Timer::SendKeepalive);
    }

    /// Anything authenticated was received.
    pub fn any_authenticated_packet_received(&self) {
        self.cancel(Timer::NewHandshake);
    }

    /// Anything authenticated was sent or received.
    pub fn any_authenticated_packet_traversal(&self, now: Instant) -> NeedsReschedule {
        match self.persistent_keepalive_interval() {
            0 => NeedsReschedule::NONE,
            seconds => self.arm(
                Timer::PersistentKeepalive,
                now.after(Duration::from_secs(u64::from(seconds))),
            ),
        }
    }

    /// An initiation was sent.
    pub fn handshake_initiated(&self, now: Instant) -> NeedsReschedule {
        self.arm(Timer::RetransmitHandshake, now.after(self.rekey_timeout()).after(self.jitter()))
    }

    /// We received a response, or the first packet that confirms ours.
    pub fn handshake_complete(&self) {
        self.cancel(Timer::RetransmitHandshake);
        self.handshake_attempts.store(0, Ordering::Relaxed);
        self.sent_lastminute_handshake.store(false, Ordering::Relaxed);
    }

    /// An initiation was wanted sooner after the last handshake message than [`REKEY_TIMEOUT`].
    pub fn handshake_postponed(&self) -> NeedsReschedule {
        let last = Instant::from_nanos(self.last_sent_handshake.load(Ordering::Relaxed));
        let deadline = last.after(self.rekey_timeout()).after(self.jitter());
        self.arm_unless_pending(Timer::RetransmitHandshake, deadline)
    }

    /// A keypair was derived.
    pub fn session_derived(&self, now: Instant) -> NeedsReschedule {
        self.arm(Timer::ZeroKeyMaterial, now.after(ZERO_KEY_MATERIAL_TIME))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(s: u64) -> Instant {
        Instant::from_nanos(s * 1_000_000_000)
    }

    #[test]
    fn the_constants_are_the_whitepapers() {
        assert_eq!(RECEIVE_REKEY_AGE, Duration::from_secs(165));
        assert_eq!(ZERO_KEY_MATERIAL_TIME, Duration::from_secs(540));
        assert_eq!(
            u64::from(MAX_HANDSHAKE_RETRIES),
            REKEY_ATTEMPT_TIME.as_secs() / REKEY_TIMEOUT.as_secs() + 1
        );
    }

    #[test]
    fn data_sent_arms_once_and_any_receive_clears_it() {
        let timers = Timers::default();
        assert_eq!(timers.data_sent(seconds(1)), NeedsReschedule(true));
        assert_eq!(timers.schedule(), Some(seconds(16)));
        assert_eq!(timers.data_sent(seconds(9)), NeedsReschedule::NONE);
        assert_eq!(timers.schedule(), Some(seconds(16)));
        timers.any_authenticated_packet_received();
        assert_eq!(timers.schedule(), None);
    }

    #[test]
    fn received_data_owes_one_keepalive_and_more_data_another() {
        let timers = Timers::default();
        assert_eq!(timers.data_received(seconds(1)), NeedsReschedule(true));
        assert_eq!(timers.schedule(), Some(seconds(11)));
        assert_eq!(timers.data_received(seconds(5)), NeedsReschedule::NONE);
        assert!(!timers.take_expired(Timer::SendKeepalive, seconds(10)));
        assert!(timers.take_expired(Timer::SendKeepalive, seconds(11)));
        assert!(!timers.take_expired(Timer::SendKeepalive, seconds(11)));
        let _first = timers.keepalive_expired(seconds(11));
        assert_eq!(timers.schedule(), Some(seconds(21)));
        timers.any_authenticated_packet_sent();
        let _second = timers.keepalive_expired(seconds(21));
        assert_eq!(timers.schedule(), None);
    }

    #[test]
    fn a_later_deadline_needs_no_examination_an_earlier_one_does() {
        let timers = Timers::default();
        let _armed = timers.data_received(seconds(1));
        assert_eq!(timers.schedule(), Some(seconds(11)));
        timers.any_authenticated_packet_sent();
        assert_eq!(timers.data_received(seconds(2)), NeedsReschedule::NONE);
        timers.set_persistent_keepalive_interval(3);
        assert_eq!(timers.any_authenticated_packet_traversal(seconds(2)), NeedsReschedule(true));
        assert_eq!(timers.schedule(), Some(seconds(5)));
        assert_eq!(timers.any_authenticated_packet_traversal(seconds(3)), NeedsReschedule::NONE);
    }

    #[test]
    fn the_jitter_is_0_to_333_ms() {
        let timers = Timers::default();
        for (random, most) in [(0, 0), (u32::MAX, 333_000_000)] {
            timers.set_jitter(random);
            let _armed = timers.handshake_initiated(seconds(1));
            let deadline = timers.schedule().unwrap();
            let jitter = deadline.since(seconds(6)).as_nanos();
            assert!(deadline >= seconds(6) && jitter <= most && jitter + 1 >= most);
        }
    }

    #[test]
    fn nineteen_retries_then_none_until_somebody_asks_again() {
        let timers = Timers::default();
        assert_eq!((0..).take_while(|_| timers.count_handshake_attempt().is_some()).count(), 19);
        timers.reset_handshake_attempts();
        assert_eq!(timers.count_handshake_attempt(), Some(1));
    }
}
