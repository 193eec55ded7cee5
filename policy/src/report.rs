//! How each layer of a sandbox turned out.

use core::fmt;

/// A layer of the dataplane's confinement, in the order in which they close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Layer {
    /// No core file, few descriptors, no file growth.
    Limits,
    /// A user namespace of its own, where the launcher's privileges do not suffice for the rest.
    UserNamespace,
    /// Mount, network, IPC and UTS namespaces of its own, with nothing in them.
    Namespaces,
    /// An empty, read-only root directory.
    EmptyRoot,
    /// No capability can come back: bounding and ambient sets empty.
    BoundingSet,
    /// Uid 0 gives no capability, for good.
    SecureBits,
    /// A uid of its own, no groups.
    User,
    /// No capability in any set.
    Capabilities,
    /// No descriptor can be sent over a unix socket.
    NoDescriptorsOut,
    /// Executing a file gains nothing.
    NoNewPrivs,
    /// Dies with the helper.
    DeathSignal,
    /// Not traceable by its own uid, no core.
    NonDumpable,
    /// Its memory cannot be read by other processes of the user it runs as.
    Untraceable,
    /// No file can be opened, whatever the path.
    Landlock,
    /// Keys in memory that neither root nor a core file can read.
    SecretMemory,
    /// Code, constants and relocated data stay mapped as they are, and secret memory where it is.
    SealedMemory,
    /// No process or thread can be started.
    NoProcesses,
    /// Only the system calls of the filter, on every thread.
    Seccomp,
    /// No descriptor can be received from a UAPI client.
    NoDescriptorsIn,
}

impl Layer {
    /// Every layer.
    pub const ALL: [Self; 19] = [
        Self::Limits,
        Self::UserNamespace,
        Self::Namespaces,
        Self::EmptyRoot,
        Self::BoundingSet,
        Self::SecureBits,
        Self::User,
        Self::Capabilities,
        Self::NoDescriptorsOut,
        Self::NoNewPrivs,
        Self::DeathSignal,
        Self::NonDumpable,
        Self::Untraceable,
        Self::Landlock,
        Self::SecretMemory,
        Self::SealedMemory,
        Self::NoProcesses,
        Self::Seccomp,
        Self::NoDescriptorsIn,
    ];

    /// Those that the dataplane should have. Its own user namespace is only a means to the others, and most
    /// kernels in use are older than what refuses descriptors from UAPI clients.
    pub const DATAPLANE: &[Self] = &[
        Self::Limits,
        Self::Namespaces,
        Self::EmptyRoot,
        Self::BoundingSet,
        Self::SecureBits,
        Self::User,
        Self::Capabilities,
        Self::NoDescriptorsOut,
        Self::NoNewPrivs,
        Self::DeathSignal,
        Self::NonDumpable,
        Self::Untraceable,
        Self::Landlock,
        Self::SecretMemory,
        Self::SealedMemory,
        Self::NoProcesses,
        Self::Seccomp,
    ];

    /// Those that the helper should have.
    pub const HELPER: &[Self] = &[
        Self::Limits,
        Self::BoundingSet,
        Self::SecureBits,
        Self::Capabilities,
        Self::NoNewPrivs,
        Self::NonDumpable,
        Self::Landlock,
        Self::SealedMemory,
        Self::Seccomp,
    ];

    /// True for the layers without which wgsep refuses to run.
    #[must_use]
    pub const fn is_mandatory(self) -> bool {
        matches!(
            self,
            Self::Limits
                | Self::Capabilities
                | Self::NoNewPrivs
                | Self::NonDumpable
                | Self::Seccomp
        )
    }

    /// Its name in logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Limits => "limits",
            Self::UserNamespace => "user-namespace",
            Self::Namespaces => "namespaces",
            Self::EmptyRoot => "empty-root",
            Self::BoundingSet => "bounding-set",
            Self::SecureBits => "securebits",
            Self::User => "user",
            Self::Capabilities => "capabilities",
            Self::NoDescriptorsOut => "no-fd-out",
            Self::NoNewPrivs => "no-new-privs",
            Self::DeathSignal => "death-signal",
            Self::NonDumpable => "non-dumpable",
            Self::Untraceable => "untraceable",
            Self::Landlock => "landlock",
            Self::SecretMemory => "secret-memory",
            Self::SealedMemory => "sealed-memory",
            Self::NoProcesses => "no-processes",
            Self::Seccomp => "seccomp",
            Self::NoDescriptorsIn => "no-fd-in",
        }
    }
}

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
    states: [State; Layer::ALL.len()],
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

    /// Takes over what `later` knows and this does not.
    pub fn merge(&mut self, later: &Self) {
        for (state, later) in self.states.iter_mut().zip(later.states) {
            if *state == State::Absent {
                *state = later;
            }
        }
    }

    /// Those of `layers` that are not in force.
    pub fn degraded(&self, layers: &'static [Layer]) -> impl Iterator<Item = (Layer, State)> {
        let states = layers.iter().map(|layer| (*layer, self.state(*layer)));
        states.filter(|(_, state)| *state != State::Applied)
    }

    /// Three bytes a layer: kind, then errno, little-endian.
    #[must_use]
    pub fn to_bytes(&self) -> [[u8; 3]; Layer::ALL.len()] {
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
    pub fn from_bytes(bytes: &[[u8; 3]; Layer::ALL.len()]) -> Option<Self> {
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
        let tried = Layer::ALL.into_iter().zip(self.states);
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
    fn layers_are_numbered_in_their_order() {
        for (number, layer) in Layer::ALL.into_iter().enumerate() {
            assert_eq!(layer as usize, number);
        }
    }

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
        for layer in Layer::HELPER {
            assert!(report.degraded(Layer::HELPER).any(|(missing, _)| missing == *layer));
            report.note(*layer, State::Applied);
        }
        assert_eq!(report.degraded(Layer::HELPER).count(), 0);
        let missing = Layer::DATAPLANE.len() - Layer::HELPER.len();
        assert_eq!(report.degraded(Layer::DATAPLANE).count(), missing);
        for layer in Layer::ALL.into_iter().filter(|layer| layer.is_mandatory()) {
            assert!(Layer::HELPER.contains(&layer) && Layer::DATAPLANE.contains(&layer));
        }
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
