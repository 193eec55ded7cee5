//! README's section on speed, written anew from the results of a run.

use std::fs;
use std::path::Path;

use crate::quantity::Quantity::{
    DaemonCpu, LargeOverload, SmallLossless, SmallOverload, TcpBack, TcpForth, TcpFour,
};
use crate::results::Results;
use crate::{chart, table};

const BEGIN: &str = "<!-- make bench-readme: from here -->\n";
const END: &str = "<!-- make bench-readme: to here -->\n";
/// Where README's charts and results are, from the root of the source.
const KEPT: &str = "tests/speed/results";

/// What others may use of the machine, in percent, before numbers have to be taken with care.
const MOST_DISTURBED: f64 = 10.0;

/// The charts of a run, by the name of their file.
pub(crate) fn charts(results: &Results) -> Vec<(&'static str, String)> {
    let tcp = [TcpForth, TcpBack, TcpFour, DaemonCpu];
    let udp = [SmallLossless, SmallOverload, LargeOverload];
    let mut charts = vec![
        ("tcp.svg", chart::bars("TCP, and what a byte costs", results, &tcp)),
        ("udp.svg", chart::bars("UDP", results, &udp)),
    ];
    if !results.loads.is_empty() {
        let title = "UDP of 64 bytes: sent and arrived";
        charts.push(("overload.svg", chart::loads(title, results)));
    }
    charts
}

/// Puts the results of a file into README, and keeps them with their charts beside the source.
///
/// # Errors
///
/// Which file could not be read, understood or written.
pub(crate) fn publish(file: &Path) -> Result<(), String> {
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |error: std::io::Error| format!("{path}: {error}")
    };
    let text = fs::read_to_string(file).map_err(failed(file))?;
    let results: Results =
        serde_json::from_str(&text).map_err(|error| format!("{}: {error}", file.display()))?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let kept = root.join(KEPT);
    fs::create_dir_all(&kept).map_err(failed(&kept))?;
    for (name, chart) in charts(&results) {
        let path = kept.join(name);
        fs::write(&path, chart).map_err(failed(&path))?;
    }
    let path = kept.join("results.json");
    fs::write(&path, text).map_err(failed(&path))?;
    let path = root.join("README.md");
    let readme = fs::read_to_string(&path).map_err(failed(&path))?;
    let readme = replaced(&readme, &section(&results))
        .ok_or_else(|| format!("{} lacks its two marks: {BEGIN}{END}", path.display()))?;
    fs::write(&path, readme).map_err(failed(&path))
}

/// The text with another section between its marks.
fn replaced(readme: &str, section: &str) -> Option<String> {
    let (before, rest) = readme.split_once(BEGIN)?;
    let (_old, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}{section}{END}{after}"))
}

fn section(results: &Results) -> String {
    let Results { date, command, commit, machine, veth, rounds, .. } = results;
    let processor = format!("{} processors {}", machine.processors, machine.processor);
    let system = format!("Linux {}, {}", machine.kernel, machine.system);
    let disturbance = results.disturbance();
    let (median, most) = disturbance.map_or((0.0, 0.0), |spread| (spread.median, spread.most));
    let veth = veth.name();
    let mut text = format!(
        "{date}, `{command}` of {commit}: {processor}, {system}; veth offloads {veth}; medians of \
         {rounds} rounds, least and most in parentheses. Others used {median:.0} % of the machine \
         meanwhile, and {most:.0} % at most.\n\n"
    );
    if median > MOST_DISTURBED {
        text.push_str(
            "**The machine was not quiet: of these, only large differences mean anything.**\n\n",
        );
    }
    text.push_str(&table::targets(results));
    text.push_str("\nThe same run in numbers, each program at both ends:\n\n");
    text.push_str(&table::values(results));
    text.push('\n');
    for (name, _) in charts(results) {
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
}
