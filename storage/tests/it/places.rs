//! A layer comes from every image that names it.

use std::{sync::Arc, time::Duration};

use format_spec::LazyLayer;
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
