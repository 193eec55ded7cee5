//! Being replaced by another helper, and replacing one; what passes between the two is in the crate `upgrade`.

use crate::state::{End, Monitor};
use crate::udp::UdpSockets;
use std::net::UdpSocket;
use std::ops::ControlFlow::{self, Break, Continue};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use wgsep_host::{Error, FAILURE, Result};
use wgsep_ipc::upgrade::{FromSuccessor, OpenUdp};
use wgsep_upgrade::{
    Have, Predecessor, Successors, TIMEOUT, UNLIMITED, passed_on, stand_in, wait_for_manager,
};

impl Monitor {
    // ------------------------------------------------------------ the helper that is replaced

    /// Deals with a helper that is to replace this one.
    fn serve_successor(&mut self) {
        let Self { successors, log, manager, waiter, requests, socket_file, is_restored, .. } =
            self;
        let Some(successors) = successors else { return };
        // A ping's answer would be taken for that of the hand-over.
        if requests.has_pinged {
            return;
        }
        let (waiter, user, is_restored) = (waiter.as_ref(), socket_file.user(), *is_restored);
        let state = successors.serve(&Have { log, manager, waiter, user, is_restored });
        if let Some(state) = state {
            requests.has_pinged = requests.channel.send_hand_over(state.as_fd()).is_ok();
            if !requests.has_pinged {
                successors.kept_on();
            }
        }
    }

    /// The dataplane serves: if it was to hand over, it has not.
    pub(crate) fn is_alive(&mut self) {
        self.manager.alive();
        if let Some(successors) = &mut self.successors {
            successors.dataplane_serves();
        }
    }

    /// Whether another pair has everything.
    pub(crate) fn has_handed_over(&self) -> bool {
        self.requests.said_bye && self.successors.as_ref().is_some_and(Successors::is_awaited)
    }

    /// Ends after everything was handed over, or stays if the parent of this process waits for its end; the exit status.
    pub(crate) fn retire(mut self) -> u8 {
        let mut is_announced = false;
        if let Some(successors) = &self.successors {
            is_announced = self.waiter.is_some() || successors.announce(&self.manager);
            let udp = self.requests.sockets.take();
            let descriptors: Vec<_> = udp.iter().flat_map(UdpSockets::descriptors).collect();
            let state = udp.as_ref().map(|udp| (udp.port, udp.mark, udp.joins));
            successors.hand_over(state, &descriptors);
        }
        self.end_dataplane();
        self.socket_file.leave();
        let Some((pid, stays)) = self.successors.take().map(Successors::retire) else {
            return FAILURE;
        };
        self.log.info(&format!("process {pid} has taken over"));
        if let Some(channel) = stays {
            return stand_in(&channel, &self.signals, || self.reap_orphans());
        }
        if self.waiter.is_none() {
            wait_for_manager(&self.manager, pid, is_announced);
        }
        0
    }

    // ------------------------------------------------------------ the new helper

    /// Has the helper before this one hand over, and waits until the dataplane has everything.
    ///
    /// # Errors
    /// If that does not within [`TIMEOUT`], or the dataplane or this process is to end.
    pub(crate) fn take_over(&mut self, mut predecessor: Predecessor) -> Result<()> {
        predecessor.ask().map_err(|_| {
            Error::new("the daemon ended before it could be replaced; start wgsep again")
        })?;
        let late = "the tunnel was not handed over within 15 s";
        let is_there = |monitor: &Self, _| (!monitor.requests.has_pinged).then_some(());
        let deadline = Instant::now() + TIMEOUT;
        self.wait_until(TIMEOUT, late, is_there).or_else(|error| {
            // It may be stopped. No other pair has the tunnel then.
            let is_alone =
                Instant::now() >= deadline && predecessor.has_handed_over(Duration::ZERO);
            if is_alone { self.wait_until(UNLIMITED, late, is_there) } else { Err(error) }
        })?;
        if let Some((OpenUdp { port, mark, joins, .. }, sockets)) = predecessor.udp() {
            // It is not new: the dataplane may have it again at once.
            self.requests.new_ports.opened(port, Instant::now());
            let sockets = sockets.into_iter().map(UdpSocket::from).collect();
            self.requests.sockets = Some(UdpSockets { sockets, port, mark, joins });
        }
        (self.manager, self.waiter) = predecessor.replaced(&mut self.socket_file);
        Ok(())
    }

    /// Deals with a helper that waits for the end of this one, and with one that is to replace it.
    pub(crate) fn serve_helpers(&mut self, waiter: bool, successor: bool) -> ControlFlow<End> {
        if successor {
            self.serve_successor();
        }
        if waiter { self.serve_waiter() } else { Continue(()) }
    }

    /// Tells the helper that waits for it of the end.
    pub(crate) fn tell_end(&self, status: u8) {
        if let Some(waiter) = &self.waiter {
            let _it_has_ended = waiter.tell_predecessor(&FromSuccessor::Ended(status));
        }
    }

    /// Deals with what a helper says that waits for the end of this one.
    fn serve_waiter(&mut self) -> ControlFlow<End> {
        match self.waiter.as_ref().map_or(Ok(None), passed_on) {
            Ok(Some(signal)) => self.deal_with(signal),
            Ok(None) => Continue(()),
            // As with the other processes of the daemon: none outlives another.
            Err(_) => Break(End::Failed(
                FAILURE,
                "the process that was started first is gone; start it again".to_owned(),
            )),
        }
    }
}
