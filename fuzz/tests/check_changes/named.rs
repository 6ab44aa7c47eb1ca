//! Changes that a check once let pass, by name.

use format_spec::records::{mode, section};
use serde_json::{Value, json};

use crate::{
    container::Container,
    image::{Image, Stage},
    place::Place,
};

/// The findings of a check of the image as `hook` changes it, and whether it has looked at everything.
fn says(hook: &mut dyn FnMut(Stage<'_>)) -> (Vec<String>, bool) {
    let image = Image::new();
    let place = Place::new(&image);
    let changed = image.build(hook);
    assert!(changed != image.built, "nothing was changed");
    let report = place.check(&changed).unwrap();
    let lists = report.images.iter().flat_map(|image| {
        image.layers.iter().map(|layer| &layer.findings).chain([&image.findings]).collect::<Vec<_>>()
    });
    let lists = lists.chain(report.artifacts.iter().map(|artifact| &artifact.findings)).chain([&report.findings]);
    (lists.flatten().map(ToString::to_string).collect(), report.is_fully_checked)
}

fn check_found(words: &str, mut hook: impl FnMut(Stage<'_>)) {
    let (found, _) = says(&mut hook);
    assert!(found.iter().any(|finding| finding.contains(words)), "{words} in {found:#?}");
}

/// Changes the documents of one name at a place; the value there becomes the other one.
fn check_document(name: &str, place: &str, value: Value, words: &str) {
    check_found(words, |stage| {
        if let Stage::Document(other, document) = stage
            && other == name
        {
            let (parent, key) = place.rsplit_once('/').unwrap();
            document.pointer_mut(parent).unwrap()[key] = value.clone();
        }
    });
}

#[test]
fn a_footer_says_nothing_else_than_the_index() {
    // Length of the dedup section, and the two reserved fields.
    for at in [112, 12, 120] {
        check_found("footer: it says other positions", |stage| {
            if let Stage::Footer(0, footer) = stage {
                footer[at] ^= 1;
            }
        });
    }
}

#[test]
fn what_only_later_versions_understand_is_not_called_sound() {
    const FEATURES: usize = 16;
    let more = |container: &mut Container| {
        let mut section = container.sections[0].clone();
        section.kind = 77;
        container.sections.push(section);
    };
    let hooks: [&mut dyn FnMut(Stage<'_>); 5] = [
        &mut |stage| {
            if let Stage::Footer(0, footer) = stage {
                footer[FEATURES] = 1
            }
        },
        &mut |stage| {
            if let Stage::IndexBytes(0, bytes) = stage {
                bytes[FEATURES] = 1
            }
        },
        &mut |stage| {
            if let Stage::DedupBytes(0, bytes) = stage {
                bytes[FEATURES] = 1
            }
        },
        &mut |stage| {
            if let Stage::Records(0, index) = stage {
                more(index)
            }
        },
        &mut |stage| {
            if let Stage::DedupRecords(0, dedup) = stage {
                more(dedup)
            }
        },
    ];
    for (number, hook) in hooks.into_iter().enumerate() {
        assert_eq!(says(hook), (Vec::new(), false), "{number}");
    }
}

#[test]
fn bytes_that_must_be_zero_are_zero() {
    const RESERVED: usize = 56;
    const TAR_LEN: usize = 32;
    let words = "bytes that must be 0 are not";
    check_found(&format!("index: {words}"), |stage| {
        if let Stage::IndexBytes(0, bytes) = stage {
            bytes[RESERVED] = 1
        }
    });
    check_found(&format!("index: {words}"), |stage| {
        if let Stage::IndexBytes(0, bytes) = stage {
            bytes.push(1)
        }
    });
    for at in [RESERVED, TAR_LEN] {
        check_found(&format!("dedup section: {words}"), |stage| {
            if let Stage::DedupBytes(0, bytes) = stage {
                bytes[at] = 1;
            }
        });
    }
}

#[test]
fn fields_that_mean_nothing_for_a_file_are_zero() {
    const PAYLOAD: usize = 28;
    const SIZE: usize = 32;
    let change = |kind: u32, field: usize| {
        move |stage: Stage<'_>| {
            let Stage::Records(0, index) = stage else { return };
            let inodes = index.section(section::INODES);
            let is_of_kind = |inode: &&mut [u8]| u32::from_le_bytes([inode[0], inode[1], 0, 0]) & mode::TYPE == kind;
            let inode = inodes.chunks_exact_mut(64).find(is_of_kind).unwrap();
            inode[field] ^= 1;
        }
    };
    check_found("/etc/marked: payload field is 1", change(mode::REGULAR, PAYLOAD));
    check_found("/lib/pipe: payload field is 1", change(mode::FIFO, PAYLOAD));
    check_found("/lib/pipe: length field is 1", change(mode::FIFO, SIZE));
    check_found("/lib/null: length field is 1", change(mode::CHARACTER, SIZE));
}

#[test]
fn the_index_of_a_layer_names_no_layers() {
    check_found("index: it names layers", |stage| {
        if let Stage::Records(0, index) = stage {
            *index.section(section::LAYERS) = vec![7; 32];
        }
    });
}

#[test]
fn a_descriptor_says_of_a_config_what_the_original_says() {
    check_document("manifest", "/config/size", json!(1_000_000), "config: it has");
    check_document("manifest", "/config/mediaType", json!("application/octet-stream"), "config, mediaType");
    check_document("manifest", "/config/annotations/of", json!("another"), "config, annotation of");
    check_document("manifest", "/config/urls", json!([]), "config, urls");
    check_document("manifest", "/config/platform", json!({"os": "linux"}), "config, platform");
    check_document("manifest", "/config/data", json!("e30="), "config, data: it is not the content");
}

#[test]
fn a_manifest_and_its_layers_have_the_types_that_a_conversion_gives_them() {
    check_document("manifest", "/mediaType", json!("text/plain"), "mediaType");
    check_document("manifest", "/schemaVersion", json!(1), "manifest, schemaVersion");
    let foreign = "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd";
    check_document("manifest", "/layers/0/mediaType", json!(foreign), "mediaType: it is");
    check_document("manifest", "/layers/0/platform", json!({"os": "linux"}), "platform");
}

#[test]
fn a_layer_says_from_which_blob_it_was_made_or_nothing() {
    let other = format!("sha256:{}", "ab".repeat(32));
    for key in ["digest", "diff-id"] {
        let place = format!("/layers/0/annotations/io.lazuli.source.{key}");
        check_document("manifest", &place, json!(other), &format!("annotation io.lazuli.source.{key}: it is"));
    }
}

#[test]
fn an_index_lists_what_the_original_lists() {
    check_document("list", "/schemaVersion", json!(1), "schemaVersion");
    check_document("list", "/annotations/of", json!("another"), "annotation of");
    check_document("list", "/subject", json!({}), "subject");
    check_document("list", "/manifests/0/size", json!(7), "entry 1");
    check_document("list", "/manifests/0/platform/variant", json!("v3"), "entry 1, platform");
    check_document("list", "/manifests/1/mediaType", json!("text/plain"), "entry 2, mediaType");
    check_document("list", "/manifests/0/annotations/of", json!("another"), "entry 1, annotation of");
    check_document(
        "list",
        "/manifests/0/annotations/com.amazon.soci.index-digest",
        json!("of the old layers"),
        "entry 1",
    );
    let about = "/manifests/2/annotations/vnd.docker.reference.digest";
    let nobody = format!("sha256:{}", "ab".repeat(32));
    check_document("list", about, json!(nobody), "entry 3, annotation vnd.docker.reference.digest");
    check_document("attestation", "/layers/0/annotations", json!({"of": "another"}), "manifest: the original has");
    check_document("statement", "/_type", json!("another"), "manifest: the original has");
}
