//! containerd's snapshots service over [`Snapshotter`]: messages in and out, and the status codes that
//! containerd's clients decide by.
//!
//! Each request runs in a task of its own, which ends when its client goes away: a start that nobody waits for any
//! longer makes no snapshot.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use control::ErrorKind;
use prost_types::Timestamp;
use tokio::sync::RwLock;
use tokio_stream::Iter;
use tonic::{Code, Request, Response, Status};
use tracing::{debug, warn};

use crate::{
    api::{self, snapshots_server::Snapshots},
    filter::{Fields, Filters},
    fused::FusedError,
    id_mapped::IdMappedError,
    names::{Labels, SnapshotKey, Time},
    records::{Kind, LabelChange, MetadataError, NewCommit, NewSnapshot, Snapshot, Usage},
    snapshotter::{Error, Prepared, Snapshotter},
    trees::TreeError,
    user_namespace::NamespaceError,
};

/// Snapshots in one message of a list, as containerd sends them: far below gRPC's limit of 4 MiB.
const LIST_BATCH_LEN: usize = 100;

/// The service. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Service {
    snapshotter: Snapshotter,
    /// Shared by the requests under way.
    under_way: Arc<RwLock<()>>,
}

impl Service {
    /// Serves these snapshots.
    pub fn new(snapshotter: Snapshotter) -> Self {
        Self { snapshotter, under_way: Arc::default() }
    }

    /// Returns when no request is under way.
    pub async fn idle(&self) {
        drop(self.under_way.write().await);
    }

    async fn run<T: Send + 'static, F: Future<Output = Result<T, Error>> + Send + 'static>(
        &self,
        request: &'static str,
        work: impl FnOnce(Snapshotter) -> F,
    ) -> Result<T, Status> {
        let (work, under_way) = (work(self.snapshotter.clone()), Arc::clone(&self.under_way));
        let work = async move {
            let _under_way = under_way.read().await;
            work.await
        };
        // A caller that goes away leaves nothing half done: only waiting ends with the task, what blocks runs to its
        // end.
        let mut running = Running(tokio::spawn(work));
        let done = (&mut running.0).await;
        let done = done.map_err(|error| Status::internal(format!("{request}: {error}")))?;
        done.map_err(|error| {
            let status = status_of(&error);
            // containerd asks for what is not there, is there already or is in use in its normal course.
            match status.code() {
                Code::NotFound | Code::AlreadyExists | Code::FailedPrecondition => debug!(request, %error, "refused"),
                _ => warn!(request, %error, "failed"),
            }
            status
        })
    }
}

/// A request, given up with whoever asked for it.
struct Running<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for Running<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[tonic::async_trait]
impl Snapshots for Service {
    type ListStream = Iter<std::vec::IntoIter<Result<api::ListSnapshotsResponse, Status>>>;

    async fn prepare(
        &self,
        request: Request<api::PrepareSnapshotRequest>,
    ) -> Result<Response<api::PrepareSnapshotResponse>, Status> {
        let api::PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let new = new_snapshot(key, Kind::Active, parent, labels)?;
        match self.run("prepare", |snapshotter| async move { snapshotter.prepare(new, now()).await }).await? {
            Prepared::Active(mount) => Ok(Response::new(api::PrepareSnapshotResponse { mounts: vec![mount] })),
            Prepared::Remote { target } => {
                Err(Status::already_exists(format!("snapshot {target} is there: it is lazy")))
            }
        }
    }

    async fn view(
        &self,
        request: Request<api::ViewSnapshotRequest>,
    ) -> Result<Response<api::ViewSnapshotResponse>, Status> {
        let api::ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let new = new_snapshot(key, Kind::View, parent, labels)?;
        let mount = self.run("view", |snapshotter| async move { snapshotter.view(new, now()).await }).await?;
        Ok(Response::new(api::ViewSnapshotResponse { mounts: vec![mount] }))
    }

    async fn mounts(&self, request: Request<api::MountsRequest>) -> Result<Response<api::MountsResponse>, Status> {
        let key = checked("key", request.into_inner().key)?;
        let mounts = |snapshotter: Snapshotter| async move { snapshotter.mounts(key).await };
        Ok(Response::new(api::MountsResponse { mounts: vec![self.run("mounts", mounts).await?] }))
    }

    async fn commit(&self, request: Request<api::CommitSnapshotRequest>) -> Result<Response<api::Empty>, Status> {
        let request = request.into_inner();
        let new = NewCommit {
            name: checked("name", request.name)?,
            key: checked("key", request.key)?,
            parent: SnapshotKey::new(request.parent),
            labels: request.labels.into_iter().collect(),
            usage: Usage::default(),
        };
        self.run("commit", |snapshotter| async move { snapshotter.commit(new, now()).await }).await?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<api::RemoveSnapshotRequest>) -> Result<Response<api::Empty>, Status> {
        let key = checked("key", request.into_inner().key)?;
        self.run("remove", |snapshotter| async move { snapshotter.remove(key).await }).await?;
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<api::StatSnapshotRequest>,
    ) -> Result<Response<api::StatSnapshotResponse>, Status> {
        let key = checked("key", request.into_inner().key)?;
        let found = self.run("stat", |snapshotter| async move { snapshotter.stat(key).await }).await?;
        Ok(Response::new(api::StatSnapshotResponse { info: Some(to_info(found)) }))
    }

    async fn update(
        &self,
        request: Request<api::UpdateSnapshotRequest>,
    ) -> Result<Response<api::UpdateSnapshotResponse>, Status> {
        let request = request.into_inner();
        let info = request.info.ok_or_else(|| Status::invalid_argument("info is missing"))?;
        let key = checked("name", info.name)?;
        let change = label_change(info.labels, &request.update_mask.unwrap_or_default().paths)?;
        let update = |snapshotter: Snapshotter| async move { snapshotter.update(key, change, now()).await };
        let updated = self.run("update", update).await?;
        Ok(Response::new(api::UpdateSnapshotResponse { info: Some(to_info(updated)) }))
    }

    async fn list(&self, request: Request<api::ListSnapshotsRequest>) -> Result<Response<Self::ListStream>, Status> {
        let filters = Filters::parse(&request.into_inner().filters);
        let filters = filters.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let mut all = self.run("list", |snapshotter| async move { snapshotter.list().await }).await?;
        all.retain(|snapshot| filters.matches(snapshot));
        let infos: Vec<_> = all.into_iter().map(to_info).collect();
        let batches = infos.chunks(LIST_BATCH_LEN).map(|batch| Ok(api::ListSnapshotsResponse { info: batch.to_vec() }));
        Ok(Response::new(tokio_stream::iter(batches.collect::<Vec<_>>())))
    }

    async fn usage(&self, request: Request<api::UsageRequest>) -> Result<Response<api::UsageResponse>, Status> {
        let key = checked("key", request.into_inner().key)?;
        let usage = self.run("usage", |snapshotter| async move { snapshotter.usage(key).await }).await?;
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        Ok(Response::new(api::UsageResponse { size: signed(usage.bytes), inodes: signed(usage.inodes) }))
    }

    async fn cleanup(&self, _request: Request<api::CleanupRequest>) -> Result<Response<api::Empty>, Status> {
        self.snapshotter.cleanup();
        Ok(Response::new(()))
    }
}

impl Fields for Snapshot {
    fn field(&self, path: &[String]) -> Option<&str> {
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "name" => Some(self.key.as_str()),
            "parent" => Some(self.parent.as_ref().map_or("", SnapshotKey::as_str)),
            "kind" => Some(self.kind.as_str()),
            "labels" => self.labels.get(&rest.join(".")).map(String::as_str),
            _ => None,
        }
    }
}

/// The codes that containerd's overlayfs snapshotter answers with in the same case.
fn status_of(error: &Error) -> Status {
    let message = error.to_string();
    match error {
        Error::Metadata(error) => match error {
            MetadataError::NotFound(_) => Status::not_found(message),
            MetadataError::AlreadyExists(_) => Status::already_exists(message),
            MetadataError::ParentNotCommitted(_) | MetadataError::ParentChanged(..) => {
                Status::invalid_argument(message)
            }
            MetadataError::NotActive(_) | MetadataError::HasChildren(_) | MetadataError::CommitOntoUncommitted(..) => {
                Status::failed_precondition(message)
            }
            MetadataError::Damaged(..) => Status::data_loss(message),
            MetadataError::Database(error) => match &**error {
                redb::Error::Io(error) => io_status(error, message),
                // It is opened again by then.
                redb::Error::PreviousIo => Status::unavailable(message),
                _ => Status::internal(message),
            },
            MetadataError::Version(_) => Status::internal(message),
        },
        Error::Labels(_)
        | Error::IdMap(..)
        | Error::IdMapped(_, IdMappedError::Namespace(NamespaceError::Mapping(..))) => {
            Status::invalid_argument(message)
        }
        Error::IdMapped(
            _,
            IdMappedError::Unsupported { .. } | IdMappedError::Namespace(NamespaceError::Refused(_)),
        ) => Status::failed_precondition(message),
        Error::IdMapped(
            _,
            IdMappedError::Namespace(NamespaceError::Process(error)) | IdMappedError::Mount(_, error),
        ) => io_status(error, message),
        Error::Committed(_) | Error::Untrue { .. } => Status::failed_precondition(message),
        Error::Unverified { .. } => Status::unavailable(message),
        Error::Fused(_, error) | Error::Tree(_, TreeError::Fused(error)) => fused_status(error, message),
        Error::Tree(_, TreeError::Io(_, error)) => io_status(error, message),
        Error::Tree(_, TreeError::Pending(_) | TreeError::Ended) => Status::unavailable(message),
        Error::Directory(_, error) => io_status(error, message),
        Error::Io(_, error) => io_status(error, message),
        Error::Root(_) => Status::internal(message),
    }
}

fn fused_status(error: &FusedError, message: String) -> Status {
    let FusedError::Refused { kind, .. } = error else { return Status::unavailable(message) };
    match kind {
        ErrorKind::Passing => Status::unavailable(message),
        ErrorKind::Damaged => Status::data_loss(message),
        ErrorKind::Newer | ErrorKind::Refused | ErrorKind::Untrue => Status::failed_precondition(message),
        ErrorKind::Invalid => Status::invalid_argument(message),
        ErrorKind::DiskFull => Status::resource_exhausted(message),
    }
}

fn io_status(error: &std::io::Error, message: String) -> Status {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Status::resource_exhausted(message),
        _ => Status::internal(message),
    }
}

fn checked(field: &str, key: String) -> Result<SnapshotKey, Status> {
    SnapshotKey::new(key).ok_or_else(|| Status::invalid_argument(format!("{field} is empty")))
}

fn new_snapshot(
    key: String,
    kind: Kind,
    parent: String,
    labels: HashMap<String, String>,
) -> Result<NewSnapshot, Status> {
    let key = checked("key", key)?;
    Ok(NewSnapshot { key, kind, parent: SnapshotKey::new(parent), labels: labels.into_iter().collect() })
}

/// Only labels can change: all of them, or those that the field paths name.
fn label_change(labels: HashMap<String, String>, paths: &[String]) -> Result<LabelChange, Status> {
    if paths.is_empty() {
        return Ok(LabelChange::All(labels.into_iter().collect()));
    }
    let mut named = Labels::new();
    for path in paths {
        match path.strip_prefix("labels.") {
            // A path to a label that the message does not have removes it.
            Some(key) => _ = named.insert(key.to_owned(), labels.get(key).cloned().unwrap_or_default()),
            None if path == "labels" => return Ok(LabelChange::All(labels.into_iter().collect())),
            None => return Err(Status::invalid_argument(format!("field {path:?} cannot be changed, only labels can"))),
        }
    }
    Ok(LabelChange::Some(named))
}

fn to_info(snapshot: Snapshot) -> api::Info {
    let kind = match snapshot.kind {
        Kind::View => api::Kind::View,
        Kind::Active => api::Kind::Active,
        Kind::Committed => api::Kind::Committed,
    };
    api::Info {
        name: snapshot.key.to_string(),
        parent: snapshot.parent.map(|parent| parent.to_string()).unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(to_timestamp(snapshot.created)),
        updated_at: Some(to_timestamp(snapshot.updated)),
        labels: snapshot.labels.into_iter().collect(),
    }
}

fn to_timestamp(time: Time) -> Timestamp {
    Timestamp { seconds: time.seconds, nanos: time.nanos }
}

/// The time, which nothing below asks for itself.
pub(crate) fn now() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Time {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).expect("below a thousand million"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(paths: &[&str], expected: Option<LabelChange>) {
        let labels = HashMap::from([("a".to_owned(), "1".to_owned()), ("b".to_owned(), "2".to_owned())]);
        let paths: Vec<_> = paths.iter().map(|path| (*path).to_owned()).collect();
        let found = label_change(labels, &paths);
        assert_eq!(format!("{:?}", found.ok()), format!("{expected:?}"), "{paths:?}");
    }

    #[test]
    fn field_paths_choose_labels_and_nothing_else() {
        let labels = |pairs: &[(&str, &str)]| -> Labels {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        check(&[], Some(LabelChange::All(labels(&[("a", "1"), ("b", "2")]))));
        check(&["labels"], Some(LabelChange::All(labels(&[("a", "1"), ("b", "2")]))));
        check(&["labels.a"], Some(LabelChange::Some(labels(&[("a", "1")]))));
        check(&["labels.gone", "labels.b"], Some(LabelChange::Some(labels(&[("gone", ""), ("b", "2")]))));
        check(&["kind"], None);
        check(&["labels.a", "parent"], None);
    }
}
