//! Compiling a table of [`crate::filters`] and closing it over the whole process.

use crate::filters::{Allowed, Argument, Test};
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What a table leaves open: the numbers of one process.
#[derive(Clone, Copy, Debug)]
pub struct Own {
    /// [`Test::OwnProcess`].
    pub process: u32,
    /// [`Test::Child`].
    pub child: u32,
    /// [`Test::Channel`].
    pub channel: u32,
    /// [`Test::SystemLog`].
    pub system_log: u32,
    /// [`Test::Successor`].
    pub successor: u32,
}

/// The descriptors that the helper's table names; the dataplane's names none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Named<'a> {
    /// A pidfd of the dataplane.
    pub child: Option<BorrowedFd<'a>>,
    /// The channel to the dataplane.
    pub channel: Option<BorrowedFd<'a>>,
    /// The socket of the system's log, where that is used.
    pub system_log: Option<BorrowedFd<'a>>,
    /// The channel to a helper that replaces this one.
    pub successor: Option<BorrowedFd<'a>>,
}

fn condition(argument: &Argument, own: Own) -> Result<SeccompCondition, Error> {
    let (len, operator, value) = match argument.test {
        Test::Is(value) => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value.into()),
        Test::IsLong(value) => (SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, value),
        Test::Below(bound) => (SeccompCmpArgLen::Dword, SeccompCmpOp::Lt, bound.into()),
        Test::OwnProcess => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, own.process.into()),
        Test::Child => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, own.child.into()),
        Test::Channel => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, own.channel.into()),
        Test::SystemLog => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, own.system_log.into()),
        Test::Successor => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, own.successor.into()),
    };
    SeccompCondition::new(argument.number, len, operator, value).map_err(Error::Backend)
}

fn rule(arguments: &[Argument], own: Own) -> Result<SeccompRule, Error> {
    let conditions = arguments.iter().map(|argument| condition(argument, own));
    let conditions = conditions.collect::<Result<_, _>>()?;
    SeccompRule::new(conditions).map_err(Error::Backend)
}

/// Compiles a table for this process and these of its descriptors: what is listed is allowed, all else kills
/// the process.
///
/// # Errors
/// If the table is not a valid filter.
pub fn compile(table: &[Allowed], named: Named<'_>) -> Result<BpfProgram, Error> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH).map_err(Error::Backend)?;
    // No call takes the descriptor -1 for anything.
    let number =
        |named: Option<BorrowedFd<'_>>| named.map_or(-1, |fd| fd.as_raw_fd()).cast_unsigned();
    let own = Own {
        process: std::process::id(),
        child: number(named.child),
        channel: number(named.channel),
        system_log: number(named.system_log),
        successor: number(named.successor),
    };
    compile_for(table, architecture, own)
}

/// Compiles a table for a process of these numbers, on an architecture whose numbers the table has.
///
/// # Errors
/// If the table is not a valid filter.
pub fn compile_for(
    table: &[Allowed],
    architecture: TargetArch,
    own: Own,
) -> Result<BpfProgram, Error> {
    let mut rules = BTreeMap::new();
    for allowed in table {
        let any_of = allowed.arguments.iter().map(|arguments| rule(arguments, own));
        rules.insert(allowed.call, any_of.collect::<Result<Vec<_>, _>>()?);
    }
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, architecture)
        .and_then(TryInto::try_into)
        .map_err(Error::Backend)
}

/// Closes a compiled filter over every thread of the process. Sets no_new_privs.
///
/// # Errors
/// If the kernel refuses it, or a thread has a filter of its own.
pub fn close(program: &BpfProgram) -> Result<(), Error> {
    seccompiler::apply_filter_all_threads(program)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::{DATAPLANE, HELPER};

    #[test]
    fn both_tables_compile_to_far_less_than_the_kernels_limit() {
        for table in [DATAPLANE, HELPER] {
            let instructions = compile(table, Named::default()).unwrap().len();
            assert!((table.len()..1024).contains(&instructions), "{instructions}");
        }
    }
}
