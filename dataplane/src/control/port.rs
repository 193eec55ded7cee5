//! Retries and error lines of a UDP port that cannot be opened while the interface is up.

use nix::libc;
use std::ops::RangeInclusive;
use std::time::Duration;
use wgsep_ipc::Reply;
use wgsep_policy::described;
use wgsep_proto::Instant;

/// Time from the first refusal to the next try, which doubles with each, up to [`last_retry`]; and always that of a port
/// that may be opened only later.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// Time between tries to open a port while the daemon that this one has replaced may not have closed it yet.
const NEXT_LOOK: Duration = Duration::from_millis(10);

/// The longest time between two tries. An address or interface to listen on is missing for as long as it is being
/// configured; a port may be another program's for good.
const fn last_retry(errno: i32) -> Duration {
    match errno {
        libc::EADDRNOTAVAIL | libc::ENODEV => Duration::from_secs(2),
        _ => Duration::from_secs(60),
    }
}

/// The errno of a new port that may be opened only later.
pub(super) const TOO_EARLY: i32 = match Reply::TOO_EARLY {
    Reply::Refused { errno } => errno,
    _ => unreachable!(),
};

/// What to do where neither the port nor the mark is the cause.
const FILTERED: &str = "allow socket(2), setsockopt(2), bind(2) and getsockname(2) in the filter of the container or unit that refuses one of them, or an option of theirs; or take a newer kernel";

/// The refusals of the port of an interface that is up.
#[derive(Default)]
pub(super) struct PortRetry(Option<Refused>);

struct Refused {
    errno: i32,
    interval: Duration,
    /// `None` while a try awaits its reply.
    due: Option<Instant>,
}

impl PortRetry {
    /// Records that the helper refused the port; true if it was not refused before, or for another reason.
    pub(super) fn refused(&mut self, errno: i32, now: Instant) -> bool {
        let is_news = self.0.as_ref().is_none_or(|before| before.errno != errno);
        let interval = match &self.0 {
            Some(before) if errno != TOO_EARLY && before.errno != TOO_EARLY => {
                before.interval.saturating_mul(2).min(last_retry(errno))
            }
            _ => FIRST_RETRY,
        };
        self.0 = Some(Refused { errno, interval, due: Some(now.after(interval)) });
        is_news
    }

    /// Records that another process is about to close the port. This is no refusal.
    pub(super) fn is_being_closed(&mut self, now: Instant) {
        let due = Some(now.after(NEXT_LOOK));
        self.0 = Some(Refused { errno: TOO_EARLY, interval: FIRST_RETRY, due });
    }

    /// Records that the port is open or the interface is down; true if the port was refused before, for another reason
    /// than that it was too early.
    pub(super) fn clear(&mut self) -> bool {
        self.0.take().is_some_and(|refused| refused.errno != TOO_EARLY)
    }

    /// When to try again.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.0.as_ref().and_then(|refused| refused.due)
    }

    /// True, once, when the time to try again has come.
    pub(super) fn take_due(&mut self, now: Instant) -> bool {
        let due = self.0.as_mut().map(|refused| &mut refused.due);
        due.is_some_and(|due| due.take_if(|due| *due <= now).is_some())
    }

    /// Tries again at once, unless it was too early, which no change of the configuration changes.
    pub(super) fn hasten(&mut self, now: Instant) {
        if let Some(refused) = self.0.as_mut().filter(|refused| refused.errno != TOO_EARLY) {
            refused.due = Some(now);
        }
    }

    /// Why it is not open, 0 if nothing was refused; EAGAIN if it was too early.
    pub(super) fn errno(&self) -> i32 {
        self.0.as_ref().map_or(0, |refused| refused.errno)
    }
}

/// The error line of a refused port, with cause and remedy; `granted` are the ports that the helper opens.
pub(super) fn refusal(
    port: u16,
    errno: i32,
    interface: &str,
    granted: &RangeInclusive<u16>,
) -> String {
    let why = described(nix::Error::from_raw(errno));
    let another = format!("choose another: wg set {interface} listen-port PORT");
    let remedy = match errno {
        libc::EADDRINUSE if port == 0 => {
            return format!(
                "no UDP port is free: {why}; widen net.ipv4.ip_local_port_range, or {another}"
            );
        }
        libc::EADDRINUSE => {
            format!("stop the program that has it (ss -ulpn sport = :{port}), or {another}")
        }
        libc::EACCES if granted.contains(&port) => {
            let with = match port {
                ..1024 => "",
                _ => "--allow-low-ports (or WGSEP_ALLOW_LOW_PORTS=1) and ",
            };
            format!(
                "a port below net.ipv4.ip_unprivileged_port_start takes CAP_NET_BIND_SERVICE; start wgsep again with {with}that capability: CapabilityBoundingSet= of wgsep@{interface}, the capabilities of a container, or setcap cap_net_admin,cap_net_bind_service+ep; or {another}"
            )
        }
        libc::EACCES => format!(
            "start wgsep with --allow-low-ports, WGSEP_ALLOW_LOW_PORTS=1 or --listen-port {port}, or {another}"
        ),
        libc::EPERM if port == 0 || granted.contains(&port) => format!(
            "choose a mark that --fwmark of wgsep allows (wg set {interface} fwmark MARK), and allow the mark (CAP_NET_ADMIN where the sockets are) and bind(2) (SocketBindAllow= of a unit) in the container or unit"
        ),
        libc::EPERM => format!(
            "choose a port and a mark that --listen-port and --fwmark of wgsep allow: wg set {interface} listen-port PORT fwmark MARK"
        ),
        libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM => {
            "free descriptors or memory of this machine".to_owned()
        }
        libc::ENOSYS => FILTERED.to_owned(),
        libc::EAFNOSUPPORT => "this machine has neither IPv4 nor IPv6, or not that of --listen-address".to_owned(),
        libc::EADDRNOTAVAIL => "no interface has one of the addresses of --listen-address; add it (ip address), or start wgsep again without it".to_owned(),
        libc::ENODEV => "there is no interface of the name in --bind-device; create it (ip link), or start wgsep again without the option".to_owned(),
        _ => wgsep_policy::remedy(nix::Error::from_raw(errno)).to_owned(),
    };
    format!("cannot open UDP port {port}: {why}; {remedy}")
}

/// As [`refusal`], of a mark.
pub(super) fn mark_refusal(mark: u32, errno: i32) -> String {
    let why = described(nix::Error::from_raw(errno));
    let remedy = match errno {
        libc::ENOSYS => FILTERED,
        _ => "choose a mark that --fwmark of wgsep allows, and give it CAP_NET_ADMIN",
    };
    format!("cannot mark the UDP sockets with {mark:#x}: {why}; {remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_tried_again_after_one_second_and_then_ever_later_up_to_a_minute() {
        let (mut retry, mut now) = (PortRetry::default(), Instant::from_nanos(1));
        assert!(!retry.take_due(now) && retry.next_timeout().is_none());
        let mut waited = Vec::new();
        for _ in 0..9 {
            retry.refused(libc::EADDRINUSE, now);
            let due = retry.next_timeout().unwrap();
            waited.push(due.since(now).as_secs());
            assert!(!retry.take_due(now));
            now = due;
            assert!(retry.take_due(now) && !retry.take_due(now), "one try");
            assert_eq!(retry.next_timeout(), None, "until it is answered");
        }
        assert_eq!(waited, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        retry.refused(libc::EADDRNOTAVAIL, now);
        assert_eq!(
            retry.next_timeout(),
            Some(now.after(Duration::from_secs(2))),
            "an address may come"
        );
        assert!(retry.clear() && !retry.clear());
        assert!(retry.refused(libc::EADDRINUSE, now));
        assert_eq!(retry.next_timeout(), Some(now.after(FIRST_RETRY)));
        retry.hasten(now);
        assert!(retry.take_due(now), "a set hastens it");
        assert!(retry.clear());
        retry.hasten(now);
        assert!(!retry.take_due(now), "nothing to try");
    }

    #[test]
    fn a_port_that_is_asked_for_too_early_is_tried_each_second() {
        let (mut retry, mut now) = (PortRetry::default(), Instant::from_nanos(1));
        for round in 0..12 {
            assert_eq!(retry.refused(TOO_EARLY, now), round == 0, "news once");
            retry.hasten(now);
            assert!(!retry.take_due(now), "a set does not hasten it");
            now = now.after(FIRST_RETRY);
            assert!(retry.take_due(now));
        }
        assert_eq!(retry.errno(), libc::EAGAIN);
        assert!(retry.refused(libc::EADDRINUSE, now));
        assert_eq!(retry.next_timeout(), Some(now.after(FIRST_RETRY)), "its first refusal");
        retry.refused(TOO_EARLY, now);
        assert!(!retry.clear(), "it was not refused");
    }

    #[test]
    fn a_port_that_is_being_closed_is_tried_again_soon_and_is_refused_only_later() {
        let (mut retry, mut now) = (PortRetry::default(), Instant::from_nanos(1));
        for _ in 0..3 {
            retry.is_being_closed(now);
            now = now.after(NEXT_LOOK);
            assert!(retry.take_due(now));
        }
        assert!(!retry.clear(), "it was not refused");
        retry.is_being_closed(now);
        assert!(retry.refused(libc::EADDRINUSE, now), "this is news");
        assert_eq!(retry.next_timeout(), Some(now.after(FIRST_RETRY)), "its first refusal");
    }

    #[test]
    fn a_refusal_is_news_once_and_again_for_another_reason() {
        let (mut retry, now) = (PortRetry::default(), Instant::from_nanos(1));
        assert!(retry.refused(libc::EADDRINUSE, now) && !retry.refused(libc::EADDRINUSE, now));
        assert_eq!(retry.errno(), libc::EADDRINUSE);
        assert!(retry.refused(libc::EPERM, now));
        assert!(retry.clear());
        assert_eq!(retry.errno(), 0);
    }

    #[test]
    fn the_line_names_the_port_the_cause_and_the_remedy() {
        let line = refusal(51820, libc::EADDRINUSE, "wg0", &(1024..=u16::MAX));
        assert_eq!(
            line,
            "cannot open UDP port 51820: Address already in use (EADDRINUSE); stop the program that has it \
             (ss -ulpn sport = :51820), or choose another: wg set wg0 listen-port PORT"
        );
        let any = refusal(0, libc::EADDRINUSE, "wg0", &(1024..=u16::MAX));
        assert!(any.starts_with("no UDP port is free: ") && any.contains("ip_local_port_range"));
        let of_port_53 = |granted| refusal(53, libc::EACCES, "wg0", &granted);
        for setting in ["--allow-low-ports", "WGSEP_ALLOW_LOW_PORTS=1", "--listen-port 53"] {
            assert!(of_port_53(1024..=u16::MAX).contains(setting), "{setting}");
        }
        let names = |line: &str, words: &[&str]| words.iter().all(|word| line.contains(word));
        let capability = ["CAP_NET_BIND_SERVICE", "wgsep@wg0", "cap_net_bind_service+ep"];
        assert!(names(&of_port_53(53..=53), &capability));
        assert!(!of_port_53(53..=53).contains("--allow-low-ports"));
        let high = refusal(5001, libc::EACCES, "wg0", &(5001..=5001));
        assert!(names(&high, &capability) && high.contains("--allow-low-ports"), "{high}");
        let filtered = refusal(5001, libc::ENOSYS, "wg0", &(1024..=u16::MAX));
        assert!(names(&filtered, &["getsockname(2)", "in the filter"]), "{filtered}");
        let pinned = refusal(1, libc::EPERM, "wg0", &(7..=7));
        assert!(pinned.contains("--listen-port and --fwmark"));
        for (port, granted) in [(7, 7..=7), (0, 7..=7), (51820, 1024..=u16::MAX)] {
            let marked = refusal(port, libc::EPERM, "wg0", &granted);
            assert!(names(&marked, &["--fwmark", "CAP_NET_ADMIN", "SocketBindAllow="]), "{marked}");
            assert!(!marked.contains("listen-port"), "{marked}");
        }
        for errno in [libc::EIO, libc::EINVAL, libc::EPROTONOSUPPORT] {
            let other = refusal(51820, errno, "wg0", &(1024..=u16::MAX));
            assert!(!other.contains("listen-port"), "{other}");
        }
        assert!(mark_refusal(7, libc::ENOSYS).contains("setsockopt(2)"));
        assert!(mark_refusal(7, libc::EPERM).contains("--fwmark"));
    }
}
