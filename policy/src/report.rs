//! How each layer of a sandbox turned out.

use crate::TOO_MANY_IN_FLIGHT;
use crate::layers::{Layer, Process};
use crate::namespaces::KINDS;
use core::fmt;
use nix::unistd::{Pid, Uid};

/// How a layer turned out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// Not tried here.
    #[default]
    Absent,
    /// In force.
    Applied,
    /// Refused by the kernel with this errno; of namespaces, all but these, a bit for each of
    /// [`crate::namespaces::KINDS`].
    Degraded(u8, u8),
    /// This kernel does not have it.
    Unsupported,
}

impl State {
    /// Refused by the kernel.
    #[must_use]
    pub fn degraded(errno: nix::Error) -> Self {
        Self::Degraded(u8::try_from(errno as i32).unwrap_or(u8::MAX), 0)
    }

    /// The same, but for these kinds of namespaces.
    pub(crate) const fn but(self, entered: u8) -> Self {
        match self {
            Self::Degraded(errno, _) => Self::Degraded(errno, entered),
            other => other,
        }
    }
}

impl From<nix::Result<()>> for State {
    /// The state after a system call.
    fn from(result: nix::Result<()>) -> Self {
        result.map_or_else(Self::degraded, |()| Self::Applied)
    }
}

/// How every layer turned out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    states: [State; Layer::COUNT],
}

impl Report {
    /// Notes how a layer turned out.
    pub fn note(&mut self, layer: Layer, state: State) {
        self.states[layer as usize] = state;
    }

    /// How a layer turned out.
    #[must_use]
    pub const fn state(&self, layer: Layer) -> State {
        self.states[layer as usize]
    }

    /// Takes over the states that `later` has and this does not.
    pub fn merge(&mut self, later: &Self) {
        for (state, later) in self.states.iter_mut().zip(later.states) {
            if *state == State::Absent {
                *state = later;
            }
        }
    }

    /// The layers that a process should have and that are not in force.
    pub fn degraded(&self, process: Process) -> impl Iterator<Item = (Layer, State)> {
        let required = Layer::required_of(process);
        let states = required.map(|layer| (layer, self.state(layer)));
        states.filter(|(_, state)| *state != State::Applied)
    }

    /// Refuses a process without a layer that is in force by an earlier report, which is text as [`fmt::Display`] has it, each
    /// process in a line that begins with its name.
    ///
    /// # Errors
    /// A line that names each such layer, and what to do about it.
    pub fn refuse_lost(&self, process: Process, earlier: &str) -> Result<(), String> {
        let line = earlier.lines().find_map(|line| line.strip_prefix(process.name()));
        let words = line.unwrap_or_default().split(' ');
        let was_applied = |layer: Layer| {
            words.clone().any(|word| word.strip_prefix(layer.name()) == Some("=applied"))
        };
        let lost = self.degraded(process).filter(|(layer, _)| was_applied(*layer));
        let lost: Vec<_> = lost.map(|(layer, state)| format!("{} {state}", layer.name())).collect();
        let (name, names) = (process.name(), lost.join(", "));
        lost.is_empty().then_some(()).ok_or_else(|| format!(
            "the {name}'s sandbox would lose what the running daemon has: {names}; run it as that daemon was started, mostly as root with every capability and its limits, or restart the daemon"
        ))
    }

    /// Refuses a process with a layer degraded, as `--sandbox strict` does.
    ///
    /// # Errors
    /// A line that names each layer that is, and what to do about it.
    pub fn refuse_degraded(&self, process: Process) -> Result<(), String> {
        let name = |(layer, state): (Layer, State)| format!("{} {state}", layer.name());
        let degraded: Vec<_> = self.degraded(process).map(name).collect();
        if degraded.is_empty() {
            return Ok(());
        }
        let is_quota = |(layer, state): (Layer, State)| {
            layer == Layer::NoDescriptorsOut && state == State::degraded(nix::Error::ETOOMANYREFS)
        };
        let remedy = if self.degraded(process).all(is_quota) {
            TOO_MANY_IN_FLIGHT
        } else {
            "run as root on Linux 6.10 or later with Landlock, or without the option: wgsep audit says then what to do about each"
        };
        Err(format!(
            "--sandbox strict, and of the {}'s sandbox: {}; {remedy}",
            process.name(),
            degraded.join(", ")
        ))
    }

    /// Three bytes a layer: the state, then the two of [`State::Degraded`].
    #[must_use]
    pub fn to_bytes(&self) -> [[u8; 3]; Layer::COUNT] {
        self.states.map(|state| match state {
            State::Absent => [0, 0, 0],
            State::Applied => [1, 0, 0],
            State::Degraded(errno, entered) => [2, errno, entered],
            State::Unsupported => [3, 0, 0],
        })
    }

    /// What [`Self::to_bytes`] made; `None` for anything else.
    #[must_use]
    pub fn from_bytes(bytes: &[[u8; 3]; Layer::COUNT]) -> Option<Self> {
        let mut report = Self::default();
        for (state, bytes) in report.states.iter_mut().zip(bytes) {
            *state = match bytes {
                [0, 0, 0] => State::Absent,
                [1, 0, 0] => State::Applied,
                [2, errno, entered] => State::Degraded(*errno, *entered),
                [3, 0, 0] => State::Unsupported,
                _ => return None,
            };
        }
        Some(report)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("absent"),
            Self::Applied => f.write_str("applied"),
            Self::Degraded(errno, entered) => {
                write!(f, "degraded({:?}", nix::Error::from_raw(i32::from(*errno)))?;
                let missing = KINDS.iter().enumerate();
                let missing = missing.filter(|(bit, _)| *entered != 0 && entered >> bit & 1 == 0);
                for ((_, (name, _)), separator) in missing.zip(":++++".chars()) {
                    write!(f, "{separator}{name}")?;
                }
                f.write_str(")")
            }
            Self::Unsupported => f.write_str("unsupported"),
        }
    }
}

impl fmt::Display for Report {
    /// `limits=applied namespaces=degraded(EPERM:ipc+uts) …`, without what was not tried.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tried = Layer::all().zip(self.states);
        let mut separator = "";
        for (layer, state) in tried.filter(|(_, state)| *state != State::Absent) {
            write!(f, "{separator}{}={state}", layer.name())?;
            separator = " ";
        }
        Ok(())
    }
}

/// The sandboxes of both processes, as they turned out.
pub struct Sandboxes {
    /// Of the dataplane.
    pub dataplane: Report,
    /// Of the helper.
    pub helper: Report,
}

impl Sandboxes {
    fn both(&self) -> [(Process, &Report); 2] {
        [(Process::Dataplane, &self.dataplane), (Process::Helper, &self.helper)]
    }

    /// Members of a JSON object, each with a comma before it: the version, the dataplane's process and uid, and `sandbox`,
    /// which has an object for each process with a string for each layer that was tried.
    #[must_use]
    pub fn members(&self, version: &str, pid: Pid, uid: Uid) -> String {
        let layers = |report: &Report| {
            let tried =
                Layer::all().zip(report.states).filter(|(_, state)| *state != State::Absent);
            let members = tried.map(|(layer, state)| format!("\"{}\":\"{state}\"", layer.name()));
            members.collect::<Vec<_>>().join(",")
        };
        let both = self
            .both()
            .map(|(process, report)| format!("\"{}\":{{{}}}", process.name(), layers(report)));
        format!(
            ",\"version\":\"{version}\",\"pid\":{pid},\"uid\":{uid},\"sandbox\":{{{}}}",
            both.join(",")
        )
    }
}

impl fmt::Display for Sandboxes {
    /// `every layer in force`, or the degraded ones.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut degraded = self.both().into_iter().flat_map(|(process, report)| {
            let degraded = report.degraded(process);
            degraded.map(move |(layer, state)| (process.name(), layer.name(), state))
        });
        let Some((process, layer, state)) = degraded.next() else {
            return f.write_str("every layer in force");
        };
        write!(f, "not in force: {process}'s {layer} {state}")?;
        degraded.try_for_each(|(process, layer, state)| write!(f, ", {process}'s {layer} {state}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_survives_its_bytes_and_reads_as_a_line() {
        let mut report = Report::default();
        report.note(Layer::Limits, State::Applied);
        report.note(Layer::Namespaces, State::degraded(nix::Error::EPERM));
        report.note(Layer::Landlock, State::Unsupported);
        assert_eq!(Report::from_bytes(&report.to_bytes()), Some(report));
        let line = "limits=applied namespaces=degraded(EPERM) landlock=unsupported";
        assert_eq!(report.to_string(), line);
        let mut bytes = report.to_bytes();
        bytes[0][0] = 4;
        assert_eq!(Report::from_bytes(&bytes), None);
    }

    #[test]
    fn the_kinds_of_namespaces_that_are_missing_are_named() {
        for (entered, expected) in [
            (0, "degraded(EPERM)"),
            (0b1_0111, "degraded(EPERM:uts)"),
            (0b0_0010, "degraded(EPERM:mnt+ipc+uts+cgroup)"),
        ] {
            let state = State::degraded(nix::Error::EPERM).but(entered);
            assert_eq!(state.to_string(), expected);
            let mut report = Report::default();
            report.note(Layer::Namespaces, state);
            assert_eq!(Report::from_bytes(&report.to_bytes()), Some(report));
        }
    }

    #[test]
    fn what_was_not_tried_is_degraded_where_it_should_be() {
        let mut report = Report::default();
        for layer in Layer::required_of(Process::Helper) {
            assert!(report.degraded(Process::Helper).any(|(missing, _)| missing == layer));
            report.note(layer, State::Applied);
        }
        assert_eq!(report.degraded(Process::Helper).count(), 0);
        let [helper, dataplane] = [Process::Helper, Process::Dataplane]
            .map(|process| Layer::required_of(process).count());
        assert_eq!(report.degraded(Process::Dataplane).count(), dataplane - helper);
    }

    #[test]
    fn a_layer_is_lost_if_the_earlier_report_had_it_in_force() {
        let report = |missing: &[(Layer, State)]| {
            let mut report = Report::default();
            Layer::required_of(Process::Dataplane)
                .for_each(|layer| report.note(layer, State::Applied));
            missing.iter().for_each(|(layer, state)| report.note(*layer, *state));
            report
        };
        let degraded = (Layer::User, State::degraded(nix::Error::EPERM));
        let absent = (Layer::SecretMemory, State::Absent);
        let cases: [(&[_], &[_], &str); 5] = [
            (&[], &[], ""),
            (&[degraded], &[degraded], ""),
            (&[degraded], &[], ""),
            (&[absent], &[absent, degraded], "user degraded(EPERM)"),
            (&[], &[degraded, absent], "user degraded(EPERM), secret-memory absent"),
        ];
        for (before, after, lost) in cases {
            let earlier = format!("helper: user=applied\ndataplane: {}\n", report(before));
            let refused = report(after).refuse_lost(Process::Dataplane, &earlier);
            assert_eq!(refused.is_err(), !lost.is_empty(), "{earlier}");
            assert!(refused.is_ok() || refused.unwrap_err().contains(&format!(": {lost};")));
        }
        assert_eq!(report(&[degraded]).refuse_lost(Process::Dataplane, ""), Ok(()), "no report");
    }

    #[test]
    fn merging_keeps_what_was_known() {
        let (mut before, mut later) = (Report::default(), Report::default());
        let degraded = State::degraded(nix::Error::EPERM);
        before.note(Layer::User, degraded);
        later.note(Layer::User, State::Applied);
        later.note(Layer::Seccomp, State::Applied);
        before.merge(&later);
        assert_eq!(before.state(Layer::User), degraded);
        assert_eq!(before.state(Layer::Seccomp), State::Applied);
    }
}
