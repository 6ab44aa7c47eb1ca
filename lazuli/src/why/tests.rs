use format_spec::IndexLocation;

use super::*;
use crate::status::{BELIEVED, Fetching};

const IMAGE: &str = "host/app:1";

fn lazy_layer(name: &str) -> LazyLayer {
    let digest = Digest::of(name.as_bytes());
    LazyLayer {
        blob: digest,
        blob_len: 30 << 20,
        index: IndexLocation { offset: 0, compressed_len: 1, plain_len: 1, digest },
        hot_len: 0,
    }
}

fn descriptor(name: &str, is_converted: bool) -> Descriptor {
    let mut layer = Descriptor::of("layer", name.as_bytes());
    layer.size = if is_converted { 30 << 20 } else { 3 << 20 };
    layer.annotations = is_converted.then(|| lazy_layer(name).to_annotations());
    layer
}

fn image_layer(name: &str) -> ImageLayer {
    let lazy = lazy_layer(name);
    let sums = Sums {
        layer_count: 1,
        present_frame_count: 1,
        needed_frame_count: 2,
        compressed_len: 30 << 20,
        ..Sums::default()
    };
    ImageLayer {
        digest: lazy.blob,
        id: lazy.id(),
        is_complete: false,
        is_direct: false,
        truth: BELIEVED,
        reason: None,
        tar_digest: None,
        healed_page_count: 0,
        sums,
        fetching: Fetching::default(),
    }
}

fn node(layers: &[&str]) -> NodeStatus {
    let layers: Vec<ImageLayer> = layers.iter().map(|name| image_layer(name)).collect();
    let image = ImageStatus {
        image: IMAGE.to_owned(),
        is_lazy: true,
        is_complete: false,
        is_verified: false,
        reason: Some("1 of 1 layers have not arrived: they come when they are read, or in the background".to_owned()),
        mode: None,
        sums: layers.iter().map(|layer| layer.sums).sum(),
        fetching: Fetching::default(),
        layers,
    };
    let images = vec![image];
    NodeStatus {
        mode: Some(TreeMode::Erofs),
        mode_reason: None,
        images,
        total: Sums::default(),
        chains: vec![],
        not_lazy: vec![],
    }
}

fn container(snapshotter: &str, image: &str) -> ContainerRecord {
    ContainerRecord {
        id: "web-1".to_owned(),
        namespace: "k8s.io".to_owned(),
        image: image.to_owned(),
        snapshotter: snapshotter.to_owned(),
    }
}

fn subject(layers: Vec<Descriptor>) -> Subject {
    Subject { image: IMAGE.to_owned(), container: None, layers: Some(layers) }
}

/// An image with a lazy layer, and an ordinary one on top of it.
pub(crate) fn partly_lazy() -> (Subject, NodeStatus) {
    let layers = vec![descriptor("lazy", true), descriptor("ordinary", false)];
    (Subject { container: Some(container("lazuli", IMAGE)), ..subject(layers) }, node(&["lazy"]))
}

pub(crate) fn layer_waits(name: &str, wait_count: u64) -> LayerWaits {
    let wait =
        |path: &str, waited_ms, cause| PastWait { path: path.to_owned(), offset: 0, after_ms: 5, waited_ms, cause };
    LayerWaits {
        layer: lazy_layer(name).id(),
        wait_count,
        waited_ms: 1300,
        blocked_ms: 900,
        longest: vec![wait("/usr/lib/long", 1100, WaitCause::Frame), wait("/bin/a", 40, WaitCause::HotPack)],
        demanded_bytes: 20 << 20,
        hot_bytes: 10 << 20,
        best_rate: Some(11 << 20),
    }
}

#[test]
fn figures_of_an_image_are_those_of_its_layers_together() {
    let subject = subject(vec![descriptor("one", true), descriptor("two", true), descriptor("three", false)]);
    let mut slow = layer_waits("two", 2);
    slow.best_rate = Some(1 << 20);
    slow.longest = vec![PastWait { waited_ms: 50, ..slow.longest[1].clone() }];
    let waits = [layer_waits("one", 1), slow, layer_waits("of another image", 100)];
    let why = explain(&subject, &node(&["one", "two"]), &waits).unwrap();
    let figures =
        Figures { wait_count: 3, waited_ms: 2600, blocked_ms: 1800, demanded_bytes: 40 << 20, hot_bytes: 20 << 20 };
    assert_eq!((why.figures, why.sums.layer_count, why.sums.compressed_len), (figures, 3, 63 << 20));
    assert_eq!((why.bytes_per_second, why.full_pull_ms), (Some(11 << 20), Some(63_000 / 11)));
    let waits: Vec<_> = why.waits.iter().map(|wait| (wait.path.as_str(), wait.waited_ms)).collect();
    assert_eq!(waits, [("/usr/lib/long", 1100), ("/bin/a", 50), ("/bin/a", 40)]);
    let layers: Vec<_> = why.layers.iter().map(|layer| (layer.is_lazy, layer.figures.is_some())).collect();
    assert_eq!(layers, [(true, true), (true, true), (false, false)]);
}

#[test]
fn nothing_is_asked_about_layers_of_other_images() {
    let (subject, mut status) = partly_lazy();
    status.images.extend(node(&["of another image"]).images);
    assert_eq!(lazy_layers(&subject, &status), [lazy_layer("lazy").id()]);
}

/// Whatever keeps something from being lazy, in the words of the answer.
#[test]
fn everything_that_is_not_lazy_is_said() {
    let obstacles =
        |layers: Vec<Descriptor>, status: &NodeStatus| explain(&subject(layers), status, &[]).unwrap().obstacles;
    let both = || vec![descriptor("lazy", true), descriptor("ordinary", false), descriptor("above", true)];
    let digest = |name: &str| Digest::of(name.as_bytes()).hex()[..12].to_owned();
    let expected = [
        format!("1 of 3 layers is not converted, and downloaded before the start: 3.00 MiB ({})", digest("ordinary")),
        format!(
            "1 of 3 layers is converted, and not lazy all the same: a lazy layer lies on lazy ones only: 30.00 MiB ({})",
            digest("above")
        ),
    ];
    assert_eq!(obstacles(both(), &node(&["lazy"])), expected);
    assert_eq!(obstacles(vec![descriptor("lazy", true)], &node(&["lazy"])), [""; 0]);

    let mut refused = node(&["lazy"]);
    refused.images[0].layers[0].truth = REFUSED;
    refused.images[0].layers[0].reason = Some("it lies".to_owned());
    assert_eq!(obstacles(vec![descriptor("lazy", true)], &refused), ["nothing of it is shown: it lies"]);

    let mut pulled = node(&[]);
    pulled.images.clear();
    pulled.not_lazy.push(NotLazy { image: IMAGE.to_owned(), reason: "answered 401".to_owned(), since: 1 });
    assert_eq!(obstacles(vec![descriptor("lazy", true)], &pulled), ["it was pulled completely: answered 401"]);
}

#[test]
fn an_image_of_which_nothing_is_lazy_is_one_line() {
    let mut empty = node(&[]);
    empty.images.clear();
    let line = |subject: &Subject| explain(subject, &empty, &[]).unwrap_err();
    let ordinary = subject(vec![descriptor("a", false), descriptor("b", false)]);
    assert!(
        line(&ordinary).starts_with("host/app:1: not lazy: none of its 2 layers is converted"),
        "{}",
        line(&ordinary)
    );
    assert!(line(&subject(vec![descriptor("a", true)])).contains("it is converted, and was pulled completely"));
    let unknown = Subject { layers: None, container: Some(container("lazuli", IMAGE)), ..ordinary.clone() };
    assert!(line(&unknown).starts_with("web-1: host/app:1: not lazy: its manifest is not in containerd"));
    // Whatever the node has of the image, this container does not read it.
    let elsewhere = Subject { container: Some(container("overlayfs", IMAGE)), ..partly_lazy().0 };
    let line = explain(&elsewhere, &partly_lazy().1, &[]).unwrap_err();
    assert!(line.contains("snapshotter overlayfs"), "{line}");
}

#[test]
fn a_container_may_know_its_image_by_another_name() {
    let by_digest = format!("host/app@{}", Digest::of(b"image"));
    let container = Some(container("lazuli", &by_digest));
    let subject = Subject { image: by_digest, container, layers: Some(vec![descriptor("lazy", true)]) };
    let why = explain(&subject, &node(&["lazy"]), &[layer_waits("lazy", 1)]).unwrap();
    assert_eq!((why.is_lazy, why.container.as_deref(), why.figures.wait_count), (true, Some("web-1"), 1));
}
