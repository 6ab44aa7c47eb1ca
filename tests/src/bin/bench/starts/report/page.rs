//! The rows of `bench starts` as one page that needs no network: plots, means, and the table.

use std::fmt::Write as _;

use super::{
    super::options::{Way, Work},
    COLUMNS, LEGEND, Row, means,
};

/// Places in a plot, from the left, in pixels: ends of the names of ways, then bars.
const WAYS_END: f64 = 190.0;
const BARS: f64 = 200.0;
const BARS_WIDTH: f64 = 520.0;
const WIDTH: f64 = 960.0;
/// Heights, in pixels: of a bar with its margin, between images, of the axis below.
const BAR: f64 = 20.0;
const GAP: f64 = 16.0;
const AXIS: f64 = 40.0;
/// Marks on an axis at most.
const MARKS_MAX: f64 = 8.0;

const STYLE: &str = "body { font: 14px/1.5 sans-serif; margin: 2em auto; max-width: 94em; padding: 0 1em; color: #222; background: #fff }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
td, th { padding: 2px 7px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
.rows td:nth-child(-n+4), .rows th:nth-child(-n+4), .means td:nth-child(-n+3), .means th:nth-child(-n+3) { text-align: left }
tr.first td { border-top: 2px solid #999 }
svg { display: block; max-width: 100%; height: auto }
text { font: 12px sans-serif; fill: #222 } text.image { font-weight: bold; font-size: 13px }
text.end { text-anchor: end } text.middle { text-anchor: middle; fill: #555 }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1em } dt { font-weight: bold } dd { margin: 0 }";

/// A page with a plot for each work and link, the means, and the table.
pub(crate) fn html(seed: u64, rows: &[Row]) -> String {
    let mut plotted: Vec<(Work, &str)> = Vec::new();
    let mut plots = String::new();
    for row in rows {
        if !plotted.contains(&(row.work, &row.link)) {
            plotted.push((row.work, &row.link));
            plots += &plot(rows, row.work, &row.link);
        }
    }
    let means: String = means::of(rows).iter().map(|mean| table_row("", &mean.cells())).collect();
    let legend: String = LEGEND.iter().map(|(head, meaning)| format!("<dt>{}<dd>{meaning}\n", escape(head))).collect();
    format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>Cold starts</title>\n<style>\n{STYLE}\n</style>\n<h1>Cold starts</h1>\n\
         <p>Seconds from the pull to ready, medians: shorter is better. The thin line ends at the 95th percentile. Nothing \
         of the image is on the node before, but what fleet shares with another one, and nothing in the page cache. Ways took turns by chance, seed {seed}.\n\
         {plots}<h2>Geometric means over the images</h2>\n<div class=\"wide\"><table class=\"means\">{}{means}</table></div>\n\
         <h2>All figures</h2>\n<div class=\"wide\"><table class=\"rows\">{}{}</table></div>\n<dl>\n{legend}</dl>\n</html>\n",
        heads(means::HEADS),
        heads(COLUMNS.map(|(head, _)| head)),
        table(rows),
    )
}

fn heads<const COUNT: usize>(heads: [&str; COUNT]) -> String {
    let cells: String = heads.iter().map(|head| format!("<th>{}", escape(head))).collect();
    format!("<tr>{cells}\n")
}

/// The rows of the table; a line above the first of each case.
fn table(rows: &[Row]) -> String {
    let case = |row: &Row| (row.image.clone(), row.link.clone(), row.work);
    let mut table = String::new();
    for (place, row) in rows.iter().enumerate() {
        let is_first =
            place.checked_sub(1).and_then(|before| rows.get(before)).is_none_or(|before| case(before) != case(row));
        table += &table_row(if is_first { " class=\"first\"" } else { "" }, &row.cells());
    }
    table
}

fn table_row(class: &str, cells: &[String]) -> String {
    let cells: String = cells.iter().map(|cell| format!("<td>{}", escape(cell))).collect();
    format!("<tr{class}>{cells}\n")
}

/// Bars of one work over one link, grouped by image: an SVG picture.
fn plot(rows: &[Row], work: Work, link: &str) -> String {
    let rows: Vec<&Row> = rows.iter().filter(|row| row.work == work && row.link == link).collect();
    let longest = rows.iter().map(|row| row.p95).fold(f64::MIN_POSITIVE, f64::max);
    let mut bars = String::new();
    let mut top = 0.0;
    for (place, row) in rows.iter().enumerate() {
        let is_first = place == 0 || rows.get(place - 1).is_some_and(|before| before.image != row.image);
        if is_first {
            top += if place == 0 { 0.0 } else { GAP };
            _ = writeln!(bars, "<text class=\"image\" x=\"0\" y=\"{}\">{}</text>", top + 14.0, escape(&row.image));
        }
        bars += &bar(row, top, BARS_WIDTH / longest);
        top += BAR;
    }
    let title = format!("{}, {}", escape(link), work.title());
    format!(
        "<h2>{title}</h2>\n<svg viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\" \
         aria-label=\"{title}\">\n{}{bars}</svg>\n",
        axis(longest, top),
        height = top + AXIS,
    )
}

/// Vertical lines at round numbers of seconds, down to `bottom`, and the numbers.
fn axis(longest: f64, bottom: f64) -> String {
    let step = round_step(longest / MARKS_MAX);
    let mut axis = String::new();
    let marks = std::iter::successors(Some(0.0), |mark| Some(mark + step)).take_while(|mark| *mark <= longest);
    for mark in marks {
        let x = BARS + mark * BARS_WIDTH / longest;
        let digits = if step < 1.0 { 1 + usize::from(step < 0.1) } else { 0 };
        _ = writeln!(
            axis,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{bottom}\" stroke=\"#ddd\"/>\
             <text class=\"middle\" x=\"{x:.1}\" y=\"{}\">{mark:.digits$}</text>",
            bottom + 16.0,
        );
    }
    let (x, y) = (BARS + BARS_WIDTH / 2.0, bottom + 33.0);
    axis + &format!("<text class=\"middle\" x=\"{x}\" y=\"{y}\">seconds</text>\n")
}

/// The least of 1, 2 and 5 times a power of ten that is not less than `least`.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0].map(|factor| factor * power).into_iter().find(|step| *step >= least).unwrap_or(10.0 * power)
}

fn bar(row: &Row, top: f64, scale: f64) -> String {
    let (middle, base) = (top + BAR / 2.0, top + 14.0);
    let (width, ready, end) = (row.ready * scale, BARS + row.ready * scale, BARS + row.p95.max(row.ready) * scale);
    let of_full = row.ratios.full.filter(|_| row.way != Way::Full);
    let of_full = of_full.map(|ratio| format!(", {ratio:.2} of full")).unwrap_or_default();
    format!(
        "<text class=\"end\" x=\"{WAYS_END}\" y=\"{base}\">{}</text>\
         <rect x=\"{BARS}\" y=\"{}\" width=\"{width:.1}\" height=\"{}\" fill=\"{}\"/>\
         <line x1=\"{ready:.1}\" x2=\"{end:.1}\" y1=\"{middle}\" y2=\"{middle}\" stroke=\"#222\"/>\
         <text x=\"{:.1}\" y=\"{base}\">{:.2} s, {:.0} MB{of_full}</text>\n",
        row.way.name(),
        top + 2.0,
        BAR - 4.0,
        row.way.colour(),
        end + 8.0,
        row.ready,
        row.moved_mb,
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_at_round_numbers() {
        assert_eq!([0.3, 1.0, 1.2, 4.0, 7.0].map(round_step), [0.5, 1.0, 2.0, 5.0, 10.0]);
    }
}
