//! Compiling a table of [`crate::filters`] and closing it over the whole process.

use crate::filters::{Allowed, Argument, Test};
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

fn condition(argument: &Argument, process: u32) -> Result<SeccompCondition, Error> {
    let (len, operator, value) = match argument.test {
        Test::Is(value) => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, u64::from(value)),
        Test::OwnProcess => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, u64::from(process)),
        Test::Within(bits) => (SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(!bits), 0),
        Test::Masked(mask, value) => (SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask), value),
    };
    SeccompCondition::new(argument.number, len, operator, value).map_err(Error::Backend)
}

fn rule(arguments: &[Argument], process: u32) -> Result<SeccompRule, Error> {
    let conditions = arguments.iter().map(|argument| condition(argument, process));
    let conditions = conditions.collect::<Result<_, _>>()?;
    SeccompRule::new(conditions).map_err(Error::Backend)
}

/// Compiles a table for this process: what is listed is allowed, all else kills the process.
///
/// # Errors
/// If the table is not a valid filter.
pub fn compile(table: &[Allowed]) -> Result<BpfProgram, Error> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH).map_err(Error::Backend)?;
    compile_for(table, architecture, std::process::id())
}

/// Compiles a table for a process of its own id, on an architecture whose numbers the table has.
///
/// # Errors
/// If the table is not a valid filter.
pub fn compile_for(
    table: &[Allowed],
    architecture: TargetArch,
    process: u32,
) -> Result<BpfProgram, Error> {
    let mut rules = BTreeMap::new();
    for allowed in table {
        let any_of = allowed.arguments.iter().map(|arguments| rule(arguments, process));
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
            let instructions = compile(table).unwrap().len();
            assert!((table.len()..1024).contains(&instructions), "{instructions}");
        }
    }
}
