//! Serving the dataplane until one of the two ends.

use crate::requests::{LockedDown, Served};
use crate::state::{End, Monitor};
use crate::sys;
use nix::libc;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use std::ops::ControlFlow::{self, Break, Continue};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};
use wgsep_host::{BREACH, Ended, FAILURE, ended_child, poll};
use wgsep_ipc::Notice;
use wgsep_journal::{Level, Log};
use wgsep_upgrade::Successors;

/// How long the dataplane may take to end once asked to.
pub(crate) const GRACE: Duration = Duration::from_millis(500);
/// The same of one that has said goodbye, on a busy machine.
const LAST_GRACE: Duration = Duration::from_secs(5);

/// Reads of the log's pipe at the end: each takes 4 KiB of the 64 that it holds, unless less was written.
const LAST_READS: usize = 64;

impl Monitor {
    /// Serves until the end, and ends the dataplane; the exit status, 0 for an orderly end.
    pub fn serve(mut self) -> u8 {
        let end = loop {
            match self.turn(Duration::MAX) {
                Continue(None) => {}
                Continue(Some(_)) => break violation("a second LockedDown"),
                Break(end) => break end,
            }
        };
        if self.has_handed_over() {
            return self.retire();
        }
        let (status, why) = match end {
            End::Orderly(why) => (0, why.to_owned()),
            End::Failed(status, why) => (status, why),
        };
        let is_orderly = status == 0;
        self.manager.stopping(&why);
        if status == BREACH {
            self.manager.remove_queues();
        }
        if is_orderly {
            let _already_gone = self.requests.notice(&Notice::Shutdown);
            let _either_way = self.has_ended(GRACE);
        }
        self.kill();
        let level = if is_orderly { Level::Info } else { Level::Error };
        self.log.last_line(level, &format!("ended: {why}"));
        // Still an orderly end: it was requested, and a service manager must not restart it.
        if let Err(error) = self.socket_file.remove() {
            self.log.error(&error.to_string());
        }
        self.tell_end(status);
        status
    }

    /// Waits until something happens, and deals with it: that the dataplane reports its lock-down, and
    /// that the daemon ends, is up to the caller.
    pub(crate) fn turn(&mut self, wait: Duration) -> ControlFlow<End, Option<LockedDown>> {
        let (is_ping_due, until_ping) = self.manager.watchdog();
        if is_ping_due {
            self.requests.ping();
        }
        let wait = wait.min(until_ping).min(self.log.check_budget());
        let delay = self.requests.back_pressure();
        let wait = wait.min(delay.unwrap_or(wait));
        let pidfd = self.process.pidfd.as_fd();
        // Requests beyond the rate stay where they are.
        let channel = if delay.is_none() { self.requests.as_fd() } else { pidfd };
        let successor = self.successors.as_ref().and_then(Successors::source);
        let waiter = self.waiter.as_ref().map_or(pidfd, AsFd::as_fd);
        let [uevents, kernel_log] = self.generation.sources().map(|source| source.unwrap_or(pidfd));
        let sources = [
            uevents,
            kernel_log,
            self.process.log.as_fd(),
            self.signals.as_fd(),
            self.socket_file.watch(),
            waiter,
            successor.unwrap_or(pidfd),
            pidfd,
            channel,
        ];
        let polled = poll(sources, wait);
        let [uevent, kernel_line, log, signal, watch, waiter, successor, died, asked] = match polled
        {
            Ok(polled) => polled,
            Err(error) => return Break(End::Failed(FAILURE, error.to_string())),
        };
        // First: until the dataplane is notified, it uses keys that a copy of it has, too.
        if (uevent || kernel_line) && self.generation.has_changed() {
            self.announce_generation();
        }
        if log && !self.log.forward(self.process.log.as_fd()) {
            return Break(self.died());
        }
        if signal {
            self.signal()?;
        }
        if watch {
            self.watch_socket_file()?;
        }
        self.serve_helpers(waiter && !died, successor && !died)?;
        if asked && delay.is_none() {
            match self.requests.serve() {
                // Before a signal, which the next helper is then sent.
                Served::Answered if self.has_handed_over() => return Break(End::Orderly("Bye")),
                Served::Answered => {
                    self.log_missing_gro();
                    self.report_port();
                }
                Served::Alive => self.is_alive(),
                Served::LockedDown(sequence, report) => return Continue(Some((sequence, report))),
                Served::Closed => return Break(self.died()),
                Served::Failed(line) => return Break(End::Failed(FAILURE, line)),
                Served::Violation(what) => return Break(violation(&what)),
            }
        }
        if died { Break(self.died()) } else { Continue(None) }
    }

    fn log_missing_gro(&mut self) {
        if let Some(line) = self.missing_gro.take_if(|_| self.requests.lack_gro()) {
            self.log.info(&line);
        }
    }

    /// The service manager's status has a port that is not open for as long as that is so.
    fn report_port(&mut self) {
        self.manager.trouble(self.requests.lacking_port().map(|(port, errno)| {
            format!("UDP port {port} cannot be opened: {}; tried again until it is", errno.desc())
        }));
    }

    // ------------------------------------------------------------ the end

    /// Gives the dataplane some time to end by itself; true if it has.
    pub(crate) fn has_ended(&self, within: Duration) -> bool {
        poll([self.process.pidfd.as_fd()], within).is_ok_and(|[gone]| gone)
    }

    /// Waits until a dataplane that has handed everything over has ended.
    pub(crate) fn end_dataplane(&mut self) {
        let _either_way = self.has_ended(LAST_GRACE);
        self.kill();
    }

    /// Makes sure that it is gone, and passes on its last words. Where the launcher has no CAP_KILL it
    /// may outlive this, until it sees that its channel is closed.
    fn kill(&mut self) {
        let pidfd = self.process.pidfd.as_fd();
        let _already_gone = sys::kill(pidfd);
        let _either_way = self.has_ended(GRACE);
        let _reaped = waitid(Id::PIDFd(pidfd), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
        forward_last_lines(&mut self.log, self.process.log.as_fd());
    }

    /// The dataplane has ended, or has closed its channel or its log. How it ended counts for more than what
    /// it said before.
    pub(crate) fn died(&mut self) -> End {
        let soon = self.has_ended(GRACE);
        let said_bye = self.requests.said_bye();
        let has_ended = soon || (said_bye && self.has_ended(LAST_GRACE));
        let _already_gone = sys::kill(self.process.pidfd.as_fd());
        if !has_ended {
            return violation("it closed its channel or its log");
        }
        let what = match self.status().map(|ended| (ended.how, ended.status)) {
            Some((libc::CLD_EXITED, 0)) if said_bye => {
                return End::Orderly("the interface was deleted");
            }
            Some((libc::CLD_EXITED, status)) => {
                format!("the dataplane exited with status {status}")
            }
            Some((_, libc::SIGKILL)) => {
                "the dataplane was killed by SIGKILL (from outside, or for lack of memory: see dmesg)".to_owned()
            }
            Some((_, libc::SIGSYS)) => {
                let what = "the dataplane was killed by SIGSYS, for a system call that its filter forbids; it may be under attack, see SECURITY.md";
                return End::Failed(BREACH, self.with_reason(what));
            }
            Some((_, libc::SIGXCPU)) => {
                "the dataplane was killed by SIGXCPU: it had the processor time of its limit; raise that (ulimit -t, LimitCPU= of a unit)".to_owned()
            }
            Some((_, number)) => Signal::try_from(number).map_or_else(
                |_| format!("the dataplane was killed by real-time signal {number}"),
                |signal| format!("the dataplane was killed by {signal}"),
            ),
            None => "the dataplane is gone".to_owned(),
        };
        End::Failed(FAILURE, self.with_reason(&what))
    }

    /// What happened to the dataplane, with the error that it logged before, if any.
    pub(crate) fn with_reason(&mut self, what: &str) -> String {
        forward_last_lines(&mut self.log, self.process.log.as_fd());
        match self.log.reason() {
            Some(error) if error.contains("; ") => format!("{what}: {error}"),
            Some(error) => {
                format!("{what}: {error}; raise the limits it was started with, or report it")
            }
            None if what.contains("; ") => what.to_owned(),
            None => format!("{what}; start it again, and report it unless you did that"),
        }
    }

    /// How it ended. A tracer is notified first, and this process a moment later.
    fn status(&self) -> Option<Ended> {
        let began = Instant::now();
        loop {
            match ended_child(Some(self.process.pidfd.as_fd())) {
                Ok(None) if began.elapsed() < GRACE => {
                    let _a_moment = poll([], Duration::from_millis(5));
                }
                ended => return ended.ok().flatten(),
            }
        }
    }
}

impl Drop for Monitor {
    /// However we get here, no dataplane stays behind.
    fn drop(&mut self) {
        self.kill();
    }
}

/// Passes on what is left in the log's pipe, and no more than fits into it: a process that could not be
/// killed may go on writing.
fn forward_last_lines(log: &mut Log, pipe: BorrowedFd<'_>) {
    for _ in 0..LAST_READS {
        if !poll([pipe], Duration::ZERO).is_ok_and(|[waits]| waits) || !log.forward(pipe) {
            return;
        }
    }
}

fn violation(what: &str) -> End {
    let line = format!(
        "the dataplane broke the contract and was killed: {what}; it may be under attack, see SECURITY.md"
    );
    End::Failed(BREACH, line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::unistd::{pipe, write};
    use wgsep_journal::{Format, Sink};

    #[test]
    fn last_lines_end_though_the_process_keeps_writing() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let mut log = Log::new(Sink::Stream(null), Format::Text, wgsep_ipc::LogLevel::Silent);
        let (reader, writer) = pipe().unwrap();
        fcntl(&writer, FcntlArg::F_SETPIPE_SZ(1 << 20)).unwrap();
        assert_eq!(write(&writer, &vec![b'\n'; 1 << 20]), Ok(1 << 20));
        forward_last_lines(&mut log, reader.as_fd());
        assert!(poll([reader.as_fd()], Duration::ZERO).unwrap() == [true], "all was read");
        // What an ordinary pipe holds is read to the end.
        let (reader, writer) = pipe().unwrap();
        assert_eq!(write(&writer, &[b'\n'; 65_536]), Ok(65_536));
        forward_last_lines(&mut log, reader.as_fd());
        assert!(poll([reader.as_fd()], Duration::ZERO).unwrap() == [false]);
    }
}
