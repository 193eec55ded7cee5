//! What an operator can do about a layer that is degraded.

use wgsep_policy::Layer;
use wgsep_policy::namespaces::KINDS;

const RESTART: &str = "restart the daemon; if it stays, report it as SECURITY.md says";
const SETPCAP: &str = "start wgsep as root, or give its launcher CAP_SETPCAP";
const NO_NAMESPACES: &str = "start wgsep as root with CAP_SYS_ADMIN, or allow user namespaces (if their limit is 0: sysctl user.max_user_namespaces=100); and allow unshare(2) in the filter of the container or unit";
const NO_MOUNTS: &str = "allow mount(2), umount2(2) and pivot_root(2) in the container or unit: its filter of system calls (SystemCallFilter=) or its AppArmor profile";

/// What to do about a line of the audit, by its layer and what was seen.
pub(super) fn remedy(line: &str, seen: &str) -> &'static str {
    match line {
        "no-fd-out" if seen.contains("ETOOMANYREFS") => wgsep_policy::TOO_MANY_IN_FLIGHT,
        "tracer" => "end the process that traces it, and start wgsep again",
        "descriptors" => {
            "it holds UDP sockets of more than one port, or what it has no work for; ask again, and if it stays, restart the daemon with new keys and report it as SECURITY.md says"
        }
        line => Layer::of_name(line).map_or(RESTART, of_layer),
    }
}

const fn of_layer(layer: Layer) -> &'static str {
    match layer {
        Layer::UserNamespace | Layer::Namespaces => NO_NAMESPACES,
        Layer::EmptyRoot => NO_MOUNTS,
        Layer::BoundingSet | Layer::SecureBits => SETPCAP,
        Layer::User => {
            "start wgsep as root; useradd --system wgsep gives the dataplane its account"
        }
        Layer::NoDescriptorsOut => {
            "start wgsep as root, so that the dataplane has a uid of its own"
        }
        Layer::Untraceable => {
            "take reading from its user: chmod a-r wgsep-dataplane; or start wgsep as root, with CAP_SETUID"
        }
        Layer::Landlock => "boot a kernel with Landlock: landlock in the list of lsm=",
        Layer::SecretMemory => "boot with secretmem.enable=1, and raise the limit of locked memory",
        Layer::SealedMemory => {
            "run Linux 6.10 or later, and allow mseal(2) in the filter of the container or unit"
        }
        Layer::Limits
        | Layer::Capabilities
        | Layer::NoNewPrivs
        | Layer::DeathSignal
        | Layer::NonDumpable
        | Layer::NoProcesses
        | Layer::Seccomp
        | Layer::NoDescriptorsIn => RESTART,
    }
}

/// What to do where these kinds of namespaces are the helper's; `errno` is the reported one.
pub(super) fn of_namespaces(shared: &[&str], errno: Option<&str>) -> String {
    if shared.len() == KINDS.len() {
        return NO_NAMESPACES.to_owned();
    }
    let list = |before: &str, after: &str| {
        let words: Vec<_> = shared.iter().map(|kind| format!("{before}{kind}{after}")).collect();
        words.join(", ")
    };
    let refused = format!(
        "allow {} in RestrictNamespaces= of the unit, or in the filter of system calls of the container: unshare(2) is refused for it",
        list("", "")
    );
    let limit = format!("raise the limit with sysctl(8): {}", list("user.max_", "_namespaces"));
    let built = list("CONFIG_", "_NS").to_uppercase().replace("CGROUP_NS", "CGROUPS");
    let kernel = format!("take a kernel with {built}");
    match errno {
        Some("EPERM" | "EACCES" | "ENOSYS") => refused,
        Some("ENOSPC" | "EUSERS") => limit,
        Some("EINVAL") => format!("{kernel}, or {refused}"),
        _ => format!("{refused}; or {limit}; or {kernel}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_for_a_refused_kind_names_it_and_the_cause() {
        for (shared, errno, named) in [
            (&["uts"][..], Some("EPERM"), &["allow uts in RestrictNamespaces="][..]),
            (&["ipc", "uts"], Some("EPERM"), &["allow ipc, uts in RestrictNamespaces="]),
            (&["net"], Some("ENOSPC"), &["sysctl(8): user.max_net_namespaces"]),
            (&["uts", "cgroup"], Some("EINVAL"), &["CONFIG_UTS_NS, CONFIG_CGROUPS, or allow uts"]),
            (&["ipc"], None, &["allow ipc", "user.max_ipc_namespaces", "CONFIG_IPC_NS"]),
        ] {
            let remedy = of_namespaces(shared, errno);
            assert!(named.iter().all(|name| remedy.contains(name)), "{remedy}");
            assert!(!remedy.contains("as root"), "{remedy}");
        }
        let all = KINDS.map(|(kind, _)| kind);
        assert!(of_namespaces(&all, Some("EPERM")).contains("as root"));
    }
}
