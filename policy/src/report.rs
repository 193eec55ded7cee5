//! How each layer of a sandbox turned out.

use crate::layers::{Layer, Process};
use core::fmt;

/// How a layer turned out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// Not tried here.
    #[default]
    Absent,
    /// In force.
    Applied,
    /// Refused by the kernel with this errno.
    Degraded(u16),
    /// This kernel does not have it.
    Unsupported,
}

impl State {
    /// Refused by the kernel.
    #[must_use]
    pub fn degraded(errno: nix::Error) -> Self {
        Self::Degraded(u16::try_from(errno as i32).unwrap_or(u16::MAX))
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

    /// Three bytes a layer: kind, then errno, little-endian.
    #[must_use]
    pub fn to_bytes(&self) -> [[u8; 3]; Layer::COUNT] {
        self.states.map(|state| {
            let (kind, errno) = match state {
                State::Absent => (0, 0),
                State::Applied => (1, 0),
                State::Degraded(errno) => (2, errno),
                State::Unsupported => (3, 0),
            };
            let [low, high] = u16::to_le_bytes(errno);
            [kind, low, high]
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
                [2, low, high] => State::Degraded(u16::from_le_bytes([*low, *high])),
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
            Self::Degraded(errno) => {
                write!(f, "degraded({:?})", nix::Error::from_raw(i32::from(*errno)))
            }
            Self::Unsupported => f.write_str("unsupported"),
        }
    }
}

impl fmt::Display for Report {
    /// `limits=applied namespaces=degraded(EPERM) …`, without what was not tried.
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
    fn merging_keeps_what_was_known() {
        let (mut before, mut later) = (Report::default(), Report::default());
        before.note(Layer::User, State::Degraded(1));
        later.note(Layer::User, State::Applied);
        later.note(Layer::Seccomp, State::Applied);
        before.merge(&later);
        assert_eq!(before.state(Layer::User), State::Degraded(1));
        assert_eq!(before.state(Layer::Seccomp), State::Applied);
    }
}
