//! The database over a disk that loses power, refuses writes, or is slow: what is reported survives.

use std::{
    io,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use redb::StorageBackend;

use super::*;
use crate::remote::TARGET;

const NOW: Time = Time { seconds: 1, nanos: 0 };

/// A write or sync that reached the disk.
#[derive(Debug, Clone)]
enum Event {
    Write(u64, Vec<u8>),
    Length(u64),
    Sync,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    events: Vec<Event>,
    /// Writes and syncs fail.
    refuses: Option<io::ErrorKind>,
    sync_takes: Duration,
    /// Syncs that have begun.
    syncs_begun: usize,
    /// Whoever has this lets no sync end.
    gate: Arc<Mutex<()>>,
}

/// A disk in memory that remembers what was done to it.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<State>>);

/// How long something may take that waits for nothing, on a busy machine.
const SOON: Duration = Duration::from_secs(20);

impl Disk {
    fn of(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(State { bytes, ..State::default() })))
    }

    fn open(&self) -> Result<Metadata> {
        let disk = self.clone();
        Metadata::open_in(Database::open_on(Box::new(move || Ok(Box::new(disk.clone()))))?)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn refuse(&self, kind: Option<io::ErrorKind>) {
        self.state().refuses = kind;
    }

    fn syncs(&self) -> usize {
        self.state().events.iter().filter(|event| matches!(event, Event::Sync)).count()
    }

    fn event(&self, event: Event) -> io::Result<()> {
        let mut state = self.state();
        if let Some(kind) = state.refuses {
            return Err(kind.into());
        }
        apply(&mut state.bytes, &event);
        state.events.push(event);
        Ok(())
    }
}

fn apply(bytes: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Write(offset, data) => {
            let start = usize::try_from(*offset).unwrap();
            let end = start + data.len();
            bytes.resize(bytes.len().max(end), 0);
            bytes[start..end].copy_from_slice(data);
        }
        Event::Length(len) => bytes.resize(usize::try_from(*len).unwrap(), 0),
        Event::Sync => {}
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state().bytes.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        let state = self.state();
        let bytes = state.bytes.get(start..start + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.event(Event::Length(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        let (takes, gate) = {
            let mut state = self.state();
            state.syncs_begun += 1;
            (state.sync_takes, Arc::clone(&state.gate))
        };
        thread::sleep(takes);
        drop(gate.lock().unwrap());
        self.event(Event::Sync)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.event(Event::Write(offset, data.to_vec()))
    }
}

/// The content that the disk may hold when power fails after the first `count` events: all that was synced, and of the
/// rest what `choice` says, bit by bit.
fn after_power_loss(events: &[Event], count: usize, choice: u64) -> Vec<u8> {
    let synced = events[..count].iter().rposition(|event| matches!(event, Event::Sync)).unwrap_or(0);
    let mut bytes = Vec::new();
    for (number, event) in events[..count].iter().enumerate() {
        // A length is not torn from what is written behind it: the file system orders them.
        let is_kept = number < synced || matches!(event, Event::Length(_)) || choice >> (number % 64) & 1 == 1;
        if is_kept {
            apply(&mut bytes, event);
        }
    }
    bytes
}

fn key(name: &str) -> SnapshotKey {
    SnapshotKey::new(name).unwrap()
}

fn create(metadata: &Metadata, name: &str, parent: &str) -> Result<Chain> {
    create_with(metadata, name, parent, [("label".to_owned(), "x".repeat(500))].into())
}

fn create_with(metadata: &Metadata, name: &str, parent: &str, labels: Labels) -> Result<Chain> {
    let new = NewSnapshot { key: key(name), kind: Kind::Active, parent: SnapshotKey::new(parent), labels };
    metadata.create(&new, metadata.take_id(), NOW)
}

/// For a layer that is unpacked.
fn extract(metadata: &Metadata, name: &str) -> Result<Chain> {
    create_with(metadata, name, "", [(TARGET.to_owned(), "sha256:chain".to_owned())].into())
}

fn relabel(metadata: &Metadata, name: &str, value: usize) -> Result<Snapshot> {
    metadata.update_labels(&key(name), &LabelChange::Some([("y".to_owned(), value.to_string())].into()), NOW)
}

fn commit(metadata: &Metadata, active: &str, name: &str) -> Result<()> {
    let (name, key) = (key(name), key(active));
    metadata.commit(&NewCommit { name, key, parent: None, labels: Labels::new(), usage: Usage::default() }, NOW)
}

fn lazy(metadata: &Metadata, name: &str) -> Result<bool> {
    let digest = format_spec::Digest::of(name.as_bytes());
    let index = format_spec::IndexLocation { offset: 0, compressed_len: 1, plain_len: 1, digest };
    let layer = format_spec::LazyLayer { blob: digest, blob_len: 9, index, hot_len: 0 };
    let layer = RemoteLayer { layer, image: "h/r:t".to_owned() };
    Ok(metadata.insert_lazy(&key(name), None, &Labels::new(), &layer, &Signers::new(), NOW)? == LazyInsert::There)
}

/// All that the store says.
fn contents(metadata: &Metadata) -> (Vec<Snapshot>, Vec<Unused>) {
    let listed = metadata.list().unwrap();
    assert!(listed.damaged.is_empty());
    (listed.snapshots, metadata.unused().unwrap())
}

#[test]
fn what_is_reported_survives_a_power_loss_at_every_moment() {
    let disk = Disk::default();
    let metadata = disk.open().unwrap();
    // (events when it was reported, what the store says then). Changes that are not durable may be lost, in this order.
    let mut reported = vec![(disk.state().events.len(), true, contents(&metadata))];
    let mut step = |is_durable: bool, work: &dyn Fn(&Metadata)| {
        work(&metadata);
        reported.push((disk.state().events.len(), is_durable, contents(&metadata)));
    };
    for number in 0..4 {
        let [active, layer, extraction] = ["active", "layer", "extract"].map(|what| format!("{what}{number}"));
        step(false, &|metadata| _ = extract(metadata, &extraction).unwrap());
        step(true, &|metadata| commit(metadata, &extraction, &format!("of {extraction}")).unwrap());
        step(true, &|metadata| _ = create(metadata, &active, "").unwrap());
        step(true, &|metadata| commit(metadata, &active, &layer).unwrap());
        step(true, &|metadata| _ = create(metadata, &active, &layer).unwrap());
        step(true, &|metadata| assert!(lazy(metadata, &format!("lazy{number}")).unwrap()));
        step(false, &|metadata| metadata.remove(&key(&active)).unwrap());
        step(false, &|metadata| metadata.forget_unused(metadata.unused().unwrap()[0]).unwrap());
        step(false, &|metadata| relabel(metadata, &layer, number).map(drop).unwrap());
        step(false, &|metadata| metadata.remove(&key(&format!("lazy{number}"))).unwrap());
        step(number % 2 == 0, &|metadata| {
            if number % 2 == 0 {
                metadata.make_durable().unwrap()
            }
        });
    }
    let events = disk.state().events.clone();
    let mut choice = 0x9e37_79b9_7f4a_7c15_u64;
    for count in reported[0].0..=events.len() {
        choice = choice.rotate_left(7).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        for choice in [0, u64::MAX, choice] {
            let found = contents(&Disk::of(after_power_loss(&events, count, choice)).open().unwrap());
            let must = reported.iter().rposition(|(at, is_durable, _)| *is_durable && *at <= count).unwrap();
            let is_known = reported[must..].iter().any(|(_, _, state)| *state == found);
            assert!(is_known, "after {count} of {} events, {choice:x}: {found:?}", events.len());
        }
    }
}

#[test]
fn after_a_failed_write_the_store_goes_on_when_there_is_room_again() {
    let disk = Disk::default();
    let metadata = disk.open().unwrap();
    create(&metadata, "before", "").unwrap();
    for round in 0..3 {
        disk.refuse(Some(io::ErrorKind::StorageFull));
        for _ in 0..2 {
            match create(&metadata, "refused", "") {
                Err(MetadataError::Database(error)) => assert!(
                    matches!(&*error, redb::Error::Io(error) if error.kind() == io::ErrorKind::StorageFull)
                        || matches!(*error, redb::Error::PreviousIo),
                    "{error:?}"
                ),
                other => panic!("{other:?}"),
            }
        }
        disk.refuse(None);
        let names = || contents(&metadata).0.iter().map(|snapshot| snapshot.key.to_string()).collect::<Vec<_>>();
        assert_eq!(names(), ["before"], "round {round}");
        create(&metadata, "after", "").unwrap();
        metadata.remove(&key("after")).unwrap();
        metadata.make_durable().unwrap();
    }
    drop(metadata);
    assert_eq!(contents(&disk.open().unwrap()).0.len(), 1);
}

#[test]
fn a_slow_disk_syncs_once_for_many() {
    let disk = Disk::default();
    let metadata = disk.open().unwrap();
    let before = disk.syncs();
    create(&metadata, "alone", "").unwrap();
    let alone = disk.syncs() - before;
    disk.state().sync_takes = Duration::from_millis(20);
    let before = disk.syncs();
    thread::scope(|scope| {
        for number in 0..32 {
            let metadata = &metadata;
            scope.spawn(move || create(metadata, &format!("one of many {number}"), "").unwrap());
        }
    });
    let together = disk.syncs() - before;
    assert!(alone > 0 && together < 16 * alone, "{alone} for one, {together} for 32");
    assert_eq!(contents(&disk.open().unwrap()).0.len(), 33);
}

/// Changes that are answered before they are on the disk wait for no disk.
#[test]
fn removals_labels_and_extractions_wait_for_no_sync() {
    let disk = Disk::default();
    let metadata = Arc::new(disk.open().unwrap());
    create(&metadata, "removed", "").unwrap();
    create(&metadata, "labelled", "").unwrap();
    let gate = Arc::clone(&disk.state().gate);
    let before = disk.state().syncs_begun;
    let closed = gate.lock().unwrap();
    let durable = thread::spawn({
        let metadata = Arc::clone(&metadata);
        move || create(&metadata, "durable", "").map(drop)
    });
    while disk.state().syncs_begun == before {
        thread::sleep(Duration::from_millis(1));
    }
    let (done, is_done) = std::sync::mpsc::channel();
    let others = thread::spawn({
        let metadata = Arc::clone(&metadata);
        move || {
            metadata.remove(&key("removed")).unwrap();
            relabel(&metadata, "labelled", 1).unwrap();
            extract(&metadata, "extract-1").unwrap();
            let names: Vec<_> = contents(&metadata).0.iter().map(|snapshot| snapshot.key.to_string()).collect();
            done.send(names).unwrap();
        }
    });
    let names = is_done.recv_timeout(SOON);
    assert!(!durable.is_finished(), "the sync has not ended yet");
    drop(closed);
    assert_eq!(names.unwrap(), ["durable", "extract-1", "labelled"]);
    others.join().unwrap();
    durable.join().unwrap().unwrap();
}

/// A removal that a crash undoes brings back a snapshot that has all it had; then it is removed once more.
#[test]
fn nothing_is_deleted_of_a_removal_that_a_crash_may_undo() {
    let disk = Disk::default();
    let metadata = disk.open().unwrap();
    create(&metadata, "removed", "").unwrap();
    assert!(lazy(&metadata, "lazy").unwrap());
    let there = contents(&metadata);
    for name in ["removed", "lazy"] {
        metadata.remove(&key(name)).unwrap();
    }
    let after_crash = |choice| {
        let events = disk.state().events.clone();
        Disk::of(after_power_loss(&events, events.len(), choice)).open().unwrap()
    };
    let again = after_crash(u64::MAX);
    assert_eq!(contents(&again), there);
    again.remove(&key("removed")).unwrap();
    let deletable = metadata.deletable().unwrap();
    assert_eq!(deletable.len(), 3, "a directory, a tree and a layer");
    for choice in [0, u64::MAX, 0x9e37_79b9_7f4a_7c15] {
        assert_eq!(contents(&after_crash(choice)), (Vec::new(), deletable.clone()));
    }
}

/// Whatever others change while the disk syncs, in memory and in pages that are free since the last commit.
#[test]
fn what_is_reported_survives_a_power_loss_while_others_change_records() {
    const CREATED: usize = 12;
    let disk = Disk::default();
    let metadata = disk.open().unwrap();
    for number in 0..40 {
        create(&metadata, &format!("label{number}"), "").unwrap();
    }
    disk.state().sync_takes = Duration::from_millis(5);
    let (reported, is_over) = (Mutex::new(vec![disk.state().events.len()]), std::sync::atomic::AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            for value in 0.. {
                relabel(&metadata, &format!("label{}", value % 40), value).unwrap();
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        for number in 0..CREATED {
            create(&metadata, &format!("created{number}"), "").unwrap();
            reported.lock().unwrap().push(disk.state().events.len());
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let (events, reported) = (disk.state().events.clone(), reported.into_inner().unwrap());
    for count in reported[0]..=events.len() {
        let created = reported.iter().rposition(|at| *at <= count).unwrap();
        for choice in [0, u64::MAX, 0x9e37_79b9_7f4a_7c15_u64.rotate_left(u32::try_from(count % 64).unwrap())] {
            let (found, _) = contents(&Disk::of(after_power_loss(&events, count, choice)).open().unwrap());
            assert!(found.len() >= 40 + created, "after {count} of {} events: {}", events.len(), found.len());
        }
    }
}
