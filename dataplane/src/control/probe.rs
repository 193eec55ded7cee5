//! Whether the interface is up, asked of the TUN device itself: for where rtnetlink does not tell.
//!
//! A TUN device that is down is not writable (kernel tun.c, tun_sock_writeable). It says so only when
//! asked, so somebody has to ask now and then.

use crate::tun::Tun;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Milliseconds between two questions.
pub(super) const PROBE_INTERVAL: u16 = 1000;

/// An epoll instance of one descriptor, made before the sandbox closes.
pub(super) struct LinkProbe(Epoll);

impl LinkProbe {
    /// A probe of nothing yet.
    ///
    /// # Errors
    /// If the kernel gives no epoll instance.
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

    /// Whether the interface is up now.
    pub(super) fn is_up(&self) -> bool {
        let mut events = [EpollEvent::empty()];
        let ready = self.0.wait(&mut events, EpollTimeout::ZERO);
        ready == Ok(1) && events[0].events().contains(EpollFlags::EPOLLOUT)
    }
}
