//! Rows of `bench starts`: as lines, as JSON, and as one page that needs no network.

use std::{collections::BTreeMap, fmt};

use lazuli_tests::{shaped_link::Shape, start::Measured};
use serde_json::json;

use super::{
    limit,
    options::{Way, Work},
    ready,
};

/// The head of the lines.
pub(crate) const HEADER: &str =
    "image     link           work   way        pull s  ready s     p95  of full  of limit  moved MB  requests";

/// Colours of the ways in the page.
const COLOURS: [&str; 3] = ["#8a8f98", "#2a6fb0", "#1d8a4a"];
const BAR_WIDTH: f64 = 520.0;
const BAR_HEIGHT: usize = 18;

/// One way of one image over one link.
#[derive(Debug)]
pub(crate) struct Row {
    image: String,
    link: String,
    work: Work,
    way: Way,
    /// Seconds, all of them.
    pull: f64,
    ready: f64,
    p95: f64,
    samples: usize,
    of_full: Option<f64>,
    of_limit: Option<f64>,
    moved_mb: f64,
    requests: f64,
}

/// The rows of all ways that were measured.
pub(crate) fn rows(
    (image, link, shape): (&str, &str, Option<Shape>),
    work: Work,
    measured: &BTreeMap<Way, Vec<Measured>>,
) -> Vec<Row> {
    let ready_of = |starts: &Vec<Measured>| median(starts.iter().map(|start| ready(start).as_secs_f64()));
    let full = measured.get(&Way::Full).map(ready_of);
    let limit = if work == Work::Ready { limit(shape, measured) } else { None };
    let row = |(way, starts): (&Way, &Vec<Measured>)| {
        let value = |of: fn(&Measured) -> f64| median(starts.iter().map(of));
        let ready_s = ready_of(starts);
        Row {
            image: image.to_owned(),
            link: link.to_owned(),
            work,
            way: *way,
            pull: value(|start| start.pull.as_secs_f64()),
            ready: ready_s,
            p95: percentile(starts.iter().map(|start| ready(start).as_secs_f64()), 95),
            samples: starts.len(),
            of_full: full.map(|full| ready_s / full),
            of_limit: limit.map(|limit| ready_s / limit),
            moved_mb: value(|start| start.moved as f64 / 1e6),
            requests: value(|start| start.requests as f64),
        }
    };
    measured.iter().map(row).collect()
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ratio = |ratio: Option<f64>| ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"));
        write!(f, "{:<10}{:<15}{:<7}{:<10}", self.image, self.link, self.work.name(), self.way.tag())?;
        write!(f, "{:>7.2}{:>9.2}{:>8.2}{:>9}", self.pull, self.ready, self.p95, ratio(self.of_full))?;
        write!(f, "{:>10}{:>10.1}{:>10}", ratio(self.of_limit), self.moved_mb, self.requests)
    }
}

/// An array with an object for each row; times in seconds.
pub(crate) fn json(rows: &[Row]) -> String {
    let object = |row: &Row| {
        json!({
            "image": row.image, "link": row.link, "work": row.work.name(), "way": row.way.tag(), "samples": row.samples,
            "pull_s": row.pull, "ready_s": row.ready, "ready_p95_s": row.p95, "ready_to_full": row.of_full,
            "ready_to_limit": row.of_limit, "moved_mb": row.moved_mb, "requests": row.requests,
        })
    };
    let rows: Vec<_> = rows.iter().map(object).collect();
    format!("{:#}\n", json!(rows))
}

/// A page with a plot for each work and link, and the table.
pub(crate) fn html(rows: &[Row]) -> String {
    let mut groups: Vec<(Work, &str)> = Vec::new();
    for row in rows {
        if !groups.contains(&(row.work, &row.link)) {
            groups.push((row.work, &row.link));
        }
    }
    let plots: String = groups.iter().map(|(work, link)| plot(rows, *work, link)).collect();
    let cells = |row: &Row| row.to_string().split_whitespace().map(|cell| format!("<td>{cell}")).collect::<String>();
    let table: String = rows.iter().map(|row| format!("<tr>{}\n", cells(row))).collect();
    let heads =
        ["image", "link", "work", "way", "pull s", "ready s", "p95", "of full", "of limit", "moved MB", "requests"];
    let heads: String = heads.iter().map(|head| format!("<th>{head}")).collect();
    format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>Cold starts</title>\n<style>\n\
         body {{ font: 14px/1.4 sans-serif; margin: 2em; max-width: 60em; color: #222 }}\n\
         table {{ border-collapse: collapse }} td, th {{ padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd }}\n\
         td:nth-child(-n+4), th:nth-child(-n+4) {{ text-align: left }} text {{ font-size: 12px }}\n</style>\n\
         <h1>Cold starts</h1>\n<p>Seconds from the pull to ready, medians; the thin line ends at the 95th percentile. \
         Nothing of the image is on the node before.\n{plots}<h2>Table</h2>\n<table><tr>{heads}\n{table}</table>\n</html>\n"
    )
}

/// Bars of one work over one link: an SVG picture.
fn plot(rows: &[Row], work: Work, link: &str) -> String {
    let rows: Vec<&Row> = rows.iter().filter(|row| row.work == work && row.link == link).collect();
    let longest = rows.iter().map(|row| row.p95).fold(f64::MIN_POSITIVE, f64::max);
    let title = match work {
        Work::Ready => "until ready",
        Work::Whole => "until every file is read",
    };
    let bars: String =
        (0..).zip(&rows).map(|(number, row)| bar(row, number * BAR_HEIGHT, BAR_WIDTH / longest)).collect();
    let height = rows.len() * BAR_HEIGHT;
    format!("<h2>{link}, {title}</h2>\n<svg width=\"860\" height=\"{height}\" role=\"img\">\n{bars}</svg>\n")
}

fn bar(row: &Row, top: usize, scale: f64) -> String {
    let (left, middle, base) = (170.0, top + BAR_HEIGHT / 2, top + BAR_HEIGHT - 5);
    let (width, far) = (row.ready * scale, left + row.p95 * scale);
    let colour = COLOURS[row.way as usize];
    format!(
        "<text x=\"0\" y=\"{base}\">{} {}</text><rect x=\"{left}\" y=\"{}\" width=\"{width:.1}\" height=\"{}\" fill=\"{colour}\"/>\
         <line x1=\"{left}\" x2=\"{far:.1}\" y1=\"{middle}\" y2=\"{middle}\" stroke=\"#222\"/>\
         <text x=\"{:.1}\" y=\"{base}\">{:.2} s, {:.0} MB</text>\n",
        row.image,
        row.way.tag(),
        top + 2,
        BAR_HEIGHT - 4,
        far + 6.0,
        row.ready,
        row.moved_mb,
    )
}

/// The middle one, of an even number the upper one.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    percentile(values, 50)
}

fn percentile(values: impl Iterator<Item = f64>, percent: usize) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let place = values.len() * percent / 100;
    values.get(place.min(values.len().saturating_sub(1))).copied().unwrap_or_default()
}
