//! containerd's records of containers and images, as far as they say which image a container has, and which layers an
//! image. Nothing is changed, and nothing held.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_client::services::v1::{
    Container, GetContainerRequest, GetImageRequest, ListContainersRequest, ListNamespacesRequest, ReadContentRequest,
    containers_client::ContainersClient, content_client::ContentClient, images_client::ImagesClient,
    namespaces_client::NamespacesClient,
};
use converter::image::{
    manifest::{Descriptor, ImageIndex, ImageManifest},
    platform::Platform,
};
use tonic::{Code, Status, transport::Channel};

use crate::pull::containerd::{ContainerdError, Headers, connect, refused};

/// How long containerd may take for all that it is asked.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);
/// Longest list of the containers of a namespace, in bytes: each comes with its specification, of some tens of KiB.
const LIST_LEN_MAX: usize = 256 << 20;
/// Longest manifest or index that is read. Registries allow 4 MiB.
const MANIFEST_LEN_MAX: usize = 4 << 20;
/// Indexes within indexes that are followed.
const INDEX_DEPTH_MAX: usize = 4;
/// The shortest beginning of an ID that stands for it.
const PREFIX_LEN_MIN: usize = 4;
/// Labels under which a container has the name that its user gave it.
const NAME_LABELS: [&str; 2] = ["io.kubernetes.container.name", "nerdctl/name"];
/// IDs that are listed where a name is that of several containers.
const LISTED_MAX: usize = 8;

/// A container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ContainerRecord {
    pub(crate) id: String,
    pub(crate) namespace: String,
    /// The name of its image in containerd; empty where it has none.
    pub(crate) image: String,
    pub(crate) snapshotter: String,
}

/// The answer of containerd to a name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Records {
    /// The container of that name.
    pub(crate) container: Option<ContainerRecord>,
    /// The layers of the image, lowest first; `None` where there is no such image, or its manifest is not there.
    pub(crate) layers: Option<Vec<Descriptor>>,
    /// Whether there is such an image.
    pub(crate) has_image: bool,
}

/// The name cannot be looked up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordsError {
    /// containerd.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// It is that of several containers.
    #[error("{count} containers are called so, name one by its ID: {}", .ids.join(", "))]
    Ambiguous {
        /// How many.
        count: usize,
        /// Some of them.
        ids: Vec<String>,
    },
}

type Result<T> = std::result::Result<T, RecordsError>;

/// Looks for a container called `wanted`, unless that is known to be an image, and for the image; in one namespace of
/// the containerd at `address`, or in all.
///
/// # Errors
///
/// When containerd does not answer, or several containers are called so.
pub(crate) async fn records(address: &Path, namespace: Option<&str>, wanted: &str, is_image: bool) -> Result<Records> {
    let looked = tokio::time::timeout(ANSWERS_WITHIN, look(address, namespace, wanted, is_image)).await;
    let timeout = |_| ContainerdError::Timeout { address: PathBuf::from(address), within: ANSWERS_WITHIN };
    looked.map_err(timeout)?
}

async fn look(address: &Path, namespace: Option<&str>, wanted: &str, is_image: bool) -> Result<Records> {
    let channel = connect(address).await?;
    let namespaces = match namespace {
        Some(namespace) => vec![namespace.to_owned()],
        None => namespaces(&channel).await?,
    };
    let namespaces: Vec<Namespace> =
        namespaces.into_iter().map(|name| Namespace::new(&channel, name)).collect::<std::result::Result<_, _>>()?;
    let mut containers = Vec::new();
    for namespace in namespaces.iter().filter(|_| !is_image) {
        containers.extend(namespace.containers_called(wanted).await?);
    }
    if containers.len() > 1 {
        let ids = containers.iter().take(LISTED_MAX).map(|container| container.id.clone()).collect();
        return Err(RecordsError::Ambiguous { count: containers.len(), ids });
    }
    let container = containers.pop();
    let image = container.as_ref().map_or(wanted, |container| &container.image);
    let mut records = Records { container: container.clone(), layers: None, has_image: false };
    let is_its_own = |name: &str| container.as_ref().is_none_or(|container| container.namespace == name);
    for namespace in namespaces.iter().filter(|namespace| is_its_own(&namespace.name)) {
        if records.layers.is_none()
            && let Some(target) = namespace.image(image).await?
        {
            records.has_image = true;
            records.layers = namespace.layers(target).await?;
        }
    }
    Ok(records)
}

async fn namespaces(channel: &Channel) -> Result<Vec<String>> {
    let listed = NamespacesClient::new(channel.clone()).list(ListNamespacesRequest::default()).await;
    let listed = listed.map_err(refused("list of namespaces"))?;
    Ok(listed.into_inner().namespaces.into_iter().map(|namespace| namespace.name).collect())
}

/// One namespace.
struct Namespace {
    name: String,
    channel: Channel,
    headers: Headers,
}

impl Namespace {
    fn new(channel: &Channel, name: String) -> std::result::Result<Self, ContainerdError> {
        Ok(Self { headers: Headers::of(&name)?, channel: channel.clone(), name })
    }

    /// The container with this ID; else those with a name or an ID that begins so.
    async fn containers_called(&self, wanted: &str) -> Result<Vec<ContainerRecord>> {
        let client = ContainersClient::with_interceptor(self.channel.clone(), self.headers.clone());
        let mut client = client.max_decoding_message_size(LIST_LEN_MAX);
        let found = client.get(GetContainerRequest { id: wanted.to_owned() }).await;
        if let Some(found) = found_or_none(found, "container")? {
            return Ok(found.into_inner().container.map(|found| self.record(found)).into_iter().collect());
        }
        let listed = client.list(ListContainersRequest::default()).await.map_err(refused("list of containers"))?;
        let all = listed.into_inner().containers.into_iter();
        Ok(all.filter(|container| is_called(container, wanted)).map(|container| self.record(container)).collect())
    }

    fn record(&self, container: Container) -> ContainerRecord {
        let Container { id, image, snapshotter, .. } = container;
        ContainerRecord { id, namespace: self.name.clone(), image, snapshotter }
    }

    /// The digest that an image points to.
    async fn image(&self, name: &str) -> Result<Option<String>> {
        if name.is_empty() {
            return Ok(None);
        }
        let mut client = ImagesClient::with_interceptor(self.channel.clone(), self.headers.clone());
        let found = found_or_none(client.get(GetImageRequest { name: name.to_owned() }).await, "image")?;
        Ok(found.and_then(|found| found.into_inner().image?.target).map(|target| target.digest))
    }

    /// The layers of the image for this host that a manifest or an index leads to.
    async fn layers(&self, target: String) -> Result<Option<Vec<Descriptor>>> {
        let mut digest = target;
        for _ in 0..=INDEX_DEPTH_MAX {
            let Some(bytes) = self.blob(&digest).await? else { return Ok(None) };
            if let Ok(manifest) = serde_json::from_slice::<ImageManifest>(&bytes) {
                return Ok(Some(manifest.layers));
            }
            match serde_json::from_slice::<ImageIndex>(&bytes).ok().and_then(|index| chosen(&index)) {
                Some(next) => digest = next,
                None => return Ok(None),
            }
        }
        Ok(None)
    }

    /// A small blob; `None` where it is not here.
    async fn blob(&self, digest: &str) -> Result<Option<Vec<u8>>> {
        let what = format!("blob {digest}");
        let mut client = ContentClient::with_interceptor(self.channel.clone(), self.headers.clone());
        let request = ReadContentRequest { digest: digest.to_owned(), ..ReadContentRequest::default() };
        let Some(answer) = found_or_none(client.read(request).await, &what)? else { return Ok(None) };
        let (mut pieces, mut bytes) = (answer.into_inner(), Vec::new());
        while let Some(piece) = found_or_none(pieces.message().await, &what)?.flatten() {
            bytes.extend(piece.data);
            if bytes.len() > MANIFEST_LEN_MAX {
                return Ok(None);
            }
        }
        Ok(Some(bytes))
    }
}

/// Whether a container has a name, or an ID that begins with it.
fn is_called(container: &Container, wanted: &str) -> bool {
    let is_prefix = wanted.len() >= PREFIX_LEN_MIN && container.id.starts_with(wanted);
    is_prefix || NAME_LABELS.iter().any(|label| container.labels.get(*label).is_some_and(|name| name == wanted))
}

/// The entry of an index for this host; the only one where entries say no platform.
fn chosen(index: &ImageIndex) -> Option<String> {
    let stated = index.known().filter_map(|entry| Some((entry, entry.platform.as_ref()?)));
    let best = Platform::host().choose(stated).map(|(entry, _)| entry);
    best.or_else(|| index.known().next()).map(|entry| entry.digest.to_string())
}

fn found_or_none<T>(answer: std::result::Result<T, Status>, what: &str) -> Result<Option<T>> {
    match answer {
        Ok(found) => Ok(Some(found)),
        // A name that containerd would not take for one is that of nothing.
        Err(status) if matches!(status.code(), Code::NotFound | Code::InvalidArgument) => Ok(None),
        Err(status) => Err(refused(what)(status).into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_container_is_found_by_the_names_that_people_see() {
        let id = "4f1c0ddc0de0".to_owned();
        let labels = [(NAME_LABELS[0].to_owned(), "web".to_owned()), ("other".to_owned(), "other".to_owned())].into();
        let container = Container { id, labels, ..Container::default() };
        let found = ["web", "4f1c", "4f1c0ddc0de0", "4f1", "other", "we", ""].map(|name| is_called(&container, name));
        assert_eq!(found, [true, true, true, false, false, false, false]);
    }

    #[test]
    fn the_image_of_an_index_is_that_of_this_host() {
        let digest = |byte: u8| format_spec::Digest::of(&[byte]).to_string();
        let entry = |byte, architecture: &str| json!({ "mediaType": "m", "digest": digest(byte), "size": 1, "platform": { "os": "linux", "architecture": architecture } });
        let host = Platform::host().to_string();
        let own = host.split('/').nth(1).unwrap();
        let index = |entries: &[serde_json::Value]| -> ImageIndex {
            serde_json::from_value(json!({ "schemaVersion": 2, "manifests": entries })).unwrap()
        };
        assert_eq!(chosen(&index(&[entry(1, "s390x"), entry(2, own)])), Some(digest(2)));
        let unsaid = json!({ "mediaType": "m", "digest": digest(3), "size": 1 });
        assert_eq!(chosen(&index(&[unsaid])), Some(digest(3)));
        assert_eq!(chosen(&index(&[])), None);
    }
}
