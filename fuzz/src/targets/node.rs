//! What reaches the daemons of a node: labels, filters, configuration, lines of the control socket.

use control::{Request, Response};
use snapshotter::{
    config::Settings,
    filter::{Fields, Filters},
    names::{Labels, SnapshotKey},
    remote::{CRI_IMAGE, TARGET, remote_request},
};

use super::{choose, one_line, text};

/// A snapshot for filters to look at.
struct Snapshot;

impl Fields for Snapshot {
    fn field(&self, path: &[String]) -> Option<&str> {
        match path.first()?.as_str() {
            "name" => Some("default/7/sha256:ab"),
            "kind" => Some("committed"),
            "labels" => path.get(1).filter(|key| *key == "plain").map(|_| "a value"),
            _ => None,
        }
    }
}

/// First byte: what the rest is taken for.
pub(crate) fn run(data: &[u8]) {
    let Some((kind, rest)) = choose(data, 5) else { return };
    let text = text(rest);
    match kind {
        0 => labels(&text),
        1 => match Filters::parse(&text.split('\n').collect::<Vec<_>>()) {
            Ok(filters) => _ = filters.matches(&Snapshot),
            Err(error) => one_line(&error),
        },
        2 => match Settings::parse(&text) {
            Ok(settings) => _ = settings.or(Settings::default(), None),
            Err(error) => one_line(&error),
        },
        3 => {
            let Ok(request) = serde_json::from_slice::<Request>(rest) else { return };
            let line = serde_json::to_vec(&request).expect("text keys only");
            assert!(!line.contains(&b'\n'), "a request is one line");
            assert_eq!(serde_json::from_slice::<Request>(&line).expect("as written"), request);
        }
        _ => {
            let Ok(response) = serde_json::from_slice::<Response>(rest) else { return };
            let line = serde_json::to_vec(&response).expect("text keys only");
            assert!(!line.contains(&b'\n'), "an answer is one line");
            assert_eq!(serde_json::from_slice::<Response>(&line).expect("as written"), response);
        }
    }
}

/// Lines `key=value`.
fn labels(text: &str) {
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let labels: Labels = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let key = SnapshotKey::new("k8s.io/7/extract-1 sha256:ab").expect("a name");
    match remote_request(&key, &labels) {
        Ok(Some(request)) => {
            assert_eq!(labels.get(TARGET).map(String::as_str), Some(request.target.as_str()));
            assert!(labels.get(CRI_IMAGE) == Some(&request.layer.image));
        }
        Ok(None) => {}
        Err(error) => one_line(&error),
    }
}
