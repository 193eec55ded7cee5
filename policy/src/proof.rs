//! What the kernel says of the dataplane, against what the dataplane says of itself.

use crate::{Capability, Layer, Report, State, ThreadStatus, capabilities};
use nix::unistd::{Gid, Pid, Uid, getpid};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// What reads another user's process where /proc is mounted with `hidepid=`: the kernel asks at each
/// lookup, so no descriptor opened earlier replaces it.
pub(crate) const READING: Capability = Capability::CAP_SYS_PTRACE;

/// Where the kernel says whether a process that changed its credentials, or whose program cannot be read,
/// is dumpable all the same (proc_sys_fs(5)).
const SUID_DUMPABLE: &str = "/proc/sys/fs/suid_dumpable";

/// Checks every thread of a dataplane that reports its lock-down. Returns the process that traces one of
/// them, if any does.
///
/// # Errors
/// If any thread has a capability, lacks no_new_privs or the filter, or is of another user or group; or
/// if there are not exactly `threads` of them: a line that says which, and what to do about it.
pub fn verify(
    pid: Pid,
    ids: (Uid, Gid),
    threads: usize,
    report: &Report,
) -> Result<Option<String>, String> {
    check_proc("verify the dataplane", &fs::read_link("/proc/self"))?;
    let statuses = capabilities::with_reserve(READING, || read_statuses(pid))
        .map_err(|error| unreadable(pid, &error))?;
    statuses.iter().try_for_each(|status| check_thread(status, ids, report))?;
    let count = statuses.len();
    if count != threads {
        return Err(format!(
            "the dataplane has {count} threads where {threads} were expected; this is a bug, please report it"
        ));
    }
    let is_missing = |layer: &Layer| layer.is_mandatory() && report.state(*layer) != State::Applied;
    let Some(layer) = Layer::all().find(is_missing) else { return Ok(tracer(&statuses)) };
    Err(format!(
        "refusing to run: the mandatory layer {} is missing ({report}); take a kernel, container or unit that has it",
        layer.name()
    ))
}

/// The first process that traces a thread with ptrace(2), by the number that /proc has for it. One that the kernel does
/// not show is one that may be there.
fn tracer(statuses: &[ThreadStatus]) -> Option<String> {
    let mut tracers = statuses.iter().map(|status| status.field("TracerPid").unwrap_or("unknown"));
    tracers.find(|tracer| *tracer != "0").map(str::to_owned)
}

/// Whether the kernel keeps the dataplane's memory from other processes of its user, of which this is
/// one, and has done so since it was executed; `tracer` is what [`verify`] found.
///
/// A process that is not dumpable can be traced only from the user namespace that its program was
/// executed in, or from one around it, with CAP_SYS_PTRACE. Where the launcher could not give the
/// dataplane a user of its own, the launcher's user owns that namespace and has every capability in it.
/// But if that user cannot read the program's file, the process is not dumpable from the moment it is
/// executed, and the kernel requires the capability in the namespace around.
#[must_use]
pub fn untraceable(dataplane: Pid, tracer: Option<&str>) -> State {
    // The debugging mode in which such a process is dumpable until it says otherwise.
    let is_debugging = fs::read_to_string(SUID_DUMPABLE).is_ok_and(|mode| mode.trim() == "1");
    // The link can be read by those who may trace; the files beside it are root's in any case.
    // Where /proc hides the processes that may not be traced, it is not found at all.
    let link = fs::read_link(format!("/proc/{dataplane}/root"));
    if tracer.is_none() && !is_debugging && link.is_err_and(|error| is_hidden(&error)) {
        State::Applied
    } else {
        State::degraded(nix::Error::EPERM)
    }
}

/// Whether /proc is there and numbers processes as this one's namespace does: it may be left over from
/// the namespace around, where the dataplane's number is another process's. `this` is what /proc/self links to.
///
/// # Errors
/// If it is not; `step` is what needs it.
pub fn check_proc(step: &str, this: &io::Result<PathBuf>) -> Result<(), String> {
    const MOUNT: &str = "mount this container's own: mount -t proc proc /proc";
    match this {
        Ok(this) if this == Path::new(&getpid().to_string()) => Ok(()),
        Ok(_) => Err(format!("{step}: /proc is another PID namespace's; {MOUNT}")),
        Err(error) => Err(format!("{step}: /proc/self: {error}; {MOUNT}")),
    }
}

/// Why no thread of the dataplane can be read though /proc is there.
fn unreadable(pid: Pid, error: &io::Error) -> String {
    let path = format!("/proc/{pid}/task");
    let step = format!("verify the dataplane: {path}: {error}");
    if is_hidden(error) && fs::metadata(path).is_err() {
        return format!(
            "{step}: /proc hides it from the helper (hidepid= of its mount, ProtectProc= of a unit); give the helper CAP_SYS_PTRACE (CapabilityBoundingSet= of a unit) until it has looked, or mount /proc without hidepid"
        );
    }
    let errno = error.raw_os_error().map_or(nix::Error::UnknownErrno, nix::Error::from_raw);
    format!("{step}; {}", crate::remedy(errno))
}

/// The answers of a /proc that hides a process, EPERM and ENOENT, and that of one that keeps it private.
fn is_hidden(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound)
}

fn read_statuses(pid: Pid) -> io::Result<Vec<ThreadStatus>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))?;
    tasks.map(|task| ThreadStatus::read(&task?.path())).collect()
}

fn check_thread(status: &ThreadStatus, ids: (Uid, Gid), report: &Report) -> Result<(), String> {
    let (uid, gid) = ids;
    // Real, effective, saved, and that of the file system.
    let uids = format!("{uid}\t{uid}\t{uid}\t{uid}");
    let gids = format!("{gid}\t{gid}\t{gid}\t{gid}");
    let none = "0000000000000000";
    let bounding = (report.state(Layer::BoundingSet) == State::Applied).then_some(none);
    let groups = (report.state(Layer::User) == State::Applied).then_some("");
    let expected = [
        ("Groups", groups),
        ("Uid", Some(uids.as_str())),
        ("Gid", Some(gids.as_str())),
        ("CapInh", Some(none)),
        ("CapPrm", Some(none)),
        ("CapEff", Some(none)),
        ("CapBnd", bounding),
        ("CapAmb", Some(none)),
        ("NoNewPrivs", Some("1")),
        ("Seccomp", Some("2")),
    ];
    for (field, expected) in expected {
        let (Some(expected), found) = (expected, status.field(field)) else { continue };
        if found != Some(expected) {
            let found = found.unwrap_or("missing");
            return Err(format!(
                "the dataplane is not locked down as it says: {field} is {found}, not {expected}; this is a bug, please report it"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCKED_DOWN: &str = "Name:\twgsep-dataplane\nUid:\t9\t9\t9\t9\nGid:\t8\t8\t8\t8\nGroups:\t \nCapInh:\t0000000000000000\n\
        CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\n\
        CapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n";

    fn check(status: &str) -> Result<(), String> {
        let mut report = Report::default();
        report.note(Layer::BoundingSet, State::Applied);
        report.note(Layer::User, State::Applied);
        let status = ThreadStatus(status.to_owned());
        check_thread(&status, (Uid::from_raw(9), Gid::from_raw(8)), &report)
    }

    #[test]
    fn every_field_of_every_thread_counts() {
        assert!(check(LOCKED_DOWN).is_ok());
        for (right, wrong) in [
            ("Uid:\t9\t9", "Uid:\t9\t0"),
            ("Gid:\t8\t8", "Gid:\t8\t0"),
            ("8\nGroups", "9\nGroups"),
            ("Groups:\t ", "Groups:\t27 "),
            ("CapInh:\t0", "CapInh:\t1"),
            ("CapPrm:\t0", "CapPrm:\t1"),
            ("CapEff:\t0", "CapEff:\t1"),
            ("CapBnd:\t0", "CapBnd:\t1"),
            ("CapAmb:\t0", "CapAmb:\t1"),
            ("NoNewPrivs:\t1", "NoNewPrivs:\t0"),
            ("Seccomp:\t2", "Seccomp:\t0"),
            ("Seccomp:\t2", "Seccompx:\t2"),
        ] {
            assert!(check(&LOCKED_DOWN.replace(right, wrong)).is_err(), "{wrong}");
        }
        assert!(check("").is_err());
    }

    #[test]
    fn a_tracer_of_any_thread_is_found() {
        let traced_by = |pid: &str| ThreadStatus(format!("{LOCKED_DOWN}TracerPid:\t{pid}\n"));
        let first = |statuses: &[ThreadStatus]| tracer(statuses);
        assert_eq!(first(&[traced_by("0"), traced_by("0")]), None);
        assert_eq!(first(&[traced_by("0"), traced_by("12")]).as_deref(), Some("12"));
        assert_eq!(
            first(&[traced_by("0"), ThreadStatus(LOCKED_DOWN.to_owned())]).as_deref(),
            Some("unknown")
        );
        assert_ne!(untraceable(getpid(), Some("12")), State::Applied);
    }

    #[test]
    fn a_proc_of_elsewhere_and_one_that_hides_are_distinguished() {
        assert_eq!(check_proc("step", &fs::read_link("/proc/self")), Ok(()));
        let elsewhere = check_proc("step", &Ok("1000000000".into())).unwrap_err();
        assert!(elsewhere.contains("another PID namespace's"), "{elsewhere}");
        let missing = check_proc("step", &Err(io::Error::from_raw_os_error(2))).unwrap_err();
        assert!(missing.contains("mount -t proc"), "{missing}");
        let missing = Pid::from_raw(1_000_000_000);
        for (pid, errno, named) in [
            (missing, nix::Error::EPERM, "hidepid="),
            (missing, nix::Error::ENOENT, "CAP_SYS_PTRACE"),
            (missing, nix::Error::ENOSYS, "newer kernel"),
            (getpid(), nix::Error::EPERM, "allow it in the container"),
        ] {
            let said = unreadable(pid, &io::Error::from_raw_os_error(errno as i32));
            assert!(said.contains(named) && said.contains(errno.desc()), "{said}");
        }
    }

    #[test]
    fn an_unconfined_process_is_refused() {
        // Not this process: other tests' threads end while it is looked at.
        let mut unconfined = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = nix::unistd::Pid::from_raw(unconfined.id().try_into().unwrap());
        let ids = (nix::unistd::getuid(), nix::unistd::getgid());
        let error = verify(pid, ids, 1, &Report::default());
        unconfined.kill().unwrap();
        unconfined.wait().unwrap();
        let error = error.unwrap_err();
        assert!(error.contains("not locked down"), "{error}");
    }
}
