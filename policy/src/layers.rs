//! The layers of the sandbox, one row each.
//!
//! How to add one:
//!
//! 1. A row in `layers!` below, in the order in which the layers close.
//! 2. Its number: `REPORT_LAYERS` in `ipc/src/message.rs`. Without it the dataplane does not compile.
//! 3. The code that applies it and notes how that turned out: in `policy/src/lib.rs`, `prepare_dataplane` before
//!    the program is executed, `Sandbox` on its threads, or `lock_down_helper`.
//! 4. If wgsep must not run without it: a comparison in `policy/src/proof.rs`.
//! 5. How `wgsep audit` sees it in force: `bin/wgsep/src/audit/findings.rs`; or `claimed_by` here, if the kernel shows it
//!    nowhere. What an operator can do where it is missing: `bin/wgsep/src/audit/remedies.rs`.
//! 6. Its name in `SEEN` or `CLAIMED` of `tests/system/audit.rs`, a test of it in `tests/attacks`, and a paragraph in
//!    `SECURITY.md` and wgsep-sandbox(7).

/// One of the two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// `wgsep`.
    Helper,
    /// `wgsep-dataplane`.
    Dataplane,
}

impl Process {
    /// Its name in logs and in the audit.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Helper => "helper",
            Self::Dataplane => "dataplane",
        }
    }
}

/// What there is to know of a layer besides how it turned out.
struct Row {
    layer: Layer,
    name: &'static str,
    /// The processes that should have it.
    required_of: &'static [Process],
    /// Whether wgsep refuses to run without it.
    is_mandatory: bool,
    /// The processes of which the kernel does not show whether it is in force, so that the audit has only the
    /// report.
    claimed_by: &'static [Process],
}

const NEITHER: &[Process] = &[];
const DATAPLANE: &[Process] = &[Process::Dataplane];
const HELPER: &[Process] = &[Process::Helper];
const BOTH: &[Process] = &[Process::Helper, Process::Dataplane];

/// The enumeration of the layers, and the table of what belongs to each.
macro_rules! layers {
    ($($(#[$doc:meta])* $layer:ident = $name:literal, $required_of:expr, $is_mandatory:expr,
        $claimed_by:expr;)*) => {
        /// A layer of the confinement, in the order in which they close.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Layer {
            $($(#[$doc])* $layer,)*
        }

        const TABLE: &[Row] = &[$(Row {
            layer: Layer::$layer,
            name: $name,
            required_of: $required_of,
            is_mandatory: $is_mandatory,
            claimed_by: $claimed_by,
        },)*];
    };
}

layers! {
    // Name, required of, mandatory, claimed by.

    /// No core file, few descriptors, no file growth.
    Limits = "limits", BOTH, true, NEITHER;
    /// A user namespace of its own, where the launcher's privileges do not suffice for the rest. It is only a
    /// means to others.
    UserNamespace = "user-namespace", NEITHER, false, NEITHER;
    /// Mount, network, IPC, UTS and cgroup namespaces of its own, with nothing in them.
    Namespaces = "namespaces", DATAPLANE, false, NEITHER;
    /// An empty, read-only root directory.
    EmptyRoot = "empty-root", DATAPLANE, false, NEITHER;
    /// No capability can come back: bounding and ambient sets empty.
    BoundingSet = "bounding-set", BOTH, false, NEITHER;
    /// Uid 0 gives no capability, for good.
    SecureBits = "securebits", BOTH, false, BOTH;
    /// A uid of its own, no groups.
    User = "user", DATAPLANE, false, NEITHER;
    /// No capability in any set.
    Capabilities = "capabilities", BOTH, true, NEITHER;
    /// No descriptor can be sent over a unix socket.
    NoDescriptorsOut = "no-fd-out", DATAPLANE, false, DATAPLANE;
    /// Executing a file gains nothing.
    NoNewPrivs = "no-new-privs", BOTH, true, NEITHER;
    /// Dies with the helper.
    DeathSignal = "death-signal", DATAPLANE, false, DATAPLANE;
    /// Not traceable by its own uid, no core.
    NonDumpable = "non-dumpable", BOTH, true, HELPER;
    /// Its memory cannot be read by other processes of the user it runs as.
    Untraceable = "untraceable", DATAPLANE, false, DATAPLANE;
    /// No file can be opened, whatever the path.
    Landlock = "landlock", BOTH, false, BOTH;
    /// Keys in memory that neither root nor a core file can read.
    SecretMemory = "secret-memory", DATAPLANE, false, DATAPLANE;
    /// Code, constants and relocated data stay mapped as they are, and secret memory where it is. The kernel
    /// shows it to a process that may read the code's mappings.
    SealedMemory = "sealed-memory", BOTH, false, NEITHER;
    /// No process or thread can be started.
    NoProcesses = "no-processes", DATAPLANE, false, NEITHER;
    /// Only the system calls of the filter, on every thread.
    Seccomp = "seccomp", BOTH, true, NEITHER;
    /// No descriptor can be received from a UAPI client. Most kernels in use are too old for it.
    NoDescriptorsIn = "no-fd-in", NEITHER, false, DATAPLANE;
}

impl Layer {
    /// How many there are.
    pub const COUNT: usize = TABLE.len();

    /// Every layer, in the order of the table.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.layer)
    }

    /// The layers that a process should have.
    pub fn required_of(process: Process) -> impl Iterator<Item = Self> {
        Self::all().filter(move |layer| layer.row().required_of.contains(&process))
    }

    /// The layers of a process that the kernel does not show.
    pub fn claimed_by(process: Process) -> impl Iterator<Item = Self> {
        Self::all().filter(move |layer| layer.row().claimed_by.contains(&process))
    }

    /// The layer of this name, if there is one.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::all().find(|layer| layer.name() == name)
    }

    /// True for the layers without which wgsep refuses to run.
    #[must_use]
    pub const fn is_mandatory(self) -> bool {
        self.row().is_mandatory
    }

    /// Its name in logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    const fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_numbers_and_each_name_is_given_once() {
        for (number, layer) in Layer::all().enumerate() {
            assert_eq!(layer as usize, number);
            assert_eq!(Layer::of_name(layer.name()), Some(layer));
        }
    }

    #[test]
    fn what_is_mandatory_is_required_of_both() {
        for layer in Layer::all().filter(|layer| layer.is_mandatory()) {
            assert_eq!(layer.row().required_of, BOTH, "{}", layer.name());
        }
    }
}
