//! The waits of a layer's readers that are over, in the words of who looks at them: which files, how long, for what?

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use control::{LayerWaits, PastWait, WaitCause};
use format_spec::{Index, LayerId};
use storage::Layer;

use crate::reading::{file_at, path_of};

/// Those of `all` that are of these layers; all where none are named.
pub(crate) fn asked_for<T>(mut all: Vec<T>, layers: Option<Vec<LayerId>>, id_of: impl Fn(&T) -> LayerId) -> Vec<T> {
    if let Some(layers) = layers {
        let layers: HashSet<LayerId> = layers.into_iter().collect();
        all.retain(|one| layers.contains(&id_of(one)));
    }
    all
}

/// Looks at one layer.
pub(crate) fn waits_of(layer: &Layer) -> LayerWaits {
    let (waits, progress) = (layer.waits(), layer.progress());
    let longest = past_waits(layer.index(), &waits.longest);
    if !waits.longest.is_empty() {
        layer.index().backing().release();
    }
    LayerWaits {
        layer: layer.lazy_layer().id(),
        wait_count: waits.count,
        waited_ms: milliseconds(waits.total),
        blocked_ms: milliseconds(waits.blocked),
        longest,
        demanded_bytes: progress.demanded_bytes,
        hot_bytes: progress.hot_bytes,
        best_rate: layer.best_rate(),
    }
}

fn past_waits<B: AsRef<[u8]>>(index: &Index<B>, waits: &[storage::PastWait]) -> Vec<PastWait> {
    let mut paths = BTreeMap::new();
    let mut named = |wait: &storage::PastWait| {
        let file = file_at(index, wait.offset)?;
        let start = index.inode(file)?.plain_offset.get();
        Some(PastWait {
            path: paths.entry(file).or_insert_with(|| path_of(index, file)).clone()?,
            offset: wait.offset.saturating_sub(start),
            after_ms: milliseconds(wait.began_after),
            waited_ms: milliseconds(wait.lasted),
            cause: told(wait.cause),
        })
    };
    waits.iter().filter_map(&mut named).collect()
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A cause as clients hear it.
fn told(cause: storage::WaitCause) -> WaitCause {
    match cause {
        storage::WaitCause::OtherLayers => WaitCause::OtherLayers,
        storage::WaitCause::HotPack => WaitCause::HotPack,
        storage::WaitCause::Frame => WaitCause::Frame,
        storage::WaitCause::FrameUnderWay => WaitCause::FrameUnderWay,
    }
}

#[cfg(test)]
mod tests {
    use format_spec::Digest;

    use super::*;
    use crate::reading::tests::index;

    #[test]
    fn an_answer_has_the_layers_of_the_question_and_no_others() {
        let [asked, other, unknown] = ["asked", "other", "unknown"].map(|name| Digest::of(name.as_bytes()));
        let all = || vec![asked, other];
        let found = |layers| asked_for(all(), layers, |layer| *layer);
        assert_eq!(found(Some(vec![unknown, asked])), [asked]);
        assert_eq!(found(Some(Vec::new())), []);
        assert_eq!(found(None), all());
    }

    #[test]
    fn a_wait_names_its_file_and_the_place_in_it() {
        let wait = |offset, cause| storage::PastWait {
            offset,
            began_after: Duration::from_millis(7),
            lasted: Duration::from_micros(1500),
            cause,
        };
        let waits = [
            wait(4100, storage::WaitCause::HotPack),
            wait(12, storage::WaitCause::Frame),
            wait(1 << 40, storage::WaitCause::Frame),
        ];
        let past =
            |path: &str, offset, cause| PastWait { path: path.to_owned(), offset, after_ms: 7, waited_ms: 1, cause };
        let expected = [past("/sub/b", 4, WaitCause::HotPack), past("/a", 12, WaitCause::Frame)];
        assert_eq!(past_waits(&index(), &waits), expected);
    }
}
