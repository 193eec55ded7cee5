//! The results as two tables in Markdown: the targets, and every contender's values.

use std::fmt::Write as _;

use crate::quantity::Quantity;
use crate::results::Results;
use crate::statistics::Spread;
use crate::targets::TARGETS;

/// Both tables, and what could not be measured.
pub(crate) fn of(results: &Results) -> String {
    let mut text = targets(results);
    text.push('\n');
    text.push_str(&values(results));
    for failure in &results.failures {
        let (name, measure, reason) = (&failure.contender, &failure.measure, &failure.reason);
        let round = failure.round + 1;
        let _infallible = writeln!(text, "\n{name}, {measure}, round {round}: {reason}");
    }
    if let Some(Spread { median, most, .. }) = results.disturbance() {
        let _infallible = writeln!(
            text,
            "\nOthers used {median:.0} % of the machine meanwhile, and {most:.0} % at most."
        );
    }
    text
}

/// What is wanted, what was found, and whether that is enough.
pub(crate) fn targets(results: &Results) -> String {
    let mut rows = vec![["what", "wgsep", "target", "met"].map(str::to_owned)];
    for target in &TARGETS {
        if let Some(verdict) = target.verdict(results) {
            let met = if verdict.met { "yes" } else { "**no**" };
            let row = [target.title, &verdict.found, &verdict.wanted, met];
            rows.push(row.map(str::to_owned));
        }
    }
    aligned(&rows)
}

/// README's five rows: medians only.
pub(crate) fn summary(results: &Results) -> String {
    const ROWS: [Quantity; 5] = [
        Quantity::TcpForth,
        Quantity::DaemonCpu,
        Quantity::SmallLossless,
        Quantity::PingIdle,
        Quantity::Memory,
    ];
    of_each(results, &ROWS, |spread, digits| format!("{:.digits$}", spread.median))
}

/// Medians, with the least and the most in parentheses.
pub(crate) fn values(results: &Results) -> String {
    of_each(results, &Quantity::OF_EACH, Spread::text)
}

/// A row for each quantity, and a column for each contender.
fn of_each(
    results: &Results,
    quantities: &[Quantity],
    cell: impl Fn(&Spread, usize) -> String,
) -> String {
    let mut first = vec![String::new()];
    first.extend(results.contenders.iter().map(|(name, version)| format!("{name} {version}")));
    let mut rows = vec![first];
    for quantity in quantities {
        let cells: Vec<_> = results
            .contenders
            .iter()
            .map(|(name, _version)| results.spread(name, *quantity))
            .map(|spread| spread.map(|spread| cell(&spread, quantity.digits())))
            .collect();
        if cells.iter().any(Option::is_some) {
            let mut row = vec![quantity.title().to_owned()];
            row.extend(cells.into_iter().map(|cell| cell.unwrap_or_else(|| "–".to_owned())));
            rows.push(row);
        }
    }
    aligned(&rows)
}

/// A table whose columns stand under each other also where it is not rendered.
fn aligned<R: AsRef<[String]>>(rows: &[R]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        widths.resize(widths.len().max(row.as_ref().len()), 3);
        for (width, cell) in widths.iter_mut().zip(row.as_ref()) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (width, cell) in widths.iter().zip(row.as_ref()) {
            let _infallible = write!(text, "| {cell:<width$} ");
        }
        text.push_str("|\n");
        if number == 0 {
            for width in &widths {
                let _infallible = write!(text, "|{:-<1$}", "", width + 2);
            }
            text.push_str("|\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_stand_under_each_other_and_the_first_row_is_the_header() {
        let rows = [["what", "µs"], ["a", "12345"]].map(|row| row.map(str::to_owned));
        let expected = "| what | µs    |\n|------|-------|\n| a    | 12345 |\n";
        assert_eq!(super::aligned(&rows), expected);
    }
}
