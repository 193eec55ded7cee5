//! Polls the TUN device for whether the interface is up, where rtnetlink sends no messages about it.
//!
//! A TUN device that is down is not writable (kernel tun.c, tun_sock_writeable). Going down causes no
//! event, so the state must be polled.

use crate::packets::tun::Tun;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Milliseconds between two polls.
pub(super) const PROBE_INTERVAL: u16 = 1000;

/// An epoll instance of one descriptor, created before the lock-down.
pub(super) struct LinkProbe(Epoll);

impl LinkProbe {
    /// Creates a probe that watches nothing yet.
    ///
    /// # Errors
    /// If the kernel refuses an epoll instance.
    pub(super) fn new() -> nix::Result<Self> {
        Ok(Self(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?))
    }

    /// Watches the device.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(super) fn watch(&self, tun: &Tun) -> nix::Result<()> {
        self.0.add(tun.probed(), EpollEvent::new(EpollFlags::EPOLLOUT, 0))
    }

    /// True if the interface is up now.
    pub(super) fn is_up(&self) -> bool {
        let mut events = [EpollEvent::empty()];
        let ready = self.0.wait(&mut events, EpollTimeout::ZERO);
        ready == Ok(1) && events[0].events().contains(EpollFlags::EPOLLOUT)
    }
}
