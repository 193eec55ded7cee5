//! Attack 1: every line of both filters, in the kernel. What a line allows is not killed, each argument
//! that it does not allow is, and so is every other call of every number. What only another
//! architecture can run is checked as data, by an interpreter of the compiled filter.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use seccompiler::{BpfProgram, TargetArch};
use wgsep_policy::filters::{Allowed, Argument, DATAPLANE, HELPER, Test};
use wgsep_policy::seccomp::{Own, compile_for};

/// The tables, and whose they are.
const TABLES: [(&str, &[Allowed]); 2] = [("dataplane", DATAPLANE), ("helper", HELPER)];
/// The process that filters are compiled for here; a child puts its own id in its place.
const OWN: u32 = 0x5a5a_5a5a;
/// The descriptor of the helper's child: a number that no descriptor of these tests has.
const CHILD: u32 = 0x3c3c_3c3c;
const CHANNEL: u32 = 0x5a5a_5a5a;
const SYSTEM_LOG: u32 = 0x6969_6969;
const SUCCESSOR: u32 = 0x0f0f_0f0f;
const NUMBERS_OF_OWN: Own = Own {
    process: OWN,
    child: CHILD,
    channel: CHANNEL,
    system_log: SYSTEM_LOG,
    successor: SUCCESSOR,
};
/// The argument where a line asks for nothing: no descriptor, no pointer, no length, no process.
const FREE: u64 = u64::MAX;
/// Past every number that the kernel has given out, x32's own included.
#[cfg(target_arch = "x86_64")]
const NUMBERS: i64 = 1024;
/// Past every number that the kernel has given out. An emulated machine takes its time for each.
#[cfg(target_arch = "aarch64")]
const NUMBERS: i64 = 512;
/// x32's calls are x86-64's with this bit.
const X32: i64 = 0x4000_0000;

/// uretprobe and uprobe, by which the kernel's own probes call it: newer kernels ask no filter about
/// them, and refuse them where no probe is.
#[cfg(target_arch = "x86_64")]
const UPROBES: [i64; 2] = [335, 336];
#[cfg(target_arch = "aarch64")]
const UPROBES: [i64; 0] = [];

/// What this program runs on.
#[cfg(target_arch = "x86_64")]
const NATIVE: TargetArch = TargetArch::x86_64;
#[cfg(target_arch = "aarch64")]
const NATIVE: TargetArch = TargetArch::aarch64;

type Arguments = [u64; 6];

/// Whether a line allows these arguments: the meaning of the table, in other words than the compiler's.
fn allows(line: &Allowed, arguments: &Arguments) -> bool {
    let holds = |argument: &Argument| {
        let value = arguments[usize::from(argument.number)];
        let int = value as u32;
        match argument.test {
            Test::Is(expected) => int == expected,
            Test::OwnProcess => int == OWN,
            Test::Child => int == CHILD,
            Test::Channel => int == CHANNEL,
            Test::SystemLog => int == SYSTEM_LOG,
            Test::Successor => int == SUCCESSOR,
            Test::Below(bound) => int < bound,
            Test::IsLong(expected) => value == expected,
        }
    };
    line.arguments.is_empty() || line.arguments.iter().any(|rule| rule.iter().all(holds))
}

/// A value that a test allows, and every value that is one bit away from it.
fn around(test: Test) -> (u64, impl Iterator<Item = u64>) {
    let allowed = match test {
        Test::Is(value) => value.into(),
        Test::OwnProcess => OWN.into(),
        Test::Child => CHILD.into(),
        Test::Channel => CHANNEL.into(),
        Test::SystemLog => SYSTEM_LOG.into(),
        Test::Successor => SUCCESSOR.into(),
        Test::Below(bound) => (bound - 1).into(),
        Test::IsLong(value) => value,
    };
    // An int's upper half is not looked at. One bit of it will do where each call takes its time.
    let int = !matches!(test, Test::IsLong(_));
    let bits = if int && cfg!(target_arch = "aarch64") { u32::BITS + 1 } else { u64::BITS };
    (allowed, (0..bits).map(move |bit| allowed ^ (1 << bit)))
}

/// For every rule of a line, arguments that it allows, and each of them perturbed in every bit.
fn tried(line: &Allowed) -> Vec<Arguments> {
    let mut tried = Vec::new();
    let rules: &[&[Argument]] = if line.arguments.is_empty() { &[&[]] } else { line.arguments };
    for rule in rules {
        let mut allowed = [FREE; 6];
        for argument in *rule {
            allowed[usize::from(argument.number)] = around(argument.test).0;
        }
        tried.push(allowed);
        for argument in *rule {
            tried.extend(around(argument.test).1.map(|value| {
                let mut perturbed = allowed;
                perturbed[usize::from(argument.number)] = value;
                perturbed
            }));
        }
    }
    tried
}

/// Numbers that no line has: all small ones, their x32 twins, and the ends of the range.
fn unlisted(table: &[Allowed]) -> Vec<i64> {
    let listed: BTreeSet<i64> = table.iter().map(|line| line.call).collect();
    let small = (0..NUMBERS).filter(|number| !listed.contains(number));
    let twins = (0..NUMBERS).map(|number| X32 | number).filter(|_| cfg!(target_arch = "x86_64"));
    let ends = [X32, i64::from(i32::MAX), i64::from(i32::MIN), -1];
    small.chain(twins).chain(ends).collect()
}

/// Calls made for real, each by a child of its own under the filter.
mod kernel {
    use super::{Arguments, BpfProgram, OWN};
    use nix::libc;
    use nix::sys::prctl;
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, alarm, fork, getpid};
    use std::arch::asm;

    /// Makes a call in a child under the filter; whether that kills it.
    #[track_caller]
    pub(super) fn kills(program: &BpfProgram, number: i64, arguments: &Arguments) -> bool {
        let mut program = program.clone();
        // SAFETY: the child makes system calls only, and allocates nothing.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => run(&mut program, number, arguments),
            ForkResult::Parent { child } => {
                let status = waitpid(child, None).unwrap();
                assert!(!matches!(status, WaitStatus::Signaled(_, Signal::SIGALRM, _)), "it waits");
                matches!(status, WaitStatus::Signaled(_, Signal::SIGSYS, _))
            }
        }
    }

    fn run(program: &mut BpfProgram, number: i64, arguments: &Arguments) -> ! {
        // The test's handler of SIGSEGV is not for us; nor is a core file.
        let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the default action runs no code of ours.
        let _cannot_fail = unsafe { sigaction(Signal::SIGSEGV, &action) };
        let _cannot_fail = prctl::set_dumpable(false);
        // A call that was let through might wait for ever.
        alarm::set(20);
        let own = getpid().as_raw().cast_unsigned();
        for instruction in program.iter_mut().filter(|instruction| instruction.k == OWN) {
            instruction.k = own;
        }
        let mut arguments = *arguments;
        // Our own id, or one bit away from it, instead of the placeholder.
        for argument in &mut arguments {
            if (*argument ^ u64::from(OWN)).count_ones() <= 1 {
                *argument ^= u64::from(OWN ^ own);
            }
        }
        if seccompiler::apply_filter(program).is_ok() {
            call(number, &arguments);
        }
        call(libc::SYS_exit_group, &[0; 6]);
        std::process::abort()
    }

    /// Makes a system call without a stack, which rt_sigreturn would take its frame from.
    #[cfg(target_arch = "aarch64")]
    fn call(number: i64, arguments: &Arguments) {
        let [a, b, c, d, e, f] = *arguments;
        // SAFETY: as on x86-64, below.
        unsafe {
            asm!(
                "mov x9, sp",
                "mov x10, xzr",
                "mov sp, x10",
                "svc #0",
                "mov sp, x9",
                in("x8") number,
                inlateout("x0") a => _,
                in("x1") b, in("x2") c, in("x3") d, in("x4") e, in("x5") f,
                out("x9") _, out("x10") _,
            );
        }
    }

    /// Makes a system call without a stack, which rt_sigreturn would take its frame from.
    #[cfg(target_arch = "x86_64")]
    fn call(number: i64, arguments: &Arguments) {
        let [a, b, c, d, e, f] = *arguments;
        // SAFETY: nothing uses the stack before its pointer is back. What the call does to this process
        // does not matter: it is a child that ends with it.
        unsafe {
            asm!(
                "mov r12, rsp",
                "xor esp, esp",
                "syscall",
                "mov rsp, r12",
                inlateout("rax") number => _,
                in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
                out("rcx") _, out("r11") _, out("r12") _,
            );
        }
    }

    #[test]
    fn attack_01_what_a_line_allows_lives_and_each_perturbed_argument_dies() {
        for (process, table) in super::TABLES {
            let program = super::compile_for(table, super::NATIVE, super::NUMBERS_OF_OWN).unwrap();
            for line in table {
                let tried = super::tried(line);
                assert!(super::allows(line, &tried[0]), "{process}: {}", line.name);
                for arguments in tried {
                    let killed = kills(&program, line.call, &arguments);
                    let allowed = super::allows(line, &arguments);
                    assert_ne!(killed, allowed, "{process}: {}({arguments:x?})", line.name);
                }
            }
        }
    }

    #[test]
    fn attack_01_every_other_call_dies() {
        for (process, table) in super::TABLES {
            let program = super::compile_for(table, super::NATIVE, super::NUMBERS_OF_OWN).unwrap();
            for number in super::unlisted(table) {
                let killed = kills(&program, number, &[super::FREE; 6]);
                assert!(killed || super::UPROBES.contains(&number), "{process}: {number:#x}");
            }
        }
    }
}

/// What a compiled filter answers, and the machine that runs it: as much of it as seccompiler uses.
mod interpreter {
    use super::{Arguments, BpfProgram};

    pub(super) const X86_64: u32 = 0xc000_003e;
    pub(super) const I386: u32 = 0x4000_0003;
    pub(super) const AARCH64: u32 = 0xc000_00b7;
    pub(super) const ARM: u32 = 0x4000_0028;

    const KILL_PROCESS: u32 = 0x8000_0000;
    const ALLOW: u32 = 0x7fff_0000;

    /// Whether a filter kills for a call of an architecture.
    #[track_caller]
    pub(super) fn kills(
        program: &BpfProgram,
        architecture: u32,
        number: i64,
        arguments: &Arguments,
    ) -> bool {
        // struct seccomp_data: number, architecture, instruction pointer, arguments.
        let mut data = Vec::new();
        data.extend((number as u32).to_le_bytes());
        data.extend(architecture.to_le_bytes());
        data.extend([0; 8]);
        data.extend(arguments.iter().flat_map(|argument| argument.to_le_bytes()));
        match run(program, &data) {
            KILL_PROCESS => true,
            ALLOW => false,
            other => panic!("the filter answers {other:#x}"),
        }
    }

    fn run(program: &BpfProgram, data: &[u8]) -> u32 {
        let (mut accumulator, mut next) = (0, 0);
        loop {
            let instruction = &program[next];
            next += 1;
            let (k, either) = (instruction.k, [instruction.jf, instruction.jt]);
            let jump = |condition: bool| usize::from(either[usize::from(condition)]);
            match instruction.code {
                // Load a word.
                0x20 => {
                    let at = k as usize;
                    accumulator = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
                }
                0x54 => accumulator &= k,
                0x05 => next += k as usize,
                0x15 => next += jump(accumulator == k),
                0x25 => next += jump(accumulator > k),
                0x35 => next += jump(accumulator >= k),
                0x45 => next += jump(accumulator & k != 0),
                0x06 => return k,
                other => panic!("no such instruction here: {other:#x}"),
            }
        }
    }
}

/// Every system call that the kernel has for aarch64, by name, from its own header: that architecture
/// uses the generic numbers.
fn generic_numbers() -> BTreeMap<String, i64> {
    let header = fs::read_to_string("/usr/include/asm-generic/unistd.h").unwrap();
    let number = |line: &str| {
        let mut words = line.strip_prefix("#define __NR")?.split_whitespace();
        // `3264_` is before the names of calls that have another name on 32 bits.
        let name = words.next()?.trim_start_matches("3264").strip_prefix('_')?.to_owned();
        Some((name, words.next()?.parse().ok()?))
    };
    header.lines().filter_map(number).collect()
}

/// What a table is on aarch64.
fn for_aarch64(table: &[Allowed]) -> Vec<Allowed> {
    let numbers = generic_numbers();
    let line = |line: &Allowed| {
        // The table has this one in its place there, by a condition of compilation.
        let name = if line.name == "SYS_epoll_wait" { "SYS_epoll_pwait" } else { line.name };
        // The header has this one by the name that 32-bit machines know it by.
        let known = if name == "SYS_newfstatat" { "fstatat" } else { name };
        let call = numbers.get(known.trim_start_matches("SYS_"));
        Allowed { name, call: *call.unwrap_or_else(|| panic!("aarch64 has no {name}")), ..*line }
    };
    table.iter().map(line).collect()
}

#[test]
fn attack_01_on_aarch64_the_compiled_filters_give_the_same_verdicts() {
    for (process, table) in TABLES {
        let table = for_aarch64(table);
        let program = compile_for(&table, TargetArch::aarch64, NUMBERS_OF_OWN).unwrap();
        let kills = |number, arguments: &_| {
            interpreter::kills(&program, interpreter::AARCH64, number, arguments)
        };
        for line in &table {
            for arguments in tried(line) {
                let (killed, allowed) = (kills(line.call, &arguments), allows(line, &arguments));
                assert_ne!(killed, allowed, "{process}: {}({arguments:x?})", line.name);
            }
        }
        for number in unlisted(&table) {
            assert!(kills(number, &[FREE; 6]), "{process}: call {number:#x}");
        }
    }
}

#[test]
fn attack_01_a_call_by_another_architecture_dies_whatever_its_number() {
    use interpreter::{AARCH64, ARM, I386, X86_64};
    for (process, table) in TABLES {
        for (architecture, table, own) in [
            (TargetArch::x86_64, table.to_vec(), X86_64),
            (TargetArch::aarch64, for_aarch64(table), AARCH64),
        ] {
            let program = compile_for(&table, architecture, NUMBERS_OF_OWN).unwrap();
            for other in [X86_64, I386, AARCH64, ARM, 0].into_iter().filter(|other| *other != own) {
                for line in &table {
                    let arguments = tried(line)[0];
                    assert!(
                        interpreter::kills(&program, other, line.call, &arguments),
                        "{process}: {} as of {other:#x}",
                        line.name
                    );
                }
            }
        }
    }
}

/// Compiled for this architecture and glibc, as SECURITY.md has it.
#[cfg(all(target_arch = "x86_64", target_env = "gnu"))]
#[test]
fn the_filters_are_as_short_as_security_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../SECURITY.md");
    let security = fs::read_to_string(path).unwrap();
    let counted = TABLES.map(|(process, table)| {
        let instructions = compile_for(table, TargetArch::x86_64, NUMBERS_OF_OWN).unwrap().len();
        format!("{process}: {} system calls in {instructions} instructions", table.len())
    });
    println!("{}", counted.join("\n"));
    for said in counted {
        assert!(security.contains(&said), "SECURITY.md does not say: {said}");
    }
}
