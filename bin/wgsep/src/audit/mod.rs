//! `wgsep audit IF`: what confines the two processes of a running daemon, layer by layer.
//!
//! 1. `processes`: the kernel names the process that made the interface's socket listen, which must be alive and
//!    own the socket; its only child is the dataplane, which must hold it.
//! 2. `facts`: what /proc says of each.
//! 3. `claims`: what the helper wrote down when both were locked down, for what no file shows.
//! 4. `findings`: the judgement, a line a layer.
//!    `remedies` has what to do about it.
//! 5. `render`: as a table, or as JSON.
//!
//! It changes nothing, and gives up every privilege but those of reading before it begins.

mod claims;
mod facts;
mod findings;
mod processes;
mod remedies;
mod render;

use facts::Facts;
use findings::{Finding, State};
use processes::Processes;
use wgsep_policy::{Capability, described, remedy};

/// How an audit ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every layer is in force.
    Sound,
    /// A layer is not.
    Degraded,
    /// None is seen degraded, but something could not be read.
    Incomplete,
}

/// Audits the daemon of an interface; returns what to print.
///
/// # Errors
/// One line, if no daemon serves the interface or it may not be asked.
pub fn audit(interface: &str, json: bool) -> Result<(String, Outcome), String> {
    let reading = [Capability::CAP_SYS_PTRACE, Capability::CAP_DAC_READ_SEARCH];
    // The socket is root's, or that of the user who started the daemon.
    let connecting = [Capability::CAP_DAC_OVERRIDE];
    wgsep_policy::capabilities::keep_only(&[&reading[..], &connecting].concat())
        .map_err(|errno| format!("give up privileges: {}; {}", described(errno), remedy(errno)))?;
    let processes = Processes::find(interface)?;
    wgsep_policy::capabilities::keep_only(&reading)
        .map_err(|errno| format!("give up privileges: {}; {}", described(errno), remedy(errno)))?;
    let helper = Facts::read(processes.helper, processes.helper);
    let claims = claims::read(interface, helper.uid());
    let dataplane = Facts::read(processes.dataplane, processes.helper);
    processes.check_alive(interface)?;
    let findings = findings::judge(&helper, &dataplane, &claims);
    let text = if json {
        render::json(interface, &processes, &findings)
    } else {
        render::table(interface, &processes, &findings, claims.remedy())
    };
    Ok((text, outcome(&findings)))
}

fn outcome(findings: &[Finding]) -> Outcome {
    let any = |state| findings.iter().any(|finding| finding.state == state);
    match (any(State::Degraded), any(State::Unread)) {
        (true, _) => Outcome::Degraded,
        (false, true) => Outcome::Incomplete,
        (false, false) => Outcome::Sound,
    }
}
