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
//!    nowhere.
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
    /// What an operator can do where it is degraded.
    remedy: &'static str,
}

const NEITHER: &[Process] = &[];
const DATAPLANE: &[Process] = &[Process::Dataplane];
const HELPER: &[Process] = &[Process::Helper];
const BOTH: &[Process] = &[Process::Helper, Process::Dataplane];

const RESTART: &str = "restart the daemon; if it stays, report it as SECURITY.md says";
const NAMESPACES: &str = "start wgsep as root, or allow user namespaces; if their limit is 0: sysctl user.max_user_namespaces=100";
const SETPCAP: &str = "start wgsep as root, or give its launcher CAP_SETPCAP";

/// The enumeration of the layers, and the table of what belongs to each.
macro_rules! layers {
    ($($(#[$doc:meta])* $layer:ident = $name:literal, $required_of:expr, $is_mandatory:expr,
        $claimed_by:expr, $remedy:expr;)*) => {
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
            remedy: $remedy,
        },)*];
    };
}

layers! {
    // Name, required of, mandatory, claimed by, remedy.

    /// No core file, few descriptors, no file growth.
    Limits = "limits", BOTH, true, NEITHER, RESTART;
    /// A user namespace of its own, where the launcher's privileges do not suffice for the rest. It is only a
    /// means to others.
    UserNamespace = "user-namespace", NEITHER, false, NEITHER, NAMESPACES;
    /// Mount, network, IPC and UTS namespaces of its own, with nothing in them.
    Namespaces = "namespaces", DATAPLANE, false, NEITHER, NAMESPACES;
    /// An empty, read-only root directory.
    EmptyRoot = "empty-root", DATAPLANE, false, NEITHER, NAMESPACES;
    /// No capability can come back: bounding and ambient sets empty.
    BoundingSet = "bounding-set", BOTH, false, NEITHER, SETPCAP;
    /// Uid 0 gives no capability, for good.
    SecureBits = "securebits", BOTH, false, BOTH, SETPCAP;
    /// A uid of its own, no groups.
    User = "user", DATAPLANE, false, NEITHER,
        "start wgsep as root; useradd --system wgsep gives the dataplane its account";
    /// No capability in any set.
    Capabilities = "capabilities", BOTH, true, NEITHER, RESTART;
    /// No descriptor can be sent over a unix socket.
    NoDescriptorsOut = "no-fd-out", DATAPLANE, false, DATAPLANE,
        "start wgsep as root, so that the dataplane has a uid of its own";
    /// Executing a file gains nothing.
    NoNewPrivs = "no-new-privs", BOTH, true, NEITHER, RESTART;
    /// Dies with the helper.
    DeathSignal = "death-signal", DATAPLANE, false, DATAPLANE, RESTART;
    /// Not traceable by its own uid, no core.
    NonDumpable = "non-dumpable", BOTH, true, HELPER, RESTART;
    /// Its memory cannot be read by other processes of the user it runs as.
    Untraceable = "untraceable", DATAPLANE, false, DATAPLANE,
        "take reading from its user: chmod a-r wgsep-dataplane; or start wgsep as root, with CAP_SETUID";
    /// No file can be opened, whatever the path.
    Landlock = "landlock", BOTH, false, BOTH,
        "boot a kernel with Landlock: landlock in the list of lsm=";
    /// Keys in memory that neither root nor a core file can read.
    SecretMemory = "secret-memory", DATAPLANE, false, DATAPLANE,
        "boot with secretmem.enable=1, and raise the limit of locked memory";
    /// Code, constants and relocated data stay mapped as they are, and secret memory where it is. The kernel
    /// shows it to a process that may read the code's mappings.
    SealedMemory = "sealed-memory", BOTH, false, NEITHER,
        "run Linux 6.10 or later, and allow mseal(2) in the filter of the container or unit";
    /// No process or thread can be started.
    NoProcesses = "no-processes", DATAPLANE, false, NEITHER, RESTART;
    /// Only the system calls of the filter, on every thread.
    Seccomp = "seccomp", BOTH, true, NEITHER, RESTART;
    /// No descriptor can be received from a UAPI client. Most kernels in use are too old for it.
    NoDescriptorsIn = "no-fd-in", NEITHER, false, DATAPLANE, RESTART;
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

    /// What an operator can do where it is degraded.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        self.row().remedy
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
