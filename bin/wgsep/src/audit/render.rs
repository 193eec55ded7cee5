//! The findings as a table for people, and as JSON for programs.

use super::findings::{Finding, Source, State};
use super::processes::Processes;
use crate::json::string;
use nix::unistd::geteuid;
use std::fmt::Write;

const fn state(state: State) -> &'static str {
    match state {
        State::Applied => "applied",
        State::Degraded => "DEGRADED",
        State::Unread => "unread",
        State::Shown => "-",
    }
}

const fn source(source: Source) -> &'static str {
    match source {
        Source::Kernel => "kernel",
        Source::Claimed => "claimed",
    }
}

/// A line a finding, and after them what to do about the degraded ones, and about a report that cannot be read.
pub(super) fn table(
    interface: &str,
    processes: &Processes,
    findings: &[Finding],
    unread_report: Option<String>,
) -> String {
    let mut text = format!(
        "{interface}: helper {}, dataplane {}\n\n{:<10} {:<14} {:<9} {:<8} SEEN\n",
        processes.helper, processes.dataplane, "PROCESS", "LAYER", "STATE", "SOURCE"
    );
    for finding in findings {
        let Finding { process, layer, .. } = finding;
        let seen = printable(&finding.seen);
        let (state, source) = (state(finding.state), source(finding.source));
        // Writing to memory cannot fail.
        let _infallible = writeln!(text, "{process:<10} {layer:<14} {state:<9} {source:<8} {seen}");
    }
    let degraded: Vec<_> = findings.iter().filter(|one| one.state == State::Degraded).collect();
    let unread = |source| {
        findings.iter().filter(|one| one.state == State::Unread && one.source == source).count()
    };
    let (of_the_kernel, of_the_report) = (unread(Source::Kernel), unread(Source::Claimed));
    text.push('\n');
    for finding in &degraded {
        let _infallible =
            writeln!(text, "{} {}: {}", finding.process, finding.layer, finding.remedy);
    }
    if let Some(line) = unread_report.filter(|_| of_the_report > 0) {
        let _infallible = writeln!(text, "{}", printable(&line));
    }
    let root_may = if of_the_kernel > 0 && !geteuid().is_root() { ", root may" } else { "" };
    let verdict = match (degraded.len(), of_the_kernel + of_the_report) {
        (0, 0) => "every layer is in force".to_owned(),
        (degraded, 0) => format!("degraded: {degraded}"),
        (degraded, unread) => {
            format!("degraded: {degraded}; could not be read: {unread}{root_may}")
        }
    };
    let _infallible = writeln!(text, "{verdict}");
    text
}

/// What a terminal shows and does not obey: names of files and the text of a report may have anything in
/// them.
fn printable(text: &str) -> String {
    let shown = |character: char| character == ' ' || character.is_ascii_graphic();
    let escaped = |character: char| match shown(character) {
        true => character.to_string(),
        false => character.escape_default().to_string(),
    };
    text.chars().map(escaped).collect()
}

/// One object; `remedy` only where a layer is degraded.
pub(super) fn json(interface: &str, processes: &Processes, findings: &[Finding]) -> String {
    let findings: Vec<_> = findings.iter().map(object).collect();
    format!(
        "{{\"interface\":{},\"helper\":{},\"dataplane\":{},\"findings\":[{}]}}\n",
        string(interface),
        processes.helper,
        processes.dataplane,
        findings.join(",")
    )
}

fn object(finding: &Finding) -> String {
    let remedy = match finding.state {
        State::Degraded => format!(",\"remedy\":{}", string(&finding.remedy)),
        _ => String::new(),
    };
    let state = match finding.state {
        State::Shown => "shown".to_owned(),
        other => state(other).to_ascii_lowercase(),
    };
    format!(
        "{{\"process\":{},\"layer\":{},\"state\":{},\"source\":{},\"seen\":{}{remedy}}}",
        string(finding.process),
        string(finding.layer),
        string(&state),
        string(source(finding.source)),
        string(&finding.seen)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::remedies::remedy;

    fn finding(state: State, seen: &str) -> Finding {
        Finding {
            process: "dataplane",
            layer: "landlock",
            state,
            source: Source::Claimed,
            seen: seen.to_owned(),
            remedy: remedy("landlock", seen).to_owned(),
        }
    }

    #[test]
    fn a_report_that_cannot_be_read_has_its_remedy_once() {
        let findings = [finding(State::Unread, "x: gone"), finding(State::Unread, "x: gone")];
        let table = table("wg0", &PROCESSES, &findings, Some("x: gone: make it".to_owned()));
        assert!(
            table.ends_with("\nx: gone: make it\ndegraded: 0; could not be read: 2\n"),
            "{table}"
        );
    }

    const PROCESSES: Processes = Processes { helper: 1, dataplane: 2, pidfd: None };

    #[test]
    fn what_was_seen_cannot_steer_a_terminal_or_add_a_line() {
        let findings = [finding(State::Degraded, "\u{1b}[2Japplied\nhelper x\u{202e}\u{9b}")];
        let table = table("wg0", &PROCESSES, &findings, None);
        assert!(table.contains(r"\u{1b}[2Japplied\nhelper x\u{202e}\u{9b}"), "{table}");
        assert!(table.chars().all(|one| one == '\n' || !one.is_control()), "{table}");
        let json = json("wg0", &PROCESSES, &findings);
        assert!(json.trim_end().chars().all(|one| !one.is_control()), "{json}");
    }

    #[test]
    fn a_degraded_layer_comes_with_its_remedy() {
        let findings = [finding(State::Degraded, "unsupported")];
        let table = table("wg0", &PROCESSES, &findings, None);
        assert!(table.contains("DEGRADED  claimed  unsupported"), "{table}");
        assert!(table.contains("boot a kernel with Landlock"), "{table}");
        assert!(table.ends_with("degraded: 1\n"), "{table}");
        assert!(json("wg0", &PROCESSES, &findings).contains("\"remedy\":\"boot"));
        let sound = [finding(State::Applied, "applied")];
        assert!(
            super::table("wg0", &PROCESSES, &sound, None).ends_with("every layer is in force\n")
        );
        assert!(!json("wg0", &PROCESSES, &sound).contains("remedy"));
    }
}
