//! The results as pictures (SVG). Bars, lines and words are all they are made of, so they are
//! written out here: the smallest crate that draws charts would bring some twenty others.

use std::fmt::Write as _;

use crate::quantity::Quantity;
use crate::results::Results;
use crate::statistics::Spread;

/// For the contenders, in the order of tables.
const COLOURS: [&str; 6] = ["#9e9e9e", "#1565c0", "#2e7d32", "#ef6c00", "#8e24aa", "#6d4c41"];
const WIDTH: f64 = 760.0;
const LEFT: f64 = 130.0;
const BAR: f64 = 18.0;
/// Room for a number behind the longest bar.
const RIGHT: f64 = 110.0;

/// A picture that grows downwards.
struct Picture {
    body: String,
    height: f64,
}

impl Picture {
    fn new(title: &str) -> Self {
        let mut picture = Self { body: String::new(), height: 26.0 };
        picture.words(12.0, 18.0, "start", "bold", title);
        picture
    }

    fn words(&mut self, x: f64, y: f64, anchor: &str, weight: &str, words: &str) {
        let words = words.replace('&', "&amp;").replace('<', "&lt;");
        let _infallible = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" font-weight="{weight}">{words}</text>"#
        );
    }

    fn line(&mut self, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2], colour: &str) {
        let _infallible = writeln!(
            self.body,
            r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="{colour}"/>"#
        );
    }

    fn finish(self) -> String {
        let Self { body, height } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n{body}</svg>\n"
        )
    }
}

/// Bars of these quantities, each with its own scale; the ends of the spread are marked.
pub(crate) fn bars(title: &str, results: &Results, quantities: &[Quantity]) -> String {
    let mut picture = Picture::new(title);
    for quantity in quantities.iter().copied() {
        let spreads: Vec<_> = results
            .contenders
            .iter()
            .zip(COLOURS)
            .filter_map(|((name, _), colour)| Some((name, colour, results.spread(name, quantity)?)))
            .collect();
        if spreads.is_empty() {
            continue;
        }
        picture.height += 22.0;
        let y = picture.height - 6.0;
        picture.words(12.0, y, "start", "normal", quantity.title());
        let most = spreads.iter().map(|(.., spread)| spread.most).fold(f64::MIN_POSITIVE, f64::max);
        for (name, colour, spread) in spreads {
            let scale = (WIDTH - LEFT - RIGHT) / most;
            bar(&mut picture, name, colour, spread, scale, quantity.digits());
        }
    }
    picture.height += 12.0;
    picture.finish()
}

fn bar(picture: &mut Picture, name: &str, colour: &str, spread: Spread, scale: f64, digits: usize) {
    let Spread { least, median, most } = spread;
    let (top, width) = (picture.height, median * scale);
    let (middle, base) = (top + BAR / 2.0, top + BAR - 5.0);
    picture.words(LEFT - 8.0, base, "end", "normal", name);
    let thick = BAR - 4.0;
    let _infallible = writeln!(
        picture.body,
        r#"<rect x="{LEFT}" y="{:.1}" width="{width:.1}" height="{thick}" fill="{colour}"/>"#,
        top + 2.0
    );
    picture.line([LEFT + least * scale, middle], [LEFT + most * scale, middle], "black");
    let behind = LEFT + most * scale + 6.0;
    picture.words(behind, base, "start", "normal", &format!("{median:.digits$}"));
    picture.height += BAR;
}

/// How many small datagrams arrived of how many that were sent, both in thousands a second.
pub(crate) fn loads(title: &str, results: &Results) -> String {
    const PLOT: f64 = 320.0;
    let mut picture = Picture::new(title);
    let top = picture.height + 8.0;
    let bottom = top + PLOT;
    let largest = |value: fn(&crate::results::Load) -> f64| {
        results.loads.iter().map(value).fold(1.0, f64::max)
    };
    let (widest, highest) = (largest(|load| load.offered), largest(|load| load.delivered));
    let x = |offered: f64| LEFT + offered / widest * (WIDTH - LEFT - RIGHT);
    let y = |delivered: f64| bottom - delivered / highest * PLOT;
    picture.line([LEFT, bottom], [x(widest), bottom], "black");
    picture.line([LEFT, bottom], [LEFT, top], "black");
    let equal = widest.min(highest);
    picture.line([LEFT, bottom], [x(equal), y(equal)], "#cccccc");
    for part in 1..=4 {
        let share = f64::from(part) / 4.0;
        let (offered, delivered) = (widest * share, highest * share);
        let label = format!("{:.0}", offered / 1000.0);
        picture.words(x(offered), bottom + 16.0, "middle", "normal", &label);
        let label = format!("{:.0}", delivered / 1000.0);
        picture.words(LEFT - 8.0, y(delivered) + 4.0, "end", "normal", &label);
    }
    picture.words(x(widest), bottom + 34.0, "end", "normal", "kpps sent");
    picture.words(12.0, top + 4.0, "start", "normal", "kpps arrived");
    for (number, ((name, _), colour)) in results.contenders.iter().zip(COLOURS).enumerate() {
        let of_it = results.loads.iter().filter(|load| load.contender == *name);
        for load in of_it {
            let (x, y) = (x(load.offered), y(load.delivered));
            let _infallible = writeln!(
                picture.body,
                r#"<circle cx="{x:.1}" cy="{y:.1}" r="3.5" fill="{colour}"/>"#
            );
        }
        let line = top + 18.0 * number as f64;
        let _infallible = writeln!(
            picture.body,
            r#"<circle cx="{:.1}" cy="{line:.1}" r="4" fill="{colour}"/>"#,
            WIDTH - RIGHT + 12.0
        );
        picture.words(WIDTH - RIGHT + 22.0, line + 4.0, "start", "normal", name);
    }
    picture.height = bottom + 44.0;
    picture.finish()
}
