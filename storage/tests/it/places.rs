//! A layer comes from every image that names it.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use format_spec::{Digest, LazyLayer};
use serde_json::{Value, json};
use storage::{Cache, CacheOptions, KnownLayer, RequestOptions, Source, SourceError, Sources};
use tokio::runtime::Handle;

use crate::support::{Fixture, MemorySource, TestLayer, check_read, options};

fn refused() -> SourceError {
    SourceError::refused("answered 404")
}

/// Until the disk says so.
async fn wait_for_places(cache: &Cache, directory: &std::path::Path, names: &[&str]) {
    let known = || {
        let id = cache.known_layers().unwrap()[0].layer.id();
        let record = std::fs::read(directory.join("layers").join(id.hex()).join("layer.json")).unwrap();
        let record: Value = serde_json::from_slice(&record).unwrap();
        let older = record["older"].as_array().cloned().unwrap_or_default();
        std::iter::once(record["description"].clone()).chain(older).collect::<Vec<_>>()
    };
    let expected: Vec<_> = names.iter().map(|name| json!(name)).collect();
    while known() != expected {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// X came from registry A, then Y with the same layers from B: when A refused, a fresh container of Y got an error from
/// a healthy B.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_read_from_another_image_where_the_first_one_refuses() {
    let test = TestLayer::of_frames(8, 10_000);
    let fixture = Fixture::new(&test).await;
    check_read(&fixture.layer, &test, test.plain_of_frame(6)).await;
    let other = MemorySource::new(&test);
    fixture.cache.layer(&test.lazy, other.clone(), json!("other")).await.unwrap();
    fixture.source.set_outage(Some(refused()));
    check_read(&fixture.layer, &test, test.plain_of_frame(1)).await;
    assert_eq!(fixture.source.frame_requests(), [6..7, 1..2].map(|frames| test.request_for(frames)));
    assert_eq!(other.requests(), [test.request_for(1..2)]);
    // The place that works is asked from now on.
    check_read(&fixture.layer, &test, test.plain_of_frame(4)).await;
    assert_eq!(fixture.source.frame_requests().len(), 2);
}

/// An image that names the layer of another one, and does not have it, took the working place away.
#[tokio::test(flavor = "multi_thread")]
async fn naming_a_layer_takes_nothing_from_who_has_it() {
    let test = TestLayer::of_frames(3, 10_000);
    let fixture = Fixture::new(&test).await;
    let liar = MemorySource::new(&test);
    liar.set_outage(Some(refused()));
    fixture.cache.layer(&test.lazy, liar.clone(), json!("liar")).await.unwrap();
    check_read(&fixture.layer, &test, 0..test.files[0].end).await;
    assert_eq!(liar.requests(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_opened_from_the_next_image_that_names_it_while_the_first_registry_hangs() {
    let test = TestLayer::of_frames(1, 10_000);
    let directory = tempfile::tempdir().unwrap();
    let requests = RequestOptions { opening_answer_max: Duration::from_millis(200), ..RequestOptions::default() };
    let cache = Cache::open(directory.path(), Handle::current(), CacheOptions { requests, ..options() }).unwrap();
    let hanging = MemorySource::new(&test);
    hanging.hold_at(test.lazy.index.offset);
    let (first_cache, lazy, first_source) = (cache.clone(), test.lazy, hanging.clone());
    let first = tokio::spawn(async move { first_cache.layer(&lazy, first_source, json!("hanging")).await });
    hanging.wait_for_frame_requests(0).await;
    let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("healthy")).await.unwrap();
    check_read(&layer, &test, 0..100).await;
    first.await.unwrap().unwrap();
    wait_for_places(&cache, directory.path(), &["healthy", "hanging"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_process_knows_all_places_and_makes_their_sources() {
    let test = TestLayer::of_frames(3, 10_000);
    let fixture = Fixture::new(&test).await;
    fixture.cache.layer(&test.lazy, MemorySource::new(&test), json!("second")).await.unwrap();
    wait_for_places(&fixture.cache, fixture.directory.path(), &["second", "test"]).await;

    let crashed = fixture.crash();
    let (gone, other) = (MemorySource::new(&test), MemorySource::new(&test));
    gone.set_outage(Some(refused()));
    let made = other.clone();
    let sources = Sources::new(move |layer: &LazyLayer, description: &Value| {
        assert_eq!(*layer, test.lazy);
        (description == &json!("test")).then(|| -> Arc<dyn Source> { made.clone() })
    });
    let cache = Cache::open(crashed.path(), Handle::current(), CacheOptions { sources, ..options() }).unwrap();
    let test = TestLayer::of_frames(3, 10_000);
    let layer = cache.layer(&test.lazy, gone.clone(), json!("second")).await.unwrap();
    check_read(&layer, &test, 0..test.files[0].end).await;
    assert_eq!((gone.requests().len(), other.requests().len()), (1, 1));
    assert_eq!(layer.descriptions(), ["second", "test"].map(|name| json!(name)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_with_one_description_is_read_and_one_with_several_is_read_by_older_programs() {
    let test = TestLayer::of_frames(1, 10_000);
    let fixture = Fixture::new(&test).await;
    let path = fixture.directory.path().join("layers").join(test.lazy.id().hex()).join("layer.json");
    let record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(record, json!({ "layer": test.lazy, "description": "test" }), "as it always was");
    fixture.cache.layer(&test.lazy, MemorySource::new(&test), json!("new")).await.unwrap();
    wait_for_places(&fixture.cache, fixture.directory.path(), &["new", "test"]).await;
    let expected = [KnownLayer { layer: test.lazy, description: json!("new") }];
    assert_eq!(fixture.cache.known_layers().unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_is_gone_is_forgotten_but_never_the_only_one() {
    let test = TestLayer::of_frames(2, 10_000);
    let fixture = Fixture::new(&test).await;
    let other = MemorySource::new(&test);
    fixture.cache.layer(&test.lazy, other.clone(), json!("other")).await.unwrap();
    assert!(fixture.cache.forget_place(test.lazy.id(), &json!("test")));
    assert!(!fixture.cache.forget_place(test.lazy.id(), &json!("other")));
    assert!(!fixture.cache.forget_place(test.lazy.id(), &json!("unknown")));
    wait_for_places(&fixture.cache, fixture.directory.path(), &["other"]).await;
    check_read(&fixture.layer, &test, 0..test.files[0].end).await;
    assert_eq!((fixture.source.frame_requests().len(), other.requests().len()), (0, 1));
}

/// The same index in another blob.
fn in_another_blob(test: &TestLayer) -> TestLayer {
    let mut other = test.clone();
    other.lazy.blob = Digest::of(b"another blob");
    other.lazy.blob_len += 1;
    other
}

/// Two images had the same index in blobs of their own: the next process asked both for the blob of the first.
#[tokio::test(flavor = "multi_thread")]
async fn a_later_process_asks_each_place_for_its_own_blob() {
    let test = TestLayer::of_frames(3, 10_000);
    let other = in_another_blob(&test);
    let fixture = Fixture::new(&test).await;
    fixture.cache.held_layer(&other.lazy, MemorySource::new(&other), json!("other")).await.unwrap();
    wait_for_places(&fixture.cache, fixture.directory.path(), &["other", "test"]).await;
    let crashed = fixture.crash();
    for _ in 0..2 {
        let made = Arc::new(Mutex::new(Vec::new()));
        let (source, log) = (MemorySource::new(&test), made.clone());
        let sources = Sources::new(move |layer: &LazyLayer, description: &Value| -> Option<Arc<dyn Source>> {
            log.lock().unwrap().push((layer.blob, description.clone()));
            Some(source.clone())
        });
        let cache = Cache::open(crashed.path(), Handle::current(), CacheOptions { sources, ..options() }).unwrap();
        cache.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap();
        let mut made = made.lock().unwrap().clone();
        made.sort_by_key(|(_, description)| description.to_string());
        assert_eq!(made, [(other.lazy.blob, json!("other")), (test.lazy.blob, json!("test"))]);
        // It keeps what it has read.
        wait_for_places(&cache, crashed.path(), &["test", "other"]).await;
    }
}

/// An image was taken for known by its name, and went on being asked for a blob that it never had.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_names_another_blob_is_asked_for_that() {
    let test = TestLayer::of_frames(3, 10_000);
    let fixture = Fixture::new(&test).await;
    fixture.source.set_outage(Some(refused()));
    let (other, healthy) = (in_another_blob(&test), MemorySource::new(&test));
    fixture.cache.layer(&other.lazy, healthy.clone(), json!("test")).await.unwrap();
    check_read(&fixture.layer, &test, 0..test.files[0].end).await;
    assert_eq!(healthy.requests().len(), 1);
    assert!(fixture.cache.forget_place(test.lazy.id(), &json!("test")), "both of that name");
    assert_eq!(fixture.layer.descriptions(), [json!("test")], "never the last one");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_is_fetched_from_where_each_place_has_it() {
    let test = TestLayer::of_frames(1, 10_000);
    let directory = tempfile::tempdir().unwrap();
    let requests = RequestOptions { opening_answer_max: Duration::from_millis(200), ..RequestOptions::default() };
    let cache = Cache::open(directory.path(), Handle::current(), CacheOptions { requests, ..options() }).unwrap();
    let mut elsewhere = in_another_blob(&test);
    elsewhere.lazy.index.offset -= 1;
    elsewhere.lazy.index.plain_len += 1;
    let hanging = MemorySource::new(&elsewhere);
    hanging.hold_at(elsewhere.lazy.index.offset);
    let (first_cache, lazy, first_source) = (cache.clone(), elsewhere.lazy, hanging.clone());
    let first = tokio::spawn(async move { first_cache.layer(&lazy, first_source, json!("hanging")).await });
    hanging.wait_for_frame_requests(0).await;
    let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("healthy")).await.unwrap();
    check_read(&layer, &test, 0..100).await;
    first.await.unwrap().unwrap();
}

/// Sixteen images of another repository, or of sixteen, took the registry of a running image away.
#[tokio::test(flavor = "multi_thread")]
async fn images_that_only_name_a_layer_take_no_place_from_one_that_is_used() {
    let test = TestLayer::of_frames(3, 10_000);
    let directory = tempfile::tempdir().unwrap();
    let owner = |description: &Value| description.as_str().unwrap_or_default().split(':').next().unwrap().to_owned();
    let options = CacheOptions { owner, ..options() };
    let cache = Cache::open(directory.path(), Handle::current(), options).unwrap();
    let honest = MemorySource::new(&test);
    let layer = cache.held_layer(&test.lazy, honest.clone(), json!("honest:1")).await.unwrap();
    // Whoever has most loses first: this one is only named, too.
    cache.layer(&test.lazy, MemorySource::new(&test), json!("named:1")).await.unwrap();
    let gone = MemorySource::new(&test);
    gone.set_outage(Some(refused()));
    let crowd = |names: Vec<String>| {
        let (cache, gone, lazy) = (cache.clone(), gone.clone(), test.lazy);
        async move {
            for name in names {
                cache.layer(&lazy, gone.clone(), json!(name)).await.unwrap();
            }
        }
    };
    crowd((0..40).map(|number| format!("crowd:{number}")).collect()).await;
    let places = layer.descriptions();
    assert_eq!(places.len(), 17);
    assert!(places.contains(&json!("named:1")) && places.contains(&json!("crowd:39")), "{places:?}");
    crowd((0..40).map(|number| format!("crowd{number}:1")).collect()).await;
    assert!(layer.descriptions().contains(&json!("honest:1")));
    check_read(&layer, &test, 0..test.files[0].end).await;
    assert_eq!(honest.frame_requests().len(), 1);
    // One that is started after all is held from then on.
    cache.hold_place(&test.lazy, MemorySource::new(&test), json!("late:1"));
    crowd((40..80).map(|number| format!("crowd{number}:1")).collect()).await;
    let places = layer.descriptions();
    assert_eq!(places.len(), 18);
    assert!(places.contains(&json!("honest:1")) && places.contains(&json!("late:1")), "{places:?}");
}
