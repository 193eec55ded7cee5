//! The judgement: each layer of each process against what it has to be.

use super::claims::Claims;
use super::facts::{Fact, Facts, NAMESPACES};
use super::remedies::{of_namespaces, remedy};
use wgsep_policy::{Capability, Layer, Process};

/// The state of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// In force.
    Applied,
    /// Not in force.
    Degraded,
    /// Could not be read.
    Unread,
    /// Nothing to judge.
    Shown,
}

/// Whose word it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The kernel's, read just now.
    Kernel,
    /// The report's that was made when the processes were locked down.
    Claimed,
}

/// A line of the audit.
pub(super) struct Finding {
    pub(super) process: &'static str,
    pub(super) layer: &'static str,
    pub(super) state: State,
    pub(super) source: Source,
    /// What was read, or why nothing was.
    pub(super) seen: String,
    /// What an operator can do where it is degraded.
    pub(super) remedy: String,
}

const HELPER: &str = Process::Helper.name();
const DATAPLANE: &str = Process::Dataplane.name();
const NONE: &str = "0000000000000000";
/// User `nobody`, which others share.
const NOBODY: u32 = 65534;

/// What the helper may hold.
const HELPER_CAPABILITIES: [Capability; 3] =
    [Capability::CAP_NET_ADMIN, Capability::CAP_KILL, Capability::CAP_NET_BIND_SERVICE];

/// Kinds of descriptors each process has work for.
const DATAPLANE_KINDS: [&str; 9] = [
    "eventfd",
    "eventpoll",
    "netlink socket",
    "null",
    "pipe",
    "timerfd",
    "tun",
    UDP,
    "unix socket",
];
const UDP: &str = "udp socket";

/// Judges both processes.
pub(super) fn judge(helper: &Facts, dataplane: &Facts, claims: &Claims) -> Vec<Finding> {
    let mut findings = judge_helper(helper);
    findings.extend(claimed(claims, HELPER, Layer::claimed_by(Process::Helper)));
    findings.extend(sealed_memory(HELPER, helper, claims));
    findings.extend(judge_dataplane(dataplane, helper, claims));
    findings.extend(sealed_memory(DATAPLANE, dataplane, claims));
    findings.extend(claimed(claims, DATAPLANE, Layer::claimed_by(Process::Dataplane)));
    findings
}

/// A finding by a fact: what is seen, and whether that is as it has to be.
fn finding(process: &'static str, layer: &'static str, judged: Fact<(String, State)>) -> Finding {
    let (seen, state) = judged.unwrap_or_else(|reason| (reason, State::Unread));
    let remedy = remedy(layer, &seen).to_owned();
    Finding { process, layer, state, source: Source::Kernel, seen, remedy }
}

const fn applied_if(holds: bool) -> State {
    if holds { State::Applied } else { State::Degraded }
}

fn claimed<'c>(
    claims: &'c Claims,
    process: &'static str,
    layers: impl Iterator<Item = Layer> + 'c,
) -> impl Iterator<Item = Finding> + 'c {
    layers.map(Layer::name).filter_map(move |layer| {
        let (seen, state) = match claims.of(process, layer) {
            Ok(Some("applied")) => ("applied".to_owned(), State::Applied),
            // As of a kernel before 6.16, which most machines have.
            Ok(Some("unsupported")) if layer == Layer::NoDescriptorsIn.name() => {
                ("unsupported".to_owned(), State::Shown)
            }
            Ok(Some(other)) => (other.to_owned(), State::Degraded),
            Ok(None) if layer == Layer::SecretMemory.name() => return None,
            Ok(None) => ("not reported".to_owned(), State::Unread),
            Err(reason) => (reason.to_owned(), State::Unread),
        };
        let remedy = remedy(layer, &seen).to_owned();
        Some(Finding { process, layer, state, source: Source::Claimed, seen, remedy })
    })
}

/// By all the code, which the kernel shows to a process that may read that one; else by what is claimed.
fn sealed_memory(process: &'static str, facts: &Facts, claims: &Claims) -> Vec<Finding> {
    let layer = Layer::SealedMemory;
    let Ok((whole, sealed)) = facts.code else {
        return claimed(claims, process, [layer].into_iter()).collect();
    };
    let seen = format!("{sealed} of {whole} KiB of code");
    vec![finding(process, layer.name(), Ok((seen, applied_if(whole > 0 && sealed == whole))))]
}

fn judge_helper(helper: &Facts) -> Vec<Finding> {
    let line = |layer, judged| finding(HELPER, layer, judged);
    let held = |name: &str| helper.field(name).map(|text| (text.to_owned(), bits(text)));
    let permitted = HELPER_CAPABILITIES.iter().fold(0, |set, one| set | one.bitmask());
    vec![
        line("uid", helper.field("Uid").map(|uid| (first(uid), State::Shown))),
        line("threads", threads(helper).map(|count| (count.to_string(), applied_if(count == 1)))),
        line(
            "capabilities",
            held("CapPrm").and_then(|(_, permits)| {
                let effective = held("CapEff")?.1;
                let (Some(permits), Some(effective)) = (permits, effective) else {
                    return Ok(("not a set".to_owned(), State::Degraded));
                };
                let within = (permits | effective) & !permitted == 0;
                Ok((names(permits | effective), applied_if(within)))
            }),
        ),
        line("bounding-set", empty_sets(helper, &["CapInh", "CapBnd", "CapAmb"])),
        line("no-new-privs", equals(helper, "NoNewPrivs", "1")),
        line("seccomp", seccomp(helper)),
        line("tracer", tracer(helper)),
        line("limits", limits(helper, &["Max core file size"])),
        line(
            "descriptors",
            kinds(helper).map(|(text, _)| (text, applied_if(holds_one_port(helper)))),
        ),
    ]
}

fn judge_dataplane(dataplane: &Facts, helper: &Facts, claims: &Claims) -> Vec<Finding> {
    let line = |layer, judged| finding(DATAPLANE, layer, judged);
    vec![
        line("threads", threads(dataplane).map(|count| (count.to_string(), State::Shown))),
        line("user", user(dataplane, helper)),
        line("capabilities", empty_sets(dataplane, &["CapInh", "CapPrm", "CapEff", "CapAmb"])),
        line("bounding-set", empty_sets(dataplane, &["CapBnd"])),
        line("no-new-privs", equals(dataplane, "NoNewPrivs", "1")),
        line("seccomp", seccomp(dataplane)),
        line("tracer", tracer(dataplane)),
        namespaces(dataplane, claims),
        empty_root(dataplane, claims),
        line("limits", limits(dataplane, &["Max core file size", "Max file size"])),
        line("no-processes", limits(dataplane, &["Max processes"])),
        line("non-dumpable", non_dumpable(dataplane)),
        line(
            "descriptors",
            kinds(dataplane).map(|(text, unexpected)| {
                (text, applied_if(!unexpected && holds_one_port(dataplane)))
            }),
        ),
        line(
            "secret-memory",
            dataplane
                .secret_memory
                .clone()
                .map(|bytes| (format!("{} KiB", bytes / 1024), State::Shown)),
        ),
    ]
}

/// The kinds that are the helper's, if that could be read.
fn shared_kinds(dataplane: &Facts) -> Fact<Vec<&'static str>> {
    let shared = dataplane.shared_namespaces.as_ref().map_err(Clone::clone)?;
    Ok(NAMESPACES.into_iter().filter(|name| shared.contains(name)).collect())
}

fn namespaces(dataplane: &Facts, claims: &Claims) -> Finding {
    let (layer, shared) = (Layer::Namespaces.name(), shared_kinds(dataplane));
    let errno = claims.errno_of(DATAPLANE, layer);
    let judged = shared.as_ref().map_err(Clone::clone).map(|shared| {
        let seen = match errno {
            _ if shared.is_empty() => format!("its own: {}", NAMESPACES.join(" ")),
            Some(errno) => format!("the helper's: {} ({errno})", shared.join(" ")),
            None => format!("the helper's: {}", shared.join(" ")),
        };
        (seen, applied_if(shared.is_empty()))
    });
    let remedy = of_namespaces(&shared.unwrap_or_default(), errno);
    Finding { remedy, ..finding(DATAPLANE, layer, judged) }
}

/// Without a mount namespace of its own it has none, for the same reason.
fn empty_root(dataplane: &Facts, claims: &Claims) -> Finding {
    let judged = dataplane.root.clone().map(|(count, read_only)| {
        let writable = if read_only { "read-only" } else { "writable" };
        (format!("{count} entries, {writable}"), applied_if(count == 0 && read_only))
    });
    let finding = finding(DATAPLANE, Layer::EmptyRoot.name(), judged);
    match shared_kinds(dataplane) {
        Ok(shared) if shared.contains(&"mnt") => {
            Finding { remedy: namespaces(dataplane, claims).remedy, ..finding }
        }
        _ => finding,
    }
}

fn threads(facts: &Facts) -> Fact<usize> {
    facts.threads.as_ref().map(Vec::len).map_err(Clone::clone)
}

fn first(words: &str) -> String {
    words.split_whitespace().next().unwrap_or_default().to_owned()
}

/// A uid of its own in all four places, and no groups.
fn user(dataplane: &Facts, helper: &Facts) -> Fact<(String, State)> {
    let (uids, groups) = (dataplane.field("Uid")?, dataplane.field("Groups")?);
    let uid = first(uids);
    let number = uid.parse::<u32>().unwrap_or(0);
    let own = uids.split_whitespace().all(|one| one == uid)
        && number != 0
        && number != NOBODY
        && uid != first(helper.field("Uid")?);
    let groups_seen = if groups.is_empty() { "no groups" } else { groups };
    Ok((format!("uid {uid}, {groups_seen}"), applied_if(own && groups.is_empty())))
}

fn equals(facts: &Facts, field: &str, expected: &str) -> Fact<(String, State)> {
    facts.field(field).map(|value| (value.to_owned(), applied_if(value == expected)))
}

fn seccomp(facts: &Facts) -> Fact<(String, State)> {
    let (mode, filters) = (facts.field("Seccomp")?, facts.field("Seccomp_filters")?);
    Ok((format!("mode {mode}, {filters} filter"), applied_if(mode == "2" && filters != "0")))
}

/// No process is attached to any thread.
fn tracer(facts: &Facts) -> Fact<(String, State)> {
    let tracer = facts.field("TracerPid")?;
    let seen = match tracer {
        "0" => "none".to_owned(),
        tracer if tracer.parse::<u32>().is_ok() => format!("process {tracer}"),
        other => other.to_owned(),
    };
    Ok((seen, applied_if(tracer == "0")))
}

fn empty_sets(facts: &Facts, sets: &[&str]) -> Fact<(String, State)> {
    let mut held = Vec::new();
    for set in sets {
        let value = facts.field(set)?;
        if value != NONE {
            held.push(format!("{set} {}", bits(value).map_or(value.to_owned(), names)));
        }
    }
    let seen = if held.is_empty() { format!("empty: {}", sets.join(" ")) } else { held.join(", ") };
    Ok((seen, applied_if(held.is_empty())))
}

fn bits(set: &str) -> Option<u64> {
    u64::from_str_radix(set, 16).ok()
}

/// The names of the capabilities in a set.
fn names(set: u64) -> String {
    let name = |number: u8| {
        let known = wgsep_policy::capabilities::name(number);
        known.unwrap_or_else(|| format!("capability {number}"))
    };
    let names: Vec<_> = (0..64).filter(|bit| set >> bit & 1 == 1).map(name).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(" ") }
}

/// Limits that have to be 0, soft and hard.
fn limits(facts: &Facts, names: &[&str]) -> Fact<(String, State)> {
    let limits = facts.limits.as_ref().map_err(Clone::clone)?;
    let value = |name: &&str| match limits.get(*name) {
        Some((soft, hard)) if soft == hard => soft.clone(),
        Some((soft, hard)) => format!("{soft} up to {hard}"),
        None => "missing".to_owned(),
    };
    let seen: Vec<_> = names.iter().map(|name| (name, value(name))).collect();
    let zero = seen.iter().all(|(_, value)| value == "0");
    let seen: Vec<_> = seen.iter().map(|(name, value)| format!("{name} {value}")).collect();
    Ok((seen.join(", "), applied_if(zero)))
}

/// The files of a process that is not dumpable are never its own user's in /proc.
fn non_dumpable(facts: &Facts) -> Fact<(String, State)> {
    let owner = facts.owner.clone()?;
    let uid = first(facts.field("Uid")?);
    if uid == "0" {
        return Err("cannot be determined for a process of root's".to_owned());
    }
    Ok((format!("its /proc files are uid {owner}'s"), applied_if(owner.to_string() != uid)))
}

/// The descriptors by kind, and whether there is one the dataplane has no work for.
fn kinds(facts: &Facts) -> Fact<(String, bool)> {
    let kinds = facts.descriptors.as_ref().map_err(Clone::clone)?;
    let unexpected = kinds.keys().any(|kind| !DATAPLANE_KINDS.contains(&kind.as_str()));
    let seen: Vec<_> = kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    Ok((seen.join(", "), unexpected))
}

/// Whether it has no more UDP sockets than one for each family. For a moment, while the port is changed,
/// there may be as many again.
fn holds_one_port(facts: &Facts) -> bool {
    let held = facts.descriptors.as_ref().map(|kinds| kinds.get(UDP).copied().unwrap_or_default());
    held.is_ok_and(|count| count <= 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const LOCKED_DOWN: [(&str, &str); 10] = [
        ("Uid", "61000\t61000\t61000\t61000"),
        ("Groups", ""),
        ("CapInh", NONE),
        ("CapPrm", NONE),
        ("CapEff", NONE),
        ("CapBnd", NONE),
        ("CapAmb", NONE),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("TracerPid", "0"),
    ];

    fn locked_down() -> Facts {
        let mut fields: BTreeMap<_, _> = LOCKED_DOWN
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        fields.insert("Seccomp_filters".to_owned(), "1".to_owned());
        let zero = ("0".to_owned(), "0".to_owned());
        let limits = ["Max core file size", "Max file size", "Max processes"];
        Facts {
            threads: Ok(vec![fields.clone(), fields]),
            shared_namespaces: Ok(vec!["user"]),
            root: Ok((0, true)),
            limits: Ok(limits.map(|name| (name.to_owned(), zero.clone())).into()),
            owner: Ok(0),
            descriptors: Ok(BTreeMap::from([("tun".to_owned(), 1)])),
            secret_memory: Ok(0),
            code: Ok((0, 0)),
        }
    }

    fn helper() -> Facts {
        let mut helper = locked_down();
        let Ok(threads) = &mut helper.threads else { return helper };
        threads.truncate(1);
        for (field, value) in [("Uid", "0 0 0 0"), ("CapEff", "1020"), ("CapPrm", "1020")] {
            threads[0].insert(field.to_owned(), value.to_owned());
        }
        helper
    }

    fn degraded(dataplane: &Facts) -> Vec<&'static str> {
        let findings = judge_dataplane(dataplane, &helper(), &Claims::parsed(""));
        let degraded = findings.iter().filter(|finding| finding.state != State::Applied);
        degraded.filter(|finding| finding.state != State::Shown).map(|one| one.layer).collect()
    }

    #[test]
    fn a_locked_down_dataplane_has_nothing_degraded() {
        assert_eq!(degraded(&locked_down()), Vec::<&str>::new());
    }

    #[test]
    fn every_field_of_every_thread_counts() {
        for (field, value, layer) in [
            ("Uid", "61000\t61000\t61000\t0", "user"),
            ("Uid", "0\t0\t0\t0", "user"),
            ("Uid", "65534\t65534\t65534\t65534", "user"),
            ("Groups", "27", "user"),
            ("CapInh", "0000000000000001", "capabilities"),
            ("CapPrm", "0000000000000001", "capabilities"),
            ("CapEff", "0000000000001000", "capabilities"),
            ("CapAmb", "0000000000000001", "capabilities"),
            ("CapBnd", "000001ffffffffff", "bounding-set"),
            ("NoNewPrivs", "0", "no-new-privs"),
            ("Seccomp", "0", "seccomp"),
            ("Seccomp", "1", "seccomp"),
            ("TracerPid", "12", "tracer"),
        ] {
            let mut facts = locked_down();
            let Ok(threads) = &mut facts.threads else { panic!("read") };
            // One thread is enough.
            threads[1].insert(field.to_owned(), value.to_owned());
            assert!(degraded(&facts).contains(&layer), "{field} {value}");
        }
    }

    #[test]
    fn what_is_not_of_a_thread_counts_too() {
        type Change = fn(&mut Facts);
        let changes: [(Change, &str); 9] = [
            (|facts| facts.shared_namespaces = Ok(vec!["net", "user"]), "namespaces"),
            (|facts| facts.root = Ok((1, true)), "empty-root"),
            (|facts| facts.root = Ok((0, false)), "empty-root"),
            (|facts| facts.limits = Ok(BTreeMap::new()), "limits"),
            (|facts| facts.limits = Ok(BTreeMap::new()), "no-processes"),
            (|facts| facts.owner = Ok(61000), "non-dumpable"),
            (
                |facts| facts.descriptors = Ok(BTreeMap::from([("file /x".to_owned(), 1)])),
                "descriptors",
            ),
            (|facts| facts.descriptors = Ok(BTreeMap::from([(UDP.to_owned(), 3)])), "descriptors"),
            (|facts| facts.root = Err("EACCES".to_owned()), "empty-root"),
        ];
        for (change, layer) in changes {
            let mut facts = locked_down();
            change(&mut facts);
            assert!(degraded(&facts).contains(&layer), "{layer}");
        }
    }

    #[test]
    fn the_remedy_for_a_root_that_is_not_empty_is_that_of_its_mount_namespace_or_of_mounting() {
        let remedy = |shared: &[&'static str]| {
            let mut facts = locked_down();
            (facts.shared_namespaces, facts.root) = (Ok(shared.to_vec()), Ok((26, false)));
            let claims = Claims::parsed("dataplane: namespaces=degraded(ENOSPC:mnt)\n");
            let findings = judge_dataplane(&facts, &helper(), &claims);
            let [namespaces, root] = ["namespaces", "empty-root"]
                .map(|layer| findings.iter().find(|finding| finding.layer == layer).unwrap());
            (namespaces.seen.clone(), namespaces.remedy.clone(), root.remedy.clone())
        };
        let (seen, namespaces, root) = remedy(&["mnt", "user"]);
        assert_eq!(seen, "the helper's: mnt (ENOSPC)");
        assert!(namespaces.contains("user.max_mnt_namespaces"), "{namespaces}");
        assert_eq!(root, namespaces);
        assert!(remedy(&["user"]).2.contains("pivot_root(2)"));
        assert!(remedy(&["uts", "user"]).2.contains("pivot_root(2)"));
    }

    #[test]
    fn a_helper_holds_the_udp_sockets_of_one_port() {
        for (count, state) in [(2, State::Applied), (3, State::Degraded)] {
            let mut facts = helper();
            facts.descriptors = Ok(BTreeMap::from([(UDP.to_owned(), count)]));
            let findings = judge_helper(&facts);
            let found = findings.iter().find(|finding| finding.layer == "descriptors");
            assert_eq!(found.map(|one| one.state), Some(state), "{count}");
        }
    }

    #[test]
    fn a_helper_with_one_capability_too_many_is_degraded() {
        let state = |set: &str| {
            let mut facts = helper();
            let Ok(threads) = &mut facts.threads else { panic!("read") };
            threads[0].insert("CapPrm".to_owned(), set.to_owned());
            let findings = judge_helper(&facts);
            findings.iter().find(|finding| finding.layer == "capabilities").map(|one| one.state)
        };
        assert_eq!(state("0000000000001020"), Some(State::Applied));
        assert_eq!(state("0000000000201020"), Some(State::Degraded));
    }
}
