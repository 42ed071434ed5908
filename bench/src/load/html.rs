//! A run as a page of its own: figures, plots, and the command. It needs no other file and no script. Pure.

use std::fmt::Write;

use crate::outcome::Outcome;
use crate::plot::{self, escaped};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:760px;margin:2em auto;padding:0 1em;color-scheme:light dark}\
svg{width:100%;height:auto;display:block;margin:1em 0}table{border-collapse:collapse}td,th{padding:.2em 1em .2em 0;text-align:left}\
td:last-child{text-align:right;font-variant-numeric:tabular-nums}code{overflow-wrap:anywhere}.fault{color:#d55e00}";

pub(crate) fn page(outcome: &Outcome) -> String {
    let title = escaped(&format!("{} {}", outcome.label, outcome.scenario));
    let class = if outcome.faults.is_none() { "" } else { " class=\"fault\"" };
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title><style>{STYLE}</style></head>\n\
         <body><h1>{title}</h1>\n<p{class}>{}.</p>\n<p><code>chat-bench {}</code></p>\n",
        escaped(&outcome.faults.sentence()),
        escaped(&outcome.command.join(" "))
    );
    let latencies = outcome.latencies.iter().filter(|(_, distribution)| distribution.count > 0);
    let latencies: Vec<_> = latencies.map(|(name, distribution)| (spoken(name), distribution)).collect();
    if !latencies.is_empty() {
        page += &plot::latencies("latency", latencies);
    }
    if !outcome.series.is_empty() {
        page += &plot::over_time("throughput", outcome.series.iter().map(|(name, series)| (spoken(name), series)));
    }
    page += "<table><tr><th>figure</th><th></th></tr>\n";
    for (name, value) in &outcome.figures {
        let row = format_args!("<tr><td>{}</td><td>{}</td></tr>\n", escaped(&spoken(name)), plot::rounded(*value));
        page.write_fmt(row).unwrap_or(());
    }
    if outcome.redelivered > 0 {
        page += &format!("<tr><td>came again after a reconnect</td><td>{}</td></tr>\n", outcome.redelivered);
    }
    page + "</table></body></html>\n"
}

fn spoken(name: &str) -> String {
    name.replace("_per_s", " a second").replace('_', " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{Latencies, Series};
    use crate::verify::Faults;

    #[test]
    fn a_page_stands_alone_and_says_what_went_wrong() {
        let mut outcome = Outcome::new("pairs");
        outcome.label = "<broker>".to_owned();
        outcome.set("delivered_per_s", 1_234.5);
        let mut latencies = Latencies::new().unwrap();
        (1..100).for_each(|us| latencies.record(us));
        outcome.set_latencies("delivery", latencies.distribution());
        outcome.series.insert("delivered".to_owned(), Series { step_ms: 100, counts: vec![1, 2, 3] });
        let good = page(&outcome);
        assert_eq!(good.matches("<svg ").count(), 2);
        assert!(good.contains("&lt;broker&gt;") && good.contains("1234"), "{good}");
        assert!(good.contains("nothing lost"), "{good}");
        for outside in ["<script", "src=", "href=", "@import", "url("] {
            assert!(!good.contains(outside), "{outside}");
        }
        outcome.faults = Faults { lost: 3, ..Faults::default() };
        assert!(page(&outcome).contains("class=\"fault\">3 lost."));
    }
}
