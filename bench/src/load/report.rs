//! Many runs as one document: medians and ratios in tables, and plots. And the check of ratios that continuous integration makes.
//!
//! What is no figure comes from a template. In it stand, in double braces:
//!
//! - `value pairs:chatd delivered_per_s`: the median of a figure, of a scenario and a label
//! - `ratio pairs:chatd pairs:mosquitto delivered_per_s`: of two; a second figure, if it is of another name, stands behind the first
//! - `table pairs | delivered_per_s as a second | delivered_per_s of mosquitto as × Mosquitto`: a row for each label, in the order of facts
//! - `latencies pairs delivery | title`, `over-time pairs delivered | title`: a plot with a line for each label
//! - `growth users- senders server_cpu_us_per_message | title`: a plot over all scenarios that begin so, with a figure across and one upwards
//! - `command pairs:chatd`: what was run
//! - `broken`: who broke which promise in which scenario, a line each
//! - `fact kernel`: what was told with `--facts`
//!
//! What was not measured is a dash.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::measure::median;
use crate::outcome::Outcome;
use crate::plot::{self, Line, rounded};

/// A document with tables and plots, of the results of many runs.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Results of other modes, as JSON.
    results: Vec<PathBuf>,
    /// The text, with {{what is measured}} in double braces.
    #[arg(long)]
    template: PathBuf,
    /// Lines of name=value; that of "labels" has the brokers in their order, with commas between.
    #[arg(long)]
    facts: Option<PathBuf>,
    /// The document.
    #[arg(long)]
    out: PathBuf,
    /// Folder for the plots, below the document's.
    #[arg(long)]
    plots: PathBuf,
}

/// Fails unless ratios are as they should be.
#[derive(clap::Args, Debug)]
pub(crate) struct Check {
    /// Results of other modes, as JSON.
    results: Vec<PathBuf>,
    /// A ratio as in a report's template, and how much it is at least: "pairs:chatd pairs:mosquitto delivered_per_s 0.5".
    #[arg(long)]
    at_least: Vec<String>,
}

type Facts = BTreeMap<String, String>;

const NOT_MEASURED: &str = "–";

/// Runs by scenario and label.
struct Results {
    runs: BTreeMap<(String, String), Vec<Outcome>>,
    labels: Vec<String>,
}

impl Results {
    fn read(paths: &[PathBuf], mut labels: Vec<String>) -> Result<Self> {
        let mut runs: BTreeMap<(String, String), Vec<Outcome>> = BTreeMap::new();
        for path in paths {
            let outcome = Outcome::read(path)?;
            if !labels.contains(&outcome.label) {
                labels.push(outcome.label.clone());
            }
            runs.entry((outcome.scenario.clone(), outcome.label.clone())).or_default().push(outcome);
        }
        Ok(Self { runs, labels })
    }

    fn of(&self, scenario: &str, label: &str) -> &[Outcome] {
        self.runs.get(&(scenario.to_owned(), label.to_owned())).map_or(&[], Vec::as_slice)
    }

    fn median(&self, scenario: &str, label: &str, figure: &str) -> Option<f64> {
        median(self.of(scenario, label).iter().filter_map(|run| run.figure(figure)).collect())
    }

    /// `scenario:label`, and a figure.
    fn value(&self, whose: &str, figure: &str) -> Result<Option<f64>> {
        let (scenario, label) = whose.split_once(':').with_context(|| format!("{whose} is no scenario:label"))?;
        Ok(self.median(scenario, label, figure))
    }

    /// Of two medians; `None` if one was not measured.
    fn ratio(&self, one: &str, other: &str, figure: &str, other_figure: &str) -> Result<Option<f64>> {
        let both = self.value(one, figure)?.zip(self.value(other, other_figure)?);
        Ok(both.filter(|(_, below)| *below != 0.0).map(|(above, below)| above / below))
    }

    /// The run in the middle by its main figure, for plots, of each label.
    fn typical<'a>(&'a self, scenario: &'a str) -> impl Iterator<Item = (String, &'a Outcome)> {
        self.labels.iter().filter_map(move |label| {
            let mut runs: Vec<&Outcome> = self.of(scenario, label).iter().collect();
            let main = |run: &Outcome| run.figure("delivered_per_s").unwrap_or_default();
            runs.sort_by(|one, other| main(one).total_cmp(&main(other)));
            Some((label.clone(), *runs.get(runs.len().checked_sub(1)? / 2)?))
        })
    }

    /// Label, scenario and sentence of every broken promise, of the worst of its runs.
    fn broken(&self) -> String {
        let mut lines = Vec::new();
        for ((scenario, label), runs) in &self.runs {
            let broken = runs.iter().filter(|run| !run.faults.is_none());
            let (count, all) = (broken.clone().count(), runs.len());
            if let Some(run) = broken.max_by_key(|run| run.faults.lost + run.faults.gaps + run.faults.repeats) {
                lines.push(format!("- {label}, {scenario}: {} (in {count} of {all} runs)", run.faults.sentence()));
            }
        }
        if lines.is_empty() { "Nobody, in any run.".to_owned() } else { lines.join("\n") }
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let facts: Facts = match &options.facts {
        Some(path) => read(path)?.lines().filter_map(|line| line.split_once('=')).map(owned).collect(),
        None => Facts::default(),
    };
    let labels = facts.get("labels").map(|labels| labels.split(',').map(str::to_owned).collect());
    let results = Results::read(&options.results, labels.unwrap_or_default())?;
    std::fs::create_dir_all(&options.plots)?;
    let folder = options.out.parent().unwrap_or(Path::new(""));
    let link = options.plots.strip_prefix(folder).unwrap_or(&options.plots).display().to_string();
    let mut plots = BTreeMap::new();
    let text = fill(&read(&options.template)?, &results, &facts, &link, &mut plots)?;
    for (name, svg) in plots {
        std::fs::write(options.plots.join(name), svg)?;
    }
    std::fs::write(&options.out, text).with_context(|| options.out.display().to_string())
}

fn owned((name, value): (&str, &str)) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// The document; its plots by file name.
fn fill(
    template: &str,
    results: &Results,
    facts: &Facts,
    link: &str,
    plots: &mut BTreeMap<String, String>,
) -> Result<String> {
    let mut text = String::new();
    let mut rest = template;
    while let Some((before, behind)) = rest.split_once("{{") {
        let (asked, behind) = behind.split_once("}}").context("{{ without }}")?;
        text += before;
        text += &answer(asked.trim(), results, facts, link, plots).with_context(|| format!("{{{{{asked}}}}}"))?;
        rest = behind;
    }
    Ok(text + rest)
}

fn answer(
    asked: &str,
    results: &Results,
    facts: &Facts,
    link: &str,
    plots: &mut BTreeMap<String, String>,
) -> Result<String> {
    let (head, tail) = asked.split_once('|').map_or((asked, ""), |(head, tail)| (head.trim(), tail.trim()));
    let words: Vec<&str> = head.split_whitespace().collect();
    let mut picture = |name: String, svg: String| {
        plots.insert(name.clone(), svg);
        Ok(format!("![{tail}]({link}/{name})"))
    };
    match words[..] {
        ["fact", name] => Ok(facts.get(name).cloned().unwrap_or_else(|| NOT_MEASURED.to_owned())),
        ["broken"] => Ok(results.broken()),
        ["value", whose, figure] => Ok(shown(figure, results.value(whose, figure)?)),
        ["ratio", one, other, figure] => Ok(shown_ratio(results.ratio(one, other, figure, figure)?)),
        ["ratio", one, other, figure, other_figure] => {
            Ok(shown_ratio(results.ratio(one, other, figure, other_figure)?))
        }
        ["command", whose] => {
            let (scenario, label) = whose.split_once(':').context("no scenario:label")?;
            let run = results.of(scenario, label).first();
            Ok(run.map_or_else(|| NOT_MEASURED.to_owned(), |run| format!("chat-bench {}", quoted(&run.command))))
        }
        ["table", scenario] => table(scenario, tail, results),
        ["latencies", scenario, name] => {
            let all = results.typical(scenario).filter_map(|(label, run)| Some((label, run.latencies.get(name)?)));
            picture(format!("{scenario}-{name}-latencies.svg"), plot::latencies(tail, all))
        }
        ["over-time", scenario, name] => {
            let all = results.typical(scenario).filter_map(|(label, run)| Some((label, run.series.get(name)?)));
            picture(format!("{scenario}-{name}-over-time.svg"), plot::over_time(tail, all))
        }
        ["growth", begin, across, up] => {
            let (title, axes) = tail.split_once('|').unwrap_or((tail, ""));
            let (across_title, up_title) = axes.split_once('|').unwrap_or((axes, ""));
            let svg =
                plot::growth(title.trim(), across_title.trim(), up_title.trim(), &growth(results, begin, across, up));
            plots.insert(format!("{begin}{up}.svg"), svg);
            Ok(format!("![{}]({link}/{begin}{up}.svg)", title.trim()))
        }
        _ => bail!("nothing of this kind is known"),
    }
}

fn growth(results: &Results, begin: &str, across: &str, up: &str) -> Vec<Line> {
    let scenarios = || results.runs.keys().filter(|(scenario, _)| scenario.starts_with(begin));
    let line = |label: &String| {
        let mut points: Vec<(f64, f64)> = scenarios()
            .filter(|(_, whose)| whose == label)
            .filter_map(|(scenario, _)| {
                results.median(scenario, label, across).zip(results.median(scenario, label, up))
            })
            .collect();
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        Line { name: label.clone(), points }
    };
    results.labels.iter().map(line).filter(|line| !line.points.is_empty()).collect()
}

/// `figure as title`, or `figure of label as title` for the ratio to that label's.
fn table(scenario: &str, columns: &str, results: &Results) -> Result<String> {
    let mut parsed = Vec::new();
    for column in columns.split('|') {
        let (what, title) = column.split_once(" as ").with_context(|| format!("{column:?} has no title"))?;
        let (figure, base) = match what.trim().split_once(" of ") {
            Some((figure, base)) => (figure.trim(), Some(base.trim())),
            None => (what.trim(), None),
        };
        parsed.push((figure, base, title.trim()));
    }
    let titles: Vec<&str> = parsed.iter().map(|(.., title)| *title).collect();
    let mut text = format!("| | {} |\n|---|{}\n", titles.join(" | "), "---:|".repeat(titles.len()));
    for label in &results.labels {
        if results.of(scenario, label).is_empty() {
            continue;
        }
        let cell = |(figure, base, _): &(&str, Option<&str>, &str)| {
            let value = results.median(scenario, label, figure);
            match base {
                None => shown(figure, value),
                Some(base) => {
                    let below = results.median(scenario, base, figure).filter(|below| *below != 0.0);
                    shown_ratio(value.zip(below).map(|(above, below)| above / below))
                }
            }
        };
        let cells: Vec<String> = parsed.iter().map(cell).collect();
        text += &format!("| {label} | {} |\n", cells.join(" | "));
    }
    Ok(text.trim_end().to_owned())
}

/// By the unit at the end of its name.
fn shown(figure: &str, value: Option<f64>) -> String {
    let Some(value) = value else { return NOT_MEASURED.to_owned() };
    if figure.ends_with("_us") {
        return plot::time(value);
    }
    if figure.ends_with("_ms") {
        return plot::time(value * 1e3);
    }
    if figure.ends_with("_per_s") {
        return grouped(value);
    }
    if figure.ends_with("_s") {
        return plot::time(value * 1e6);
    }
    if figure.contains("_bytes") {
        return match value {
            1e6.. => format!("{} MB", rounded(value / 1e6)),
            _ => format!("{} KB", rounded(value / 1e3)),
        };
    }
    rounded(value)
}

/// Three digits, the rest zeros, in groups of three.
fn grouped(value: f64) -> String {
    if value < 1_000.0 {
        return rounded(value);
    }
    let unit = 10_f64.powf(value.log10().floor() - 2.0);
    let digits = format!("{:.0}", (value / unit).round() * unit);
    let mut text = String::new();
    for (nth, digit) in digits.chars().enumerate() {
        if nth > 0 && (digits.len() - nth).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn shown_ratio(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| NOT_MEASURED.to_owned(), |ratio| format!("{} ×", rounded(ratio)))
}

/// As a shell would take it.
fn quoted(arguments: &[String]) -> String {
    let is_plain = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || "-_./:=,".contains(c));
    let quote = |text: &String| if is_plain(text) { text.clone() } else { format!("'{text}'") };
    arguments.iter().map(quote).collect::<Vec<_>>().join(" ")
}

pub(crate) fn check(options: &Check) -> Result<()> {
    let results = Results::read(&options.results, Vec::new())?;
    ensure!(!options.at_least.is_empty(), "there is nothing to check: --at-least");
    let mut broken = Vec::new();
    for bound in &options.at_least {
        let (said, is_kept) = judge(bound, &results).with_context(|| bound.clone())?;
        println!("{said}");
        if !is_kept {
            broken.push(said);
        }
    }
    ensure!(broken.is_empty(), "slower than it should be: {}", broken.join("; "));
    Ok(())
}

/// A sentence, and whether the bound is kept.
fn judge(bound: &str, results: &Results) -> Result<(String, bool)> {
    let words: Vec<&str> = bound.split_whitespace().collect();
    let (one, other, figure, other_figure, least) = match words[..] {
        [one, other, figure, least] => (one, other, figure, figure, least),
        [one, other, figure, other_figure, least] => (one, other, figure, other_figure, least),
        _ => bail!("no \"scenario:label scenario:label figure ratio\""),
    };
    let least: f64 = least.parse()?;
    let ratio = results.ratio(one, other, figure, other_figure)?.context("one of both was not measured")?;
    let said = format!("{figure} of {one} is {} times that of {other}, at least {least} is wanted", rounded(ratio));
    Ok((said, ratio >= least))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{Latencies, Series};
    use crate::verify::Faults;

    fn outcome(scenario: &str, label: &str, per_s: f64) -> Outcome {
        let mut outcome = Outcome { scenario: scenario.to_owned(), label: label.to_owned(), ..Outcome::default() };
        outcome.command = ["pairs", "--send-topic", "bench/{to}"].map(str::to_owned).to_vec();
        outcome.set("delivered_per_s", per_s);
        outcome.set("senders", per_s / 10.0);
        let mut latencies = Latencies::new().unwrap();
        (1..=100).for_each(|us| latencies.record(us * 100));
        outcome.set_latencies("delivery", latencies.distribution());
        outcome.series.insert("delivered".to_owned(), Series { step_ms: 100, counts: vec![1, 2, 3] });
        outcome
    }

    fn results() -> Results {
        let mut runs: BTreeMap<_, Vec<_>> = BTreeMap::new();
        let mut faulty = outcome("pairs", "rumqttd", 5_000.0);
        faulty.faults = Faults { lost: 7, ..Faults::default() };
        let all = [1_000.0, 4_000.0, 3_000.0].map(|per_s| outcome("pairs", "chatd", per_s));
        let others = [outcome("pairs", "mosquitto", 1_500.0), outcome("pairs-ws", "chatd", 2_000.0), faulty];
        for outcome in all.into_iter().chain(others) {
            runs.entry((outcome.scenario.clone(), outcome.label.clone())).or_default().push(outcome);
        }
        Results { runs, labels: ["chatd", "mosquitto", "rumqttd"].map(str::to_owned).to_vec() }
    }

    fn filled(template: &str) -> Result<(String, BTreeMap<String, String>)> {
        let facts = BTreeMap::from([("kernel".to_owned(), "6.1".to_owned())]);
        let mut plots = BTreeMap::new();
        let text = fill(template, &results(), &facts, "benchmarks", &mut plots)?;
        Ok((text, plots))
    }

    #[test]
    fn a_template_is_filled_with_medians_and_ratios() {
        let cases = [
            ("on {{fact kernel}}, {{ fact nothing }}.", "on 6.1, –."),
            ("{{value pairs:chatd delivered_per_s}}", "3,000"),
            ("{{value pairs:nobody delivered_per_s}}", "–"),
            ("{{value pairs:chatd delivery_p50_us}}", "5 ms"),
            ("{{ratio pairs:chatd pairs:mosquitto delivered_per_s}}", "2 ×"),
            ("{{ratio pairs-ws:chatd pairs:chatd delivered_per_s}}", "0.667 ×"),
            ("{{ratio pairs:chatd pairs:chatd delivered_per_s senders}}", "10 ×"),
            ("{{command pairs:chatd}}", "chat-bench pairs --send-topic 'bench/{to}'"),
            ("{{broken}}", "- rumqttd, pairs: 7 lost (in 1 of 1 runs)"),
        ];
        for (template, text) in cases {
            assert_eq!(filled(template).unwrap().0, text, "{template}");
        }
        for wrong in ["{{nonsense}}", "{{value pairs delivered_per_s}}", "{{ never closed", "{{table pairs | x}}"] {
            assert!(filled(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_table_has_a_row_for_each_that_was_measured() {
        let template = "{{table pairs | delivered_per_s as a second | delivered_per_s of mosquitto as × Mosquitto}}";
        let expected = "| | a second | × Mosquitto |\n|---|---:|---:|\n| chatd | 3,000 | 2 × |\n\
                        | mosquitto | 1,500 | 1 × |\n| rumqttd | 5,000 | 3.33 × |";
        assert_eq!(filled(template).unwrap().0, expected);
        let alone = filled("{{table pairs-ws | delivered_per_s as a second}}").unwrap().0;
        assert_eq!(alone, "| | a second |\n|---|---:|\n| chatd | 2,000 |");
    }

    #[test]
    fn plots_are_beside_the_document() {
        let template = "{{latencies pairs delivery | how long}} {{over-time pairs delivered | how many}}\n\
                        {{growth pairs senders delivered_per_s | growth | users | a second}}";
        let (text, plots) = filled(template).unwrap();
        assert!(
            text.starts_with("![how long](benchmarks/pairs-delivery-latencies.svg) ![how many](benchmarks/"),
            "{text}"
        );
        assert!(text.ends_with("![growth](benchmarks/pairsdelivered_per_s.svg)"), "{text}");
        assert_eq!(plots.len(), 3);
        assert!(plots.values().all(|svg| svg.contains("chatd")));
    }

    #[test]
    fn bounds_are_judged_with_a_sentence() {
        let results = results();
        let (said, is_kept) = judge("pairs:chatd pairs:mosquitto delivered_per_s 1.5", &results).unwrap();
        assert!(is_kept && said.contains("is 2 times that of pairs:mosquitto"), "{said}");
        assert!(!judge("pairs:chatd pairs:mosquitto delivered_per_s 2.5", &results).unwrap().1);
        assert!(judge("pairs:chatd pairs:nobody delivered_per_s 2.5", &results).is_err());
        assert!(judge("pairs:chatd 2.5", &results).is_err());
    }

    #[test]
    fn figures_are_shown_by_their_units() {
        let cases = [
            ("x_us", 1_500.0, "1.5 ms"),
            ("x_ms", 1_500.0, "1.5 s"),
            ("x_s", 1.5, "1.5 s"),
            ("x_per_s", 123_456.0, "123,000"),
            ("x_per_s", 1_234_567.0, "1,230,000"),
            ("x_bytes", 4_200.0, "4.2 KB"),
            ("x_bytes_each", 4_200.0, "4.2 KB"),
            ("x_us_per_message", 7.25, "7.25"),
        ];
        for (figure, value, text) in cases {
            assert_eq!(shown(figure, Some(value)), text);
        }
    }
}
