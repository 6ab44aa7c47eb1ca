//! Geometric means over the images, for each link, work and way.

use serde_json::{Value, json};

use super::{
    super::options::{Way, Work},
    Ratios, Row,
};

/// The ratios of one way over one link, over all images that have them.
#[derive(Debug)]
pub(crate) struct Mean {
    pub(crate) link: String,
    pub(crate) work: Work,
    pub(crate) way: Way,
    pub(crate) images: usize,
    pub(crate) ratios: Ratios,
}

/// The head of the lines.
pub(crate) const HEADS: [&str; 9] =
    ["link", "work", "way", "images", "/full", "/limit", "/peer", "/unrec", "moved/read"];

/// A mean for each link, work and way, in the order of the rows.
pub(crate) fn of(rows: &[Row]) -> Vec<Mean> {
    let mut means: Vec<Mean> = Vec::new();
    for row in rows {
        let is_known = |mean: &Mean| (&mean.link, mean.work, mean.way) == (&row.link, row.work, row.way);
        if means.iter().any(is_known) {
            continue;
        }
        let alike: Vec<&Row> = rows
            .iter()
            .filter(|other| (&other.link, other.work, other.way) == (&row.link, row.work, row.way))
            .collect();
        let mean = |of: fn(&Ratios) -> Option<f64>| geometric(alike.iter().filter_map(|row| of(&row.ratios)));
        means.push(Mean {
            link: row.link.clone(),
            work: row.work,
            way: row.way,
            images: alike.len(),
            ratios: Ratios {
                full: mean(|ratios| ratios.full),
                limit: mean(|ratios| ratios.limit),
                peer: mean(|ratios| ratios.peer),
                unrecorded: mean(|ratios| ratios.unrecorded),
                read: mean(|ratios| ratios.read),
            },
        });
    }
    means
}

impl Mean {
    /// Its cells, one for each head.
    pub(crate) fn cells(&self) -> [String; HEADS.len()] {
        let ratio = |of: Option<f64>| of.map_or_else(|| "-".to_owned(), |of| format!("{of:.3}"));
        let Ratios { full, limit, peer, unrecorded, read } = self.ratios;
        let (work, way) = (self.work.name().to_owned(), self.way.name().to_owned());
        let ratios = [full, limit, peer, unrecorded, read].map(ratio);
        let [full, limit, peer, unrecorded, read] = ratios;
        [self.link.clone(), work, way, self.images.to_string(), full, limit, peer, unrecorded, read]
    }

    pub(super) fn to_json(&self) -> Value {
        let mut object = json!({
            "link": self.link, "work": self.work.name(), "way": self.way.name(), "images": self.images,
        });
        self.ratios.add_to(&mut object);
        object
    }
}

/// Head and means as lines.
pub(crate) fn lines(rows: &[Row]) -> Vec<String> {
    let line = |cells: [String; HEADS.len()]| {
        let [link, work, way, figures @ ..] = cells;
        let figures: String = figures.iter().map(|figure| format!("{figure:>11}")).collect();
        format!("{link:<15}{work:<7}{way:<14}{figures}")
    };
    let head = line(HEADS.map(str::to_owned));
    let means = of(rows);
    ["".to_owned(), "geometric means over the images".to_owned(), head]
        .into_iter()
        .chain(means.iter().map(|mean| line(mean.cells())))
        .collect()
}

fn geometric(values: impl Iterator<Item = f64>) -> Option<f64> {
    let logarithms: Vec<f64> = values.map(f64::ln).collect();
    (!logarithms.is_empty()).then(|| (logarithms.iter().sum::<f64>() / logarithms.len() as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_and_half_come_to_one() {
        assert!((geometric([2.0, 0.5].into_iter()).unwrap() - 1.0).abs() < 1e-12);
        assert_eq!(geometric(std::iter::empty()), None);
    }
}
