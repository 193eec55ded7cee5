//! How wgsep is started by the tests of attacks: as root, or in one of the two ways with less. The whole suite
//! runs in each (`tests/attacks_as.sh`).

use std::env;

/// The variable that names the way.
const VARIABLE: &str = "WGSEP_ATTACKS_AS";
/// An unallocated uid.
const USER: &str = "61001";

/// A way of starting wgsep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaunchedAs {
    /// By root with every capability.
    Root,
    /// By a user, whose program has the file capability CAP_NET_ADMIN.
    FileCapability,
    /// By a container's root, who has CAP_NET_ADMIN only.
    Container,
}

impl LaunchedAs {
    /// The way of this run.
    ///
    /// # Panics
    ///
    /// When the variable names none.
    #[must_use]
    pub fn this_run() -> Self {
        match env::var(VARIABLE).as_deref() {
            Err(_) | Ok("" | "root") => Self::Root,
            Ok("file-capability") => Self::FileCapability,
            Ok("container") => Self::Container,
            Ok(other) => panic!("{VARIABLE}={other}: root, file-capability or container"),
        }
    }

    /// What comes before wgsep in a command.
    #[must_use]
    pub fn prefix(self) -> Vec<String> {
        let words = match self {
            Self::Root => "env".to_owned(),
            Self::FileCapability => {
                format!("setpriv --reuid={USER} --regid={USER} --clear-groups --inh-caps=-all")
            }
            Self::Container => "setpriv --bounding-set=-all,+net_admin --inh-caps=-all".to_owned(),
        };
        words.split(' ').map(str::to_owned).collect()
    }

    /// Whether the dataplane has a uid of its own.
    #[must_use]
    pub const fn has_own_uid(self) -> bool {
        matches!(self, Self::Root)
    }
}
