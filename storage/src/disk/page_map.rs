//! Which pages of a layer's plain address space have content, and a number for each of those.
//!
//! A sparse file of gigabytes may have content in few pages. So what is kept for each page - bits, checksums - is kept
//! for those with content alone, which have the *numbers* 0, 1, 2 and so on in their order. A page without content has
//! no number: nothing need come for it, and it is always there.
//!
//! The numbers of neighbours in a range of pages are neighbours too, whatever holes lie between. A layer without holes
//! is one run of pages.

use std::ops::Range;

use format_spec::records::PLAIN_ALIGN;

use crate::disk::mapping::LayerIndex;

/// The pages with content and their numbers.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PageMap {
    /// Ascending; between two of them lies at least one page without content.
    runs: Vec<Run>,
    count: u64,
}

/// Pages with content up to the next one without, as long as there are numbers before those of the next run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    /// The first page.
    page: u32,
    /// Its number.
    number: u32,
}

/// Pages from here on are left out, at 16 TiB: no address space is that long (SPEC.md 9).
const PAGES_MAX: u64 = u32::MAX as u64;

impl PageMap {
    /// That of a layer. It takes 8 bytes for each run, of which there are no more than extents.
    pub(crate) fn of(index: &LayerIndex) -> Self {
        Self::new(index.extents().iter().map(|extent| pages_of(&extent.plain_range())))
    }

    /// Of these pages, which ascend and may overlap. Those that do not ascend are left out.
    fn new(content: impl Iterator<Item = Range<u64>>) -> Self {
        let (mut runs, mut count, mut end) = (Vec::new(), 0, 0);
        for pages in content {
            let pages = pages.start.max(end)..pages.end.min(PAGES_MAX);
            let (Ok(page), Ok(number)) = (u32::try_from(pages.start), u32::try_from(count)) else { break };
            if pages.is_empty() {
                continue;
            }
            if pages.start > end || runs.is_empty() {
                runs.push(Run { page, number });
            }
            count += pages.end - pages.start;
            end = pages.end;
        }
        runs.shrink_to_fit();
        Self { runs, count }
    }

    /// Number of pages with content.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The numbers of the pages in a range that have one.
    pub(crate) fn numbers(&self, pages: &Range<u64>) -> Range<u64> {
        self.first_number(pages.start)..self.first_number(pages.end)
    }

    /// The number of a page; `None` for one without content.
    pub(crate) fn number(&self, page: u64) -> Option<u64> {
        let numbers = self.numbers(&(page..page.saturating_add(1)));
        (!numbers.is_empty()).then_some(numbers.start)
    }

    /// The number of the first page from one on that has one, or [`Self::count`].
    pub(crate) fn first_number(&self, page: u64) -> u64 {
        let (run, end) = self.run_at(|run| u64::from(run.page) <= page);
        run.map_or(0, |run| (u64::from(run.number) + (page - u64::from(run.page))).min(end))
    }

    /// The page with a number, and those behind it up to the next one without content; none past the last number.
    pub(crate) fn pages_from(&self, number: u64) -> Range<u64> {
        let (run, end) = self.run_at(|run| u64::from(run.number) <= number);
        run.filter(|_| number < end).map_or(0..0, |run| {
            let page_of = |number: u64| u64::from(run.page) + (number - u64::from(run.number));
            page_of(number)..page_of(end)
        })
    }

    /// The last run that begins where `is_at` still holds, and the number at which it ends.
    fn run_at(&self, is_at: impl Fn(&Run) -> bool) -> (Option<&Run>, u64) {
        let after = self.runs.partition_point(is_at);
        let end = self.runs.get(after).map_or(self.count, |run| run.number.into());
        (after.checked_sub(1).and_then(|number| self.runs.get(number)), end)
    }
}

/// The pages that a plain range touches.
pub(crate) fn pages_of(plain: &Range<u64>) -> Range<u64> {
    if plain.is_empty() { 0..0 } else { plain.start / PLAIN_ALIGN..plain.end.div_ceil(PLAIN_ALIGN) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_layer_without_holes_is_one_run() {
        let map = PageMap::new([0..3, 2..5, 5..6, 6..6].into_iter());
        assert_eq!((map.runs.len(), map.count()), (1, 6));
        assert_eq!((map.number(5), map.number(6), map.numbers(&(2..100))), (Some(5), None, 2..6));
        assert_eq!((map.pages_from(2), map.pages_from(6)), (2..6, 0..0));
    }

    #[test]
    fn holes_have_no_numbers() {
        let hole = 1 << 26;
        let map = PageMap::new([2..4, hole..hole + 1].into_iter());
        assert_eq!(map.count(), 3);
        assert_eq!([0, 1, 2, 3, 4, hole, hole + 1].map(|page| map.number(page)), {
            [None, None, Some(0), Some(1), None, Some(2), None]
        });
        assert_eq!([0, 1, 2, 3].map(|number| map.pages_from(number)), [2..4, 3..4, hole..hole + 1, 0..0]);
        assert_eq!((map.numbers(&(3..hole)), map.numbers(&(4..hole)), map.numbers(&(0..u64::MAX))), (1..2, 2..2, 0..3));
        let none = PageMap::new(std::iter::empty());
        assert_eq!((none.count(), none.number(0), none.numbers(&(0..9)), none.pages_from(0)), (0, None, 0..0, 0..0));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Also for ranges that do not ascend, as a damaged index has them.
        #[test]
        fn a_map_says_what_a_list_of_pages_does(content in proptest::collection::vec((0u64..60, 0u64..6), 0..12)) {
            let content: Vec<_> = content.into_iter().map(|(start, len)| start..start + len).collect();
            let mut sorted = content.clone();
            sorted.sort_by_key(|pages| pages.start);
            for content in [content, sorted] {
                let mut pages: Vec<u64> = Vec::new();
                for page in content.iter().cloned().flatten() {
                    if pages.last().is_none_or(|last| *last < page) {
                        pages.push(page);
                    }
                }
                let map = PageMap::new(content.into_iter());
                prop_assert_eq!(map.count(), pages.len() as u64);
                let number_of = |page: u64| pages.partition_point(|with_content| *with_content < page) as u64;
                for page in 0..70 {
                    let number = pages.contains(&page).then(|| number_of(page));
                    prop_assert_eq!(map.number(page), number);
                    for end in page..70 {
                        prop_assert_eq!(map.numbers(&(page..end)), number_of(page)..number_of(end));
                    }
                }
                for (number, page) in (0..).zip(&pages) {
                    let end = (*page..).find(|page| !pages.contains(page)).unwrap();
                    prop_assert_eq!(map.pages_from(number), *page..end);
                }
                prop_assert_eq!(map.pages_from(map.count()), 0..0);
                let neighbours = map.runs.windows(2).all(|runs| map.number(u64::from(runs[1].page) - 1).is_none());
                prop_assert!(neighbours, "{:?}", map);
            }
        }
    }
}
