//! Attack 9: faults of the dataplane's own. It ends by a signal that shows which, in one line, and
//! takes the interface along. Deaths by SIGKILL and a stopped helper are in `system/lifecycle`.

use std::time::Duration;

use wgsep_tests::cgroup::Cgroup;
use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::uapi::Uapi;
use wgsep_tests::{procfs, require, skip, wait};

/// How long the end of it all may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(10);

/// The helper has logged why, and nothing is left.
#[track_caller]
fn assert_ended(daemon: &mut Daemon, why: &str) -> String {
    let status = daemon.process.exit_within(LIMIT);
    let log = daemon.process.log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains(&format!("ended: {why}")), "{log}");
    wait::until("the interface is gone", LIMIT, || !daemon.has_interface());
    assert!(!daemon.has_socket(), "the socket is left");
    log
}

#[test]
fn attack_09_out_of_memory_in_a_cgroup_ends_all_of_it() {
    require!(Wgsep);
    const MIB: u64 = 1 << 20;
    let cgroup = match Cgroup::new() {
        Ok(cgroup) => cgroup,
        Err(reason) => return skip::skip(&reason),
    };
    let mut daemon = Daemon::start_with(Wgsep, &Netns::new(), |command| cgroup.enter(command));
    let dataplane = daemon.dataplane();
    cgroup.limit_to_more(4 * MIB);
    // A transaction may be as long as that, and is kept until it is whole.
    let mut uapi = Uapi::connect(&daemon.interface).unwrap();
    let line = format!("public_key={:064x}\n", 1).repeat(1 << 16);
    let sent =
        uapi.send(b"set=1\n").and_then(|()| (0..8).try_for_each(|_| uapi.send(line.as_bytes())));
    assert!(sent.is_err(), "it has taken {} MiB", 8 * line.len() as u64 / MIB);
    assert_ended(&mut daemon, "the dataplane was killed by SIGKILL");
    assert!(!procfs::is_running(dataplane));
}

/// The real program's own panics, on each of its threads.
#[cfg(target_arch = "x86_64")]
mod panics {
    use super::{LIMIT, assert_ended};
    use nix::sys::signal::Signal;
    use nix::unistd::Pid;
    use std::collections::BTreeSet;
    use std::fs;
    use std::os::unix::process::ExitStatusExt;
    use std::path::Path;
    use std::process::Command;
    use wgsep_tests::daemon::Daemon;
    use wgsep_tests::hijack::Hijacked;
    use wgsep_tests::implementation::Implementation::Wgsep;
    use wgsep_tests::implementation::wgsep_program;
    use wgsep_tests::netns::Netns;
    use wgsep_tests::process::run;
    use wgsep_tests::{procfs, require, wait};

    /// What an `unwrap` of nothing calls, with the place of it as the only argument.
    const UNWRAP_FAILED: &str = "core::option::unwrap_failed";

    #[test]
    fn attack_09_a_panic_on_any_thread_is_one_line_and_an_abort() {
        require!(Wgsep);
        let code = failing_unwrap("wgsep-dataplane");
        let mut names = BTreeSet::new();
        // The first thread, the control thread, a worker.
        for number in 0..3 {
            let mut daemon = Daemon::start_with(Wgsep, &Netns::new(), |command| {
                command.args(["--workers", "1"]).env("RUST_BACKTRACE", "1");
            });
            let dataplane = daemon.dataplane();
            let tasks = fs::read_dir(format!("/proc/{dataplane}/task")).unwrap();
            let ids =
                tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap());
            let threads: BTreeSet<i32> = ids.collect();
            let thread = Pid::from_raw(*threads.iter().nth(number).unwrap());
            names.insert(fs::read_to_string(format!("/proc/{thread}/comm")).unwrap());
            Hijacked::seize(dataplane, thread).go_on_at(code);
            let log = assert_ended(&mut daemon, "the dataplane was killed by SIGABRT");
            let (_, after) = log.split_once("panic at ").unwrap_or_else(|| panic!("{log}"));
            let lines: Vec<_> = after.lines().collect();
            assert!(lines[0].contains("`Option::unwrap()` on a `None` value"), "{log}");
            assert_eq!(lines.len(), 2, "the panic, and the helper's end: {log}");
        }
        assert_eq!(names.len(), 3, "{names:?}");
    }

    /// Its own filter lets it say what happened, too; no process is left to remove the socket.
    #[test]
    fn attack_09_a_panic_of_the_helper_is_logged_and_ends_all_of_it() {
        require!(Wgsep);
        let code = failing_unwrap("wgsep");
        let mut daemon = Daemon::start_with(Wgsep, &Netns::new(), |command| {
            command.env("RUST_BACKTRACE", "1");
        });
        let (helper, dataplane) = (daemon.process.pid(), daemon.dataplane());
        Hijacked::seize(helper, helper).go_on_at(code);
        let status = daemon.process.exit_within(LIMIT);
        let log = daemon.process.log();
        assert_eq!(status.signal(), Some(Signal::SIGABRT as i32), "{log}");
        assert!(log.contains("`Option::unwrap()` on a `None` value"), "{log}");
        wait::until("the dataplane is gone", LIMIT, || !procfs::is_running(dataplane));
        wait::until("the interface is gone", LIMIT, || !daemon.has_interface());
    }

    /// The address, as linked, of code in a program that panics: `lea rdi, place` and a call of
    /// unwrap_failed, direct, or where the linker leaves it so (musl's target), by a slot of the global
    /// offset table.
    fn failing_unwrap(program: &str) -> u64 {
        let path = wgsep_program(program);
        let symbols = run(Command::new("nm").arg("--demangle").arg(&path));
        let function = symbols.lines().find(|line| line.ends_with(&format!(" {UNWRAP_FAILED}")));
        let function = function.and_then(|line| line.split(' ').next());
        let function = hex(function.expect("no such symbol"));
        let slots = slots_of(&path, function);
        let headers = run(Command::new("readelf").args(["--program-headers", "--wide"]).arg(&path));
        // Type, offset, address, physical address, length in the file; flags with E in them.
        let text = headers.lines().find(|line| line.contains("LOAD") && line.contains(" R E "));
        let fields: Vec<_> = text.unwrap().split_whitespace().skip(1).take(4).map(hex).collect();
        let program = fs::read(&path).unwrap();
        let text = &program[fields[0] as usize..][..fields[3] as usize];
        let target = |at: usize, len: usize| {
            let distance = i32::from_le_bytes(text[at + len - 4..at + len].try_into().unwrap());
            fields[1].wrapping_add_signed((at + len).cast_signed() as i64 + i64::from(distance))
        };
        let calls = |at: &usize| {
            text[*at..].starts_with(&[0x48, 0x8d, 0x3d])
                && match text[at + 7..at + 9] {
                    [0xe8, _] => target(at + 7, 5) == function,
                    [0xff, 0x15] => slots.contains(&target(at + 7, 6)),
                    _ => false,
                }
        };
        let found = (0..text.len() - 13).find(calls).expect("no call that panics");
        fields[1] + found as u64
    }

    /// Where a program keeps the address of a function once it is loaded.
    fn slots_of(program: &Path, function: u64) -> BTreeSet<u64> {
        let relocations = run(Command::new("readelf").args(["--relocs", "--wide"]).arg(program));
        let relative = relocations.lines().filter(|line| line.contains("R_X86_64_RELATIVE"));
        let words = relative.map(|line| line.split_whitespace().collect::<Vec<_>>());
        words.filter(|words| hex(words[3]) == function).map(|words| hex(words[0])).collect()
    }

    fn hex(word: &str) -> u64 {
        u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap()
    }
}
