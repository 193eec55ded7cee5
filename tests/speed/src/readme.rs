//! The documents' sections on speed, written anew from the results of a run: README has a chart and five
//! rows, `tests/speed/README.md` has all tables and charts.

use std::fs;
use std::path::Path;

use crate::quantity::Quantity::{
    DaemonCpu, LargeOverload, SmallLossless, SmallOverload, TcpBack, TcpForth, TcpFour,
};
use crate::results::Results;
use crate::{chart, table};

const BEGIN: &str = "<!-- make bench-readme: from here -->\n";
const END: &str = "<!-- make bench-readme: to here -->\n";
/// The document with all tables, from the root of the source; the results are kept beside it.
const SPEED: &str = "tests/speed";
const KEPT: &str = "results";
/// The chart in README.
const SUMMARY: &str = "summary.svg";

/// What others may use of the machine, in percent, before numbers have to be taken with care.
const MOST_DISTURBED: f64 = 10.0;

/// The charts of a run, by the name of their file.
pub(crate) fn charts(results: &Results) -> Vec<(&'static str, String)> {
    let tcp = [TcpForth, TcpBack, TcpFour, DaemonCpu];
    let udp = [SmallLossless, SmallOverload, LargeOverload];
    let mut charts = vec![
        (SUMMARY, chart::bars("TCP and small UDP datagrams", results, &[TcpForth, SmallLossless])),
        ("tcp.svg", chart::bars("TCP, and what a byte costs", results, &tcp)),
        ("udp.svg", chart::bars("UDP", results, &udp)),
    ];
    if !results.loads.is_empty() {
        let title = "UDP of 64 bytes: sent and arrived";
        charts.push(("overload.svg", chart::loads(title, results)));
    }
    charts
}

/// Puts the results of a file into both documents, and keeps them with their charts beside the source.
///
/// # Errors
///
/// Which file could not be read, understood or written.
pub(crate) fn publish(file: &Path) -> Result<(), String> {
    let text = fs::read_to_string(file).map_err(failed(file))?;
    let results: Results =
        serde_json::from_str(&text).map_err(|error| format!("{}: {error}", file.display()))?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let kept = root.join(SPEED).join(KEPT);
    fs::create_dir_all(&kept).map_err(failed(&kept))?;
    for (name, chart) in charts(&results) {
        let path = kept.join(name);
        fs::write(&path, chart).map_err(failed(&path))?;
    }
    let path = kept.join("results.json");
    fs::write(&path, text).map_err(failed(&path))?;
    replace(&root.join("README.md"), &summary(&results))?;
    replace(&root.join(SPEED).join("README.md"), &section(&results))
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> String {
    let path = path.display().to_string();
    move |error| format!("{path}: {error}")
}

/// Writes another section between the marks of a document.
fn replace(document: &Path, section: &str) -> Result<(), String> {
    let text = fs::read_to_string(document).map_err(failed(document))?;
    let text = replaced(&text, section)
        .ok_or_else(|| format!("{} lacks its two marks: {BEGIN}{END}", document.display()))?;
    fs::write(document, text).map_err(failed(document))
}

/// The text with another section between its marks.
fn replaced(readme: &str, section: &str) -> Option<String> {
    let (before, rest) = readme.split_once(BEGIN)?;
    let (_old, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}{section}{END}{after}"))
}

/// What was measured, when, and on which machine.
fn origin(results: &Results) -> String {
    let Results { date, command, commit, machine, rounds, .. } = results;
    let processor = format!("{} processors {}", machine.processors, machine.processor);
    let system = format!("Linux {}, {}", machine.kernel, machine.system);
    format!("{date}, `{command}` of {commit}: {processor}, {system}; medians of {rounds} rounds")
}

/// A warning where numbers have to be taken with care.
fn warning(results: &Results) -> &'static str {
    match results.disturbance() {
        Some(spread) if spread.median > MOST_DISTURBED => {
            "**The machine was not quiet: only large differences are meaningful.**\n\n"
        }
        _ => "",
    }
}

/// README's section.
fn summary(results: &Results) -> String {
    let (origin, warning, rows) = (origin(results), warning(results), table::summary(results));
    format!("{origin}.\n\n{warning}{rows}\n![{SUMMARY}]({SPEED}/{KEPT}/{SUMMARY})\n")
}

/// The section with all tables and charts.
fn section(results: &Results) -> String {
    let (origin, veth) = (origin(results), results.veth.name());
    let disturbance = results.disturbance();
    let (median, most) = disturbance.map_or((0.0, 0.0), |spread| (spread.median, spread.most));
    let mut text = format!(
        "{origin}, minimum and maximum in parentheses; veth offloads {veth}; background load {median:.0} %, at \
         most {most:.0} %.\n\n"
    );
    text.push_str(warning(results));
    text.push_str(&table::targets(results));
    text.push_str("\nThe same run in numbers, each program at both ends:\n\n");
    text.push_str(&table::values(results));
    text.push('\n');
    for (name, _) in charts(results).into_iter().filter(|(name, _)| *name != SUMMARY) {
        text.push_str(&format!("![{name}]({KEPT}/{name})\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_is_replaced() {
        let readme = format!("a\n{BEGIN}old\n{END}b\n");
        assert_eq!(replaced(&readme, "new\n"), Some(format!("a\n{BEGIN}new\n{END}b\n")));
        assert_eq!(replaced("a\n", "new\n"), None);
    }

    /// The documents as they are have the sections that the kept results give.
    #[test]
    fn both_documents_have_the_sections_of_the_kept_results() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let kept = root.join(SPEED).join(KEPT);
        let text = fs::read_to_string(kept.join("results.json")).unwrap();
        let results: Results = serde_json::from_str(&text).unwrap();
        for (document, section) in [
            (root.join("README.md"), summary(&results)),
            (root.join(SPEED).join("README.md"), section(&results)),
        ] {
            let text = fs::read_to_string(&document).unwrap();
            let expected = replaced(&text, &section).unwrap();
            assert!(text == expected, "{}: run `make bench-readme`", document.display());
        }
        for (name, chart) in charts(&results) {
            assert_eq!(fs::read_to_string(kept.join(name)).unwrap(), chart, "{name}");
        }
    }
}
