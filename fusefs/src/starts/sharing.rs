//! Repositories that may read a layer: those of the images whose trees have it.

use std::{
    collections::{BTreeSet, HashMap},
    time::Instant,
};

use control::TreeId;
use format_spec::LayerId;

/// Every tree that is shown, with its layers and the repositories whose images it is.
#[derive(Debug, Default)]
pub(crate) struct Sharing(HashMap<TreeId, (BTreeSet<String>, Vec<LayerId>)>);

impl Sharing {
    /// A tree is shown for an image of a repository, or is going to be; for those that it was shown for before as well.
    pub(crate) fn add(&mut self, tree: TreeId, repository: &str, layers: Vec<LayerId>) {
        let (repositories, known) = self.0.entry(tree).or_default();
        repositories.insert(repository.to_owned());
        *known = layers;
    }

    /// It is shown for one of another repository too: its layers, unless that is known.
    pub(crate) fn share(&mut self, tree: TreeId, repository: &str) -> Option<Vec<LayerId>> {
        let (repositories, layers) = self.0.get_mut(&tree)?;
        repositories.insert(repository.to_owned()).then(|| layers.clone())
    }

    /// It is shown no longer.
    pub(crate) fn remove(&mut self, tree: TreeId) {
        self.0.remove(&tree);
    }

    /// Whether all trees that have a layer are of one repository alone.
    pub(crate) fn is_alone(&self, layer: LayerId, repository: &str) -> bool {
        let mut sharing = self.0.values().filter(|(_, layers)| layers.contains(&layer));
        sharing.all(|(repositories, _)| repositories.iter().all(|other| other == repository))
    }
}

/// The time in which reads of a layer count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    since: Instant,
    until: Option<Instant>,
}

impl Window {
    /// From then on.
    pub(crate) fn from(since: Instant) -> Self {
        Self { since, until: None }
    }

    /// No longer.
    pub(crate) fn close(&mut self, now: Instant) {
        self.until.get_or_insert(now);
    }

    /// Whether what was read then counts.
    pub(crate) fn contains(&self, at: Instant) -> bool {
        at >= self.since && self.until.is_none_or(|until| at < until)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use format_spec::Digest;

    use super::*;

    #[test]
    fn a_layer_is_alone_while_no_tree_of_another_repository_has_it() {
        let [one, other, third] = [b"1", b"2", b"3"].map(|name| Digest::of(name));
        let [base, top] = [b"base", b"top_"].map(|name| Digest::of(name));
        let mut sharing = Sharing::default();
        sharing.add(one, "host/app", vec![base, top]);
        sharing.add(other, "host/app", vec![base]);
        assert!(sharing.is_alone(base, "host/app") && sharing.is_alone(top, "host/app"));
        assert!(!sharing.is_alone(base, "elsewhere/app"));
        sharing.add(third, "elsewhere/app", vec![base]);
        assert!(!sharing.is_alone(base, "host/app") && sharing.is_alone(top, "host/app"));
        sharing.remove(third);
        assert!(sharing.is_alone(base, "host/app"));
        assert_eq!(sharing.share(one, "elsewhere/app"), Some(vec![base, top]));
        assert_eq!(sharing.share(one, "elsewhere/app"), None);
        assert!(!sharing.is_alone(top, "host/app"));
        sharing.add(one, "host/app", vec![base, top]);
        assert!(!sharing.is_alone(top, "host/app"), "a tree that is made again is forgotten by nobody who has it");
    }

    #[test]
    fn reads_count_from_the_begin_of_a_window_to_its_end() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut window = Window::from(at(1));
        assert_eq!([0, 1, 9].map(|seconds| window.contains(at(seconds))), [false, true, true]);
        window.close(at(5));
        window.close(at(9));
        assert_eq!([0, 1, 4, 5, 7].map(|seconds| window.contains(at(seconds))), [false, true, true, false, false]);
    }
}
