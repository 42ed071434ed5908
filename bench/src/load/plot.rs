//! Plots as SVG, by our own hand: two kinds are all there are. Pure.
//!
//! Text and lines are of the colour of the page around them where that is known, and of a grey that is readable on light and dark elsewhere.

use std::fmt::Write;

use crate::measure::{Distribution, Series};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 52.0;
const BOTTOM: f64 = 44.0;
/// Lines are told apart on light and on dark, and by those who see few colours (Okabe and Ito's, the readable ones).
const COLOURS: [&str; 8] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f7f7f", "#8c564b"];

/// A named line of points.
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scale {
    Linear,
    Logarithmic,
}

struct Axis<'a> {
    title: &'a str,
    scale: Scale,
    from: f64,
    to: f64,
    /// Where it is marked, and with what.
    marks: Vec<(f64, String)>,
}

impl Axis<'_> {
    /// Where a value lies, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let on_scale = |value: f64| match self.scale {
            Scale::Linear => value,
            Scale::Logarithmic => value.max(f64::MIN_POSITIVE).log10(),
        };
        let (from, to) = (on_scale(self.from), on_scale(self.to));
        ((on_scale(value) - from) / (to - from)).clamp(0.0, 1.0)
    }
}

/// How long things took: the part of all that took longer, ever rarer to the right, both on logarithmic scales.
pub(crate) fn latencies<'a>(title: &str, all: impl IntoIterator<Item = (String, &'a Distribution)>) -> String {
    let lines: Vec<Line> = all
        .into_iter()
        .map(|(name, distribution)| Line {
            name,
            // 1 would be infinitely far.
            points: distribution
                .quantiles
                .iter()
                .map(|(part, us)| (1.0 - part, *us as f64))
                .filter(|(rest, _)| *rest > 1e-9)
                .collect(),
        })
        .collect();
    let rarest = lines.iter().flat_map(|line| &line.points).map(|(rest, _)| *rest).fold(0.1, f64::min);
    let (mut marks, mut rest) = (vec![(1.0, "0".to_owned()), (0.5, "p50".to_owned())], 0.1);
    while rest >= rarest / 1.01 {
        marks.push((rest, format!("p{}", percentile(100.0 * (1.0 - rest)))));
        rest /= 10.0;
    }
    let across = Axis { title: "", scale: Scale::Logarithmic, from: 1.0, to: rarest, marks };
    let values = || lines.iter().flat_map(|line| &line.points).map(|(_, us)| us.max(1.0));
    let from = 10_f64.powf(values().fold(f64::INFINITY, f64::min).min(1e9).log10().floor());
    let to = 10_f64.powf(values().fold(from * 10.0, f64::max).log10().ceil());
    let (mut marks, mut us) = (Vec::new(), from);
    while us <= to * 1.01 {
        marks.push((us, time(us)));
        us *= 10.0;
    }
    let up = Axis { title: "within", scale: Scale::Logarithmic, from, to, marks };
    plot(title, &across, &up, &lines)
}

/// How many a second, over time.
pub(crate) fn over_time<'a>(title: &str, all: impl IntoIterator<Item = (String, &'a Series)>) -> String {
    let lines: Vec<Line> = all
        .into_iter()
        .map(|(name, series)| {
            let step_s = series.step_ms as f64 / 1e3;
            let middles = (0..).map(|step| (f64::from(step) + 0.5) * step_s);
            Line { name, points: middles.zip(series.per_s()).collect() }
        })
        .collect();
    let seconds = lines.iter().flat_map(|line| &line.points).map(|(at, _)| *at).fold(0.1, f64::max);
    let most = lines.iter().flat_map(|line| &line.points).map(|(_, per_s)| *per_s).fold(1.0, f64::max);
    let across = linear("seconds", seconds);
    plot(title, &across, &linear("a second", most), &lines)
}

/// Any values over something that grows, such as users, on a logarithmic scale.
pub(crate) fn growth(title: &str, across: &str, up: &str, lines: &[Line]) -> String {
    let all = || lines.iter().flat_map(|line| &line.points);
    let from = all().map(|(x, _)| *x).fold(f64::INFINITY, f64::min).max(1.0);
    let to = all().map(|(x, _)| *x).fold(from * 10.0, f64::max);
    let mut marks: Vec<(f64, String)> = all().map(|(x, _)| (*x, short(*x))).collect();
    marks.sort_by(|one, other| one.0.total_cmp(&other.0));
    marks.dedup();
    let across = Axis { title: across, scale: Scale::Logarithmic, from, to, marks };
    let most = all().map(|(_, y)| *y).fold(f64::MIN_POSITIVE, f64::max);
    plot(title, &across, &linear(up, most), lines)
}

fn linear(title: &str, to: f64) -> Axis<'_> {
    // 1, 2 or 5 times a power of ten, so that there are 4 to 10 marks.
    let power = 10_f64.powf((to / 5.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| to / step <= 8.0);
    let step = step.unwrap_or(power * 10.0);
    let marks = (0..=10).map(|nth| f64::from(nth) * step).take_while(|at| *at <= to * 1.001).map(|at| (at, short(at)));
    Axis { title, scale: Scale::Linear, from: 0.0, to, marks: marks.collect() }
}

fn plot(title: &str, across: &Axis<'_>, up: &Axis<'_>, lines: &[Line]) -> String {
    let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    let x = |value: f64| LEFT + across.place(value) * (right - LEFT);
    let y = |value: f64| bottom - up.place(value) * (bottom - TOP);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         font-family=\"system-ui,sans-serif\" font-size=\"12\" fill=\"#808080\"><title>{}</title>",
        escaped(title)
    );
    let mut add = |text: std::fmt::Arguments<'_>| svg.write_fmt(text).unwrap_or(());
    let middle = (LEFT + right) / 2.0;
    add(format_args!("<text x=\"{LEFT}\" y=\"16\" font-size=\"14\" font-weight=\"600\">{}</text>", escaped(title)));
    for (value, mark) in &across.marks {
        let x = x(*value);
        add(format_args!("<path d=\"M{x:.1} {TOP}V{bottom}\" stroke=\"#808080\" stroke-opacity=\".2\"/>"));
        add(format_args!("<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{mark}</text>", bottom + 16.0));
    }
    for (value, mark) in &up.marks {
        let y = y(*value);
        add(format_args!("<path d=\"M{LEFT} {y:.1}H{right}\" stroke=\"#808080\" stroke-opacity=\".2\"/>"));
        add(format_args!("<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{mark}</text>", LEFT - 6.0, y + 4.0));
    }
    add(format_args!(
        "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
        HEIGHT - 10.0,
        across.title
    ));
    let (title_x, title_y) = (14.0, (TOP + bottom) / 2.0);
    add(format_args!(
        "<text x=\"{title_x}\" y=\"{title_y:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 {title_x} {title_y:.1})\">{}</text>",
        up.title
    ));
    let mut legend_x = LEFT;
    for (nth, line) in lines.iter().enumerate() {
        let colour = COLOURS[nth % COLOURS.len()];
        let path: Vec<String> = line.points.iter().map(|(px, py)| format!("{:.1} {:.1}", x(*px), y(*py))).collect();
        if !path.is_empty() {
            let path = path.join("L");
            add(format_args!(
                "<path d=\"M{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.8\" stroke-linejoin=\"round\"/>"
            ));
        }
        add(format_args!("<text x=\"{legend_x:.1}\" y=\"36\" fill=\"{colour}\">{}</text>", escaped(&line.name)));
        legend_x += 7.2 * line.name.chars().count() as f64 + 14.0;
    }
    svg + "</svg>\n"
}

pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Microseconds as people say them.
pub(crate) fn time(us: f64) -> String {
    match us {
        ..1e3 => format!("{} µs", rounded(us)),
        ..1e6 => format!("{} ms", rounded(us / 1e3)),
        _ => format!("{} s", rounded(us / 1e6)),
    }
}

/// Three digits are what a measurement is good for.
pub(crate) fn rounded(number: f64) -> String {
    let magnitude = if number == 0.0 { 0.0 } else { number.abs().log10().floor() };
    match magnitude {
        ..-2.0 => format!("{number:.4}"),
        -2.0..0.0 => format!("{number:.3}"),
        0.0..1.0 => trimmed(format!("{number:.2}")),
        1.0..2.0 => trimmed(format!("{number:.1}")),
        _ => format!("{number:.0}"),
    }
}

/// With all its nines.
fn percentile(number: f64) -> String {
    trimmed(format!("{number:.6}"))
}

fn trimmed(text: String) -> String {
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A number for an axis.
fn short(number: f64) -> String {
    match number {
        1e6.. => format!("{} M", rounded(number / 1e6)),
        1e4.. => format!("{} k", rounded(number / 1e3)),
        _ => rounded(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_as_people_write_them() {
        let cases = [
            (0.0, "0"),
            (0.5, "0.500"),
            (2.0, "2"),
            (2.25, "2.25"),
            (31.25, "31.2"),
            (99.18, "99.2"),
            (12_345.6, "12346"),
        ];
        for (number, text) in cases {
            assert_eq!(rounded(number), text);
        }
        assert_eq!([50.0, 99.0, 99.999].map(percentile), ["50", "99", "99.999"]);
        assert_eq!([120.0, 2_500.0, 3e6].map(time), ["120 µs", "2.5 ms", "3 s"]);
        assert_eq!([500.0, 20_000.0, 1e7].map(short), ["500", "20 k", "10 M"]);
    }

    #[test]
    fn a_plot_has_its_lines_inside_its_frame() {
        let series = Series { step_ms: 100, counts: vec![0, 10, 20, 5] };
        let svg = over_time("<delivered>", [("a&b".to_owned(), &series)]);
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("&lt;delivered&gt;") && svg.contains("a&amp;b"), "{svg}");
        let path = svg.split("<path d=\"M").find(|path| path.contains("fill=\"none\"")).unwrap();
        let points = path.split('"').next().unwrap().split('L').map(|point| {
            let (x, y) = point.split_once(' ').unwrap();
            (x.parse::<f64>().unwrap(), y.parse::<f64>().unwrap())
        });
        let points: Vec<(f64, f64)> = points.collect();
        assert_eq!(points.len(), 4);
        let inside = |(x, y): &(f64, f64)| (LEFT..=WIDTH - RIGHT).contains(x) && (TOP..=HEIGHT - BOTTOM).contains(y);
        assert!(points.iter().all(inside), "{points:?}");
        assert!(points.is_sorted_by(|one, other| one.0 < other.0));
    }

    #[test]
    fn rare_latencies_are_seen() {
        let mut latencies_us = crate::measure::Latencies::new().unwrap();
        (1..=100_000).for_each(|us| latencies_us.record(us));
        let svg = latencies("delivery", [("x".to_owned(), &latencies_us.distribution())]);
        for mark in ["p50", "p90", "p99", "p99.9", "p99.99", "1 µs", "100 ms"] {
            assert!(svg.contains(&format!(">{mark}<")), "{mark}: {svg}");
        }
        // Nothing was measured: there is a frame, and no line.
        let empty = latencies("delivery", [("x".to_owned(), &Distribution::default())]);
        assert!(!empty.contains("NaN") && !empty.contains("inf"), "{empty}");
    }

    #[test]
    fn what_grows_is_marked_where_it_was_measured() {
        let line = Line { name: "chatd".to_owned(), points: vec![(100.0, 6.0), (20_000.0, 7.0)] };
        let svg = growth("cost", "users", "µs", &[line]);
        assert!(svg.contains(">100<") && svg.contains(">20 k<"), "{svg}");
    }
}
