//! containerd's API, as far as a pull needs it: content, snapshots, diff, images, all under one lease.

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use containerd_client::{
    services::v1::{
        AbortRequest, AddResourceRequest, ApplyRequest, CreateImageRequest, DeleteRequest, Image, Info, InfoRequest,
        Resource, UpdateImageRequest, UpdateRequest, WriteAction, WriteContentRequest,
        content_client::ContentClient,
        diff_client::DiffClient,
        images_client::ImagesClient,
        leases_client::LeasesClient,
        snapshots::{
            CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
            snapshots_client::SnapshotsClient,
        },
    },
    types::{Descriptor as ContainerdDescriptor, Mount},
};
use format_spec::Digest;
use futures_util::{Stream, StreamExt, stream};
use prost_types::{FieldMask, Timestamp};
use storage::SourceError;
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

use converter::image::manifest::Descriptor;

/// When containerd may forget a lease by itself: for a pull that was killed. containerd's clients say the same.
const LEASE_EXPIRES_AFTER: Duration = Duration::from_secs(24 * 60 * 60);
/// Bytes in one message of a write; gRPC servers take up to 4 MiB.
const WRITE_PIECE_LEN: usize = 1 << 20;

/// containerd refused, failed, or is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerdError {
    /// Nobody serves.
    #[error("containerd at {}: {reason}; is it running, and --address right?", address.display())]
    Unreachable {
        /// The socket.
        address: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The namespace cannot be said in a request.
    #[error("{0:?} is no containerd namespace")]
    Namespace(String),
    /// It cannot yet, and says that asking again helps (gRPC `Unavailable`).
    #[error("containerd, {what}: {reason}")]
    NotYet {
        /// The request.
        what: String,
        /// The reason why it waits.
        reason: String,
    },
    /// No answer came in time.
    #[error("containerd does not answer on {} within {within:?}: it hangs or is very busy", address.display())]
    Timeout {
        /// The socket.
        address: PathBuf,
        /// How long was waited.
        within: Duration,
    },
    /// An answer.
    #[error("containerd, {what}: {reason}")]
    Refused {
        /// What was asked.
        what: String,
        /// What containerd said.
        reason: String,
    },
}

/// A blob cannot be written.
#[derive(Debug)]
pub(super) enum WriteError {
    /// containerd's side.
    Containerd(ContainerdError),
    /// The side that the bytes come from.
    Source(SourceError),
}

/// Begins the names of labels that list the repositories of a registry, whose name follows, that have the blob. containerd
/// mounts it from there in a push.
pub(super) const REPOSITORIES: &str = "containerd.io/distribution.source.";
/// Longest label, name and value, in bytes. Source: containerd, pkg/labels/validate.go.
const LABEL_LEN_MAX: usize = 4096;

type Result<T> = std::result::Result<T, ContainerdError>;
pub(crate) type Intercepted = InterceptedService<Channel, Headers>;

/// Says in every request which namespace and lease it belongs to.
#[derive(Debug, Clone)]
pub(crate) struct Headers {
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Headers {
    /// Those of requests in a namespace that no lease holds anything of.
    pub(crate) fn of(namespace: &str) -> Result<Self> {
        let value = namespace.parse().ok().filter(|value: &MetadataValue<Ascii>| !value.is_empty());
        let namespace = value.ok_or_else(|| ContainerdError::Namespace(namespace.to_owned()))?;
        Ok(Self { namespace, lease: None })
    }
}

/// Connects to the socket at `address`.
pub(crate) async fn connect(address: &Path) -> Result<Channel> {
    let unreachable = |reason: String| ContainerdError::Unreachable { address: address.to_owned(), reason };
    // Asked for its plain error: that of the channel does not say what happened.
    tokio::net::UnixStream::connect(address).await.map_err(|error| unreachable(error.to_string()))?;
    containerd_client::connect(address).await.map_err(|error| unreachable(error.to_string()))
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> std::result::Result<Request<()>, Status> {
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        Ok(request)
    }
}

/// containerd, with a lease on everything that is stored through this.
#[derive(Debug, Clone)]
pub(super) struct Containerd {
    channel: Channel,
    headers: Headers,
    lease_id: String,
}

/// What a prepare led to.
pub(super) enum Prepared {
    /// The snapshot is there by now.
    Exists,
    /// It is to be filled.
    Mounts(Vec<Mount>),
}

impl Containerd {
    /// Connects and takes a lease.
    pub(super) async fn lease(address: &Path, namespace: &str) -> Result<Self> {
        let channel = connect(address).await?;
        let headers = Headers::of(namespace)?;
        let expires = Timestamp::from(SystemTime::now() + LEASE_EXPIRES_AFTER);
        let expires = Timestamp { nanos: 0, ..expires }.to_string();
        let labels = [("containerd.io/gc.expire".to_owned(), expires)].into();
        let request = containerd_client::services::v1::CreateRequest { id: new_lease_id(), labels };
        let mut leases = LeasesClient::with_interceptor(channel.clone(), headers.clone());
        let lease = leases.create(request).await.map_err(refused("lease"))?.into_inner().lease.unwrap_or_default();
        let value = lease.id.parse().map_err(|_| refuse("lease", format!("answered with the name {:?}", lease.id)))?;
        Ok(Self { channel, headers: Headers { lease: Some(value), ..headers }, lease_id: lease.id })
    }

    /// The lease's name, unique in containerd.
    pub(super) fn lease_id(&self) -> &str {
        &self.lease_id
    }

    /// Gives the lease up; `collect` waits until what nobody else needs is deleted.
    pub(super) async fn end_lease(&self, collect: bool) -> Result<()> {
        let request = DeleteRequest { id: self.lease_id.clone(), sync: collect };
        self.leases().delete(request).await.map_err(refused("end of the lease")).map(|_| ())
    }

    /// Stores a small blob; one that is there gets the labels.
    pub(super) async fn store(&self, blob: &Descriptor, bytes: Bytes, labels: HashMap<String, String>) -> Result<()> {
        if self.has_blob(&blob.digest, &labels).await? {
            return Ok(());
        }
        match self.write(blob, stream::iter([Ok(bytes)]), labels).await {
            Ok(()) => Ok(()),
            Err(WriteError::Containerd(error)) => Err(error),
            Err(WriteError::Source(error)) => unreachable!("bytes in memory do not fail: {error}"),
        }
    }

    /// Whether a blob is there; then it is held by the lease and gets the labels.
    pub(super) async fn has_blob(&self, digest: &Digest, labels: &HashMap<String, String>) -> Result<bool> {
        // Held first: it could be collected between the look and the label.
        self.hold("content", &digest.to_string()).await?;
        match self.content().info(InfoRequest { digest: digest.to_string() }).await {
            Ok(found) => {
                let known = found.into_inner().info.unwrap_or_default().labels;
                self.label(digest, beside_known(labels, &known)).await.map(|()| true)
            }
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(refused(&format!("blob {digest}"))(status)),
        }
    }

    /// Adds labels to a blob, in the place of those with the same names.
    pub(super) async fn label(&self, digest: &Digest, labels: HashMap<String, String>) -> Result<()> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = Info { digest: digest.to_string(), labels, ..Info::default() };
        let request = UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
        self.content().update(request).await.map_err(refused(&format!("labels of blob {digest}"))).map(|_| ())
    }

    /// Stores a blob from a stream; containerd checks its length and digest.
    pub(super) async fn write(
        &self,
        blob: &Descriptor,
        pieces: impl Stream<Item = std::result::Result<Bytes, SourceError>> + Send + 'static,
        labels: HashMap<String, String>,
    ) -> std::result::Result<(), WriteError> {
        let name = format!("{}-{}", self.lease_id, blob.digest);
        let failure = Arc::new(Mutex::new(None));
        let outgoing = Outgoing {
            pieces: Box::pin(pieces),
            rest: Bytes::new(),
            offset: 0,
            is_committed: false,
            ends_with: labels,
            blob: (name.clone(), blob.digest, blob.size),
            failure: Arc::clone(&failure),
        };
        let written = self.send(stream::unfold(outgoing, Outgoing::next)).await;
        let failure = failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        let result = match (failure, written) {
            (Some(error), _) => Err(WriteError::Source(error)),
            (None, Ok(())) => Ok(()),
            // Somebody else has stored it meanwhile.
            (None, Err(status)) if status.code() == Code::AlreadyExists => Ok(()),
            (None, Err(status)) => {
                Err(WriteError::Containerd(refused(&format!("storing blob {}", blob.digest))(status)))
            }
        };
        if result.is_err() {
            // Should this fail too, the end of the lease does it.
            let _abandoned = self.content().abort(AbortRequest { r#ref: name }).await;
        }
        result
    }

    async fn send(
        &self,
        messages: impl Stream<Item = WriteContentRequest> + Send + 'static,
    ) -> std::result::Result<(), Status> {
        let mut answers = self.content().write(messages).await?.into_inner();
        let mut is_committed = false;
        while let Some(answer) = answers.message().await? {
            is_committed |= answer.action() == WriteAction::Commit;
        }
        if is_committed { Ok(()) } else { Err(Status::aborted("it ended before the blob was stored")) }
    }

    /// Unpacks a stored layer onto `mounts` and returns the digest of the unpacked stream.
    pub(super) async fn apply(&self, layer: ContainerdDescriptor, mounts: Vec<Mount>) -> Result<String> {
        let what = format!("unpacking layer {}", layer.digest);
        let request = ApplyRequest { diff: Some(layer), mounts, ..ApplyRequest::default() };
        let mut differ = DiffClient::with_interceptor(self.channel.clone(), self.headers.clone());
        let applied = differ.apply(request).await.map_err(refused(&what))?.into_inner().applied;
        applied.map(|applied| applied.digest).ok_or_else(|| refuse(&what, "answered without a digest"))
    }

    /// Makes `name` an image, or lets it point to another target.
    pub(super) async fn put_image(&self, name: &str, target: ContainerdDescriptor) -> Result<()> {
        let mut images = ImagesClient::with_interceptor(self.channel.clone(), self.headers.clone());
        let image = Image { name: name.to_owned(), target: Some(target), ..Image::default() };
        let request = CreateImageRequest { image: Some(image.clone()), ..CreateImageRequest::default() };
        let created = images.create(request).await;
        let status = match created {
            Ok(_) => return Ok(()),
            Err(status) => status,
        };
        if status.code() != Code::AlreadyExists {
            return Err(refused(&format!("image {name}"))(status));
        }
        let mask = FieldMask { paths: vec!["target".to_owned()] };
        let request =
            UpdateImageRequest { image: Some(image), update_mask: Some(mask), ..UpdateImageRequest::default() };
        images.update(request).await.map_err(refused(&format!("image {name}"))).map(|_| ())
    }

    /// The snapshots of one snapshotter.
    pub(super) fn snapshots<'a>(&'a self, snapshotter: &'a str) -> Snapshots<'a> {
        Snapshots { containerd: self, snapshotter }
    }

    /// Adds something to the lease that it does not hold by itself; it need not exist.
    async fn hold(&self, kind: &str, id: &str) -> Result<()> {
        let resource = Resource { r#type: kind.to_owned(), id: id.to_owned() };
        let request = AddResourceRequest { id: self.lease_id.clone(), resource: Some(resource) };
        self.leases().add_resource(request).await.map_err(refused(&format!("lease of {id}"))).map(|_| ())
    }

    fn leases(&self) -> LeasesClient<Intercepted> {
        LeasesClient::with_interceptor(self.channel.clone(), self.headers.clone())
    }

    fn content(&self) -> ContentClient<Intercepted> {
        ContentClient::with_interceptor(self.channel.clone(), self.headers.clone())
    }
}

/// The labels that a blob with the labels `known` gets: a list of repositories gains one and loses none.
fn beside_known(labels: &HashMap<String, String>, known: &HashMap<String, String>) -> HashMap<String, String> {
    let beside = |(name, value): (&String, &String)| {
        let listed = known.get(name).filter(|listed| name.starts_with(REPOSITORIES) && !listed.is_empty());
        let Some(listed) = listed else { return (name.clone(), value.clone()) };
        let mut all: Vec<&str> = listed.split(',').chain([value.as_str()]).collect();
        all.sort_unstable();
        all.dedup();
        let all = all.join(",");
        (name.clone(), if name.len() + all.len() > LABEL_LEN_MAX { listed.clone() } else { all })
    };
    labels.iter().map(beside).collect()
}

/// The snapshots of one snapshotter.
pub(super) struct Snapshots<'a> {
    containerd: &'a Containerd,
    snapshotter: &'a str,
}

impl Snapshots<'_> {
    /// Whether a committed snapshot is there; then it is held by the lease.
    pub(super) async fn has(&self, name: &Digest) -> Result<bool> {
        // Held first: it could be collected right after the look.
        self.containerd.hold(&format!("snapshots/{}", self.snapshotter), &name.to_string()).await?;
        let request = StatSnapshotRequest { snapshotter: self.snapshotter.to_owned(), key: name.to_string() };
        match self.client().stat(request).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(refused(&format!("snapshot {name} of {}", self.snapshotter))(status)),
        }
    }

    /// Prepares the snapshot from which `name` is to be committed.
    pub(super) async fn prepare(
        &self,
        key: &str,
        parent: Option<Digest>,
        name: &Digest,
        labels: HashMap<String, String>,
    ) -> Result<Prepared> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            key: key.to_owned(),
            parent: parent.map(|parent| parent.to_string()).unwrap_or_default(),
            labels,
        };
        let what = format!("preparing snapshot {name} of {}", self.snapshotter);
        match self.client().prepare(request).await {
            Ok(prepared) => Ok(Prepared::Mounts(prepared.into_inner().mounts)),
            Err(status) if status.code() == Code::AlreadyExists && self.has(name).await? => Ok(Prepared::Exists),
            Err(status) if status.code() == Code::Unavailable => {
                Err(ContainerdError::NotYet { what, reason: on_one_line(status.message()) })
            }
            Err(status) => Err(refused(&what)(status)),
        }
    }

    /// Commits what was prepared.
    pub(super) async fn commit(&self, key: &str, name: &Digest) -> Result<()> {
        let request = CommitSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            name: name.to_string(),
            key: key.to_owned(),
            ..CommitSnapshotRequest::default()
        };
        match self.client().commit(request).await {
            Ok(_) => Ok(()),
            // Somebody else was faster; both have unpacked the same.
            Err(status) if status.code() == Code::AlreadyExists && self.has(name).await? => {
                self.abandon(key).await;
                Ok(())
            }
            Err(status) => Err(refused(&format!("committing snapshot {name} of {}", self.snapshotter))(status)),
        }
    }

    /// Removes what was prepared and is of no use.
    pub(super) async fn abandon(&self, key: &str) {
        let request = RemoveSnapshotRequest { snapshotter: self.snapshotter.to_owned(), key: key.to_owned() };
        // Should it fail, the end of the lease does it.
        let _removed = self.client().remove(request).await;
    }

    fn client(&self) -> SnapshotsClient<Intercepted> {
        SnapshotsClient::with_interceptor(self.containerd.channel.clone(), self.containerd.headers.clone())
    }
}

/// A blob as messages of a write.
struct Outgoing {
    pieces: Pin<Box<dyn Stream<Item = std::result::Result<Bytes, SourceError>> + Send>>,
    rest: Bytes,
    offset: u64,
    is_committed: bool,
    ends_with: HashMap<String, String>,
    /// The name of the write, digest and length of the blob.
    blob: (String, Digest, u64),
    failure: Arc<Mutex<Option<SourceError>>>,
}

impl Outgoing {
    /// The next message; none after the commit, or when the source fails.
    async fn next(mut self) -> Option<(WriteContentRequest, Self)> {
        while self.rest.is_empty() && !self.is_committed {
            match self.pieces.next().await {
                Some(Ok(piece)) => self.rest = piece,
                Some(Err(error)) => return self.fail(error),
                None => {
                    self.is_committed = true;
                    let labels = std::mem::take(&mut self.ends_with);
                    return Some((WriteContentRequest { labels, ..self.message(WriteAction::Commit) }, self));
                }
            }
        }
        if self.is_committed {
            return None;
        }
        let piece = self.rest.split_to(self.rest.len().min(WRITE_PIECE_LEN));
        let message = WriteContentRequest { data: piece.to_vec(), ..self.message(WriteAction::Write) };
        self.offset += piece.len() as u64;
        if self.offset > self.blob.2 {
            let len = self.blob.2;
            return self
                .fail(SourceError::unusable(format!("it is longer than the {len} bytes that the manifest says")));
        }
        Some((message, self))
    }

    fn message(&self, action: WriteAction) -> WriteContentRequest {
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let (name, digest, len) = &self.blob;
        WriteContentRequest {
            action: action.into(),
            r#ref: name.clone(),
            total: signed(*len),
            expected: digest.to_string(),
            offset: signed(self.offset),
            ..WriteContentRequest::default()
        }
    }

    fn fail(self, error: SourceError) -> Option<(WriteContentRequest, Self)> {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        None
    }
}

/// Unique among the processes of a host, now and later.
fn new_lease_id() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("lazuli-pull-{}-{}", std::process::id(), since.as_nanos())
}

pub(crate) fn refused(what: &str) -> impl FnOnce(Status) -> ContainerdError {
    let what = what.to_owned();
    move |status| {
        let reason = if status.message().is_empty() { status.code().description() } else { status.message() };
        refuse(&what, reason)
    }
}

fn refuse(what: &str, reason: impl fmt::Display) -> ContainerdError {
    ContainerdError::Refused { what: what.to_owned(), reason: on_one_line(&reason.to_string()) }
}

fn on_one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_pull_of_a_blob_forgot_the_repositories_of_the_first() {
        let (list, other) = (format!("{REPOSITORIES}registry.example"), "label".to_owned());
        let labels = HashMap::from([(list.clone(), "a/b".to_owned()), (other.clone(), "new".to_owned())]);
        let beside = |known: &str| {
            let known = HashMap::from([(list.clone(), known.to_owned()), (other.clone(), "old".to_owned())]);
            let beside = beside_known(&labels, &known);
            assert_eq!(beside[&other], "new");
            beside[&list].clone()
        };
        assert_eq!(beside("other/repo"), "a/b,other/repo");
        assert_eq!(beside("a/b,other/repo"), "a/b,other/repo");
        assert_eq!(beside(""), "a/b");
        let long = format!("c/{}", "d".repeat(4050));
        assert_eq!(beside(&long), long);
        assert_eq!(beside_known(&labels, &HashMap::new()), labels);
    }

    async fn messages(pieces: &[&[u8]], len: u64) -> (Vec<WriteContentRequest>, Option<String>) {
        let failure = Arc::new(Mutex::new(None));
        let pieces: Vec<_> = pieces.iter().map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let outgoing = Outgoing {
            pieces: Box::pin(stream::iter(pieces)),
            rest: Bytes::new(),
            offset: 0,
            is_committed: false,
            ends_with: [("label".to_owned(), "value".to_owned())].into(),
            blob: ("name".to_owned(), Digest::of(b""), len),
            failure: Arc::clone(&failure),
        };
        let messages = stream::unfold(outgoing, Outgoing::next).collect().await;
        let failure = failure.lock().unwrap().take();
        (messages, failure.map(|error| error.message))
    }

    #[tokio::test]
    async fn a_blob_is_sent_in_bounded_messages_and_committed() {
        let long = vec![7; WRITE_PIECE_LEN + 3];
        let len = long.len() as u64 + 2;
        let (messages, failure) = messages(&[b"ab", b"", &long], len).await;
        assert_eq!(failure, None);
        let found: Vec<_> = messages.iter().map(|sent| (sent.action(), sent.offset, sent.data.len())).collect();
        let piece = WRITE_PIECE_LEN;
        let after = i64::try_from(piece).unwrap() + 2;
        let expected = [
            (WriteAction::Write, 0, 2),
            (WriteAction::Write, 2, piece),
            (WriteAction::Write, after, 3),
            (WriteAction::Commit, after + 3, 0),
        ];
        assert_eq!(found, expected);
        assert!(messages.iter().all(|sent| sent.total == after + 3 && sent.r#ref == "name"));
        assert_eq!(messages[3].labels["label"], "value");
    }

    #[tokio::test]
    async fn a_blob_longer_than_announced_is_not_committed() {
        let (messages, failure) = messages(&[b"abc", b"de"], 4).await;
        assert_eq!(messages.len(), 1);
        assert_eq!(failure.unwrap(), "it is longer than the 4 bytes that the manifest says");
    }
}
