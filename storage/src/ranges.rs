//! Lists of ranges that ascend and do not overlap.

use std::ops::Range;

/// The parts of `runs` that are in none of `covered`, which need no order and may overlap.
pub(crate) fn without(runs: &[Range<u64>], covered: &[Range<u64>]) -> Vec<Range<u64>> {
    let covered = merged(covered);
    let mut left = Vec::new();
    for run in runs {
        let mut start = run.start;
        let first = covered.partition_point(|range| range.end <= run.start);
        for range in covered[first..].iter().take_while(|range| range.start < run.end) {
            if range.start > start {
                left.push(start..range.start);
            }
            start = range.end;
        }
        if start < run.end {
            left.push(start..run.end);
        }
    }
    left
}

fn merged(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut ranges = ranges.to_vec();
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_covered_is_taken_out() {
        let (runs, covered) = ([0..10, 20..30, 40..50], [28..42, 5..7, 0..2, 6..8, 60..70]);
        assert_eq!(without(&runs, &covered), [2..5, 8..10, 20..28, 42..50]);
        assert_eq!(without(&runs, &[]), runs);
        assert_eq!(without(&runs, std::slice::from_ref(&(0..100))), []);
    }
}
