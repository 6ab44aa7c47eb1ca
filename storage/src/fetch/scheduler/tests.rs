//! The state machine by itself: what it asks for, step by step, and what always holds whatever happens.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    ops::Range,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use format_spec::Digest;
use proptest::prelude::*;

use super::{
    machine::{Class, Effect, FrameState, Machine, Outcome, StreamKind, Waiter},
    options::{Priority, RequestLimits, RequestOptions},
};
use crate::{
    error::ReadError,
    fetch::{
        link::Link,
        places::PlaceRef,
        source::{SourceError, SourceErrorKind},
        wait::WaitingRead,
    },
};

const FRAME_LEN: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_millis(100);

/// A reader who notes how it ended.
#[derive(Debug, Clone)]
struct TestWait(Rc<RefCell<WaitState>>);

#[derive(Debug, Default)]
struct WaitState {
    parts_left: usize,
    error: Option<ReadError>,
    deadline: Option<Instant>,
    read: Option<WaitingRead>,
}

impl Waiter for TestWait {
    fn is_same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    fn is_over(&self) -> bool {
        let state = self.0.borrow();
        state.parts_left == 0 || state.error.is_some()
    }

    fn read(&self) -> Option<WaitingRead> {
        self.0.borrow().read
    }
}

/// A request that the machine has asked for, in the hands of the test.
#[derive(Debug, Clone)]
struct Live {
    class: Class,
    layer: u64,
    place: u64,
    frames: Range<u32>,
    link: Arc<Link>,
}

/// The machine with what surrounds it.
struct World {
    machine: Machine<TestWait>,
    now: Instant,
    live: BTreeMap<u64, Live>,
    /// Requests so far: layer, place, frames.
    asked: Vec<(u64, u64, Range<u32>)>,
    granted: Vec<u64>,
    cancelled: usize,
    /// Received and not decoded: request, layer, frame.
    received: Vec<(u64, u64, u32)>,
    present: std::collections::HashSet<(u64, u32)>,
    waits: Vec<TestWait>,
    failures: usize,
    /// Layers of which a failure was told that readers wait for.
    told: Vec<u64>,
    /// Places that failures of reads were told with.
    told_places: Vec<Option<u64>>,
}

impl World {
    fn new(options: RequestOptions, patience: Option<Duration>) -> Self {
        Self {
            machine: Machine::new(options, patience),
            now: Instant::now(),
            live: BTreeMap::new(),
            asked: Vec::new(),
            granted: Vec::new(),
            cancelled: 0,
            received: Vec::new(),
            present: std::collections::HashSet::new(),
            waits: Vec::new(),
            failures: 0,
            told: Vec::new(),
            told_places: Vec::new(),
        }
    }

    /// The usual options, and one place for each layer: the place and the layer have the same number.
    fn with_layers(sources: &[&str]) -> Self {
        let mut world = Self::new(RequestOptions::default(), Some(PATIENCE));
        for (number, source) in (0..).zip(sources) {
            world.set_places(number, &[(number, source)]);
        }
        world
    }

    fn set_places(&mut self, layer: u64, places: &[(u64, &str)]) {
        let places = places.iter().map(|(number, source)| PlaceRef { number: *number, source: (*source).into() });
        self.machine.set_places(layer, Digest::of(&layer.to_le_bytes()), places.collect(), self.now);
        self.drain();
    }

    fn want(&mut self, layer: u64, frames: Range<u32>, priority: Priority) -> TestWait {
        let wait = TestWait(Rc::default());
        let deadline = self.machine.patience.filter(|_| priority == Priority::Read).map(|patience| self.now + patience);
        // As a wait that its maker has not completed yet.
        wait.0.borrow_mut().parts_left = 1;
        let read = WaitingRead { since: self.now, offset: u64::from(frames.start) * FRAME_LEN };
        wait.0.borrow_mut().read = (priority == Priority::Read).then_some(read);
        if let Some(deadline) = deadline {
            wait.0.borrow_mut().deadline = Some(deadline);
            self.machine.wait_until(deadline, layer, wait.clone());
        }
        let ranges = frames.map(|frame| (frame, u64::from(frame) * FRAME_LEN..u64::from(frame + 1) * FRAME_LEN));
        let present = &self.present;
        let is_present = |frame| present.contains(&(layer, frame));
        let parts = self.machine.want(layer, ranges, priority, Some(&wait), is_present, self.now);
        wait.0.borrow_mut().parts_left = parts;
        let is_going_to_fail = |effect: &Effect<TestWait>| matches!(effect, Effect::Fail { waits, .. } if waits.iter().any(|failing| failing.is_same(&wait)));
        // Found by `a_reader_waits_for_patience_once_whatever_happens`: a wait that was to fail was complete before it did.
        assert!(parts > 0 || !self.machine.effects.iter().any(is_going_to_fail));
        self.waits.push(wait.clone());
        self.drain();
        wait
    }

    fn want_stream(&mut self, layer: u64) {
        self.want_stream_for(layer, StreamKind::Opening);
    }

    fn want_stream_for(&mut self, layer: u64, kind: StreamKind) {
        self.machine.want_stream(layer, kind, self.now);
        self.drain();
    }

    fn drain(&mut self) {
        while let Some(effect) = self.machine.next_effect() {
            match effect {
                Effect::Fetch(fetch) => {
                    fetch.link.set_waiting(true);
                    self.asked.push((fetch.layer, fetch.place, fetch.frames.clone()));
                    let class = Class::Frames(fetch.priority);
                    let (layer, place, frames, link) = (fetch.layer, fetch.place, fetch.frames, fetch.link);
                    self.live.insert(fetch.request, Live { class, layer, place, frames, link });
                }
                Effect::Grant { grant, .. } => {
                    let layer = self.machine.running[&grant.request].layer;
                    grant.link.set_waiting(true);
                    self.granted.push(layer);
                    let (place, link) = (grant.place, grant.link);
                    let class = self.machine.running[&grant.request].class;
                    let live = Live { class, layer, place, frames: 0..0, link };
                    self.live.insert(grant.request, live);
                }
                Effect::Cancel(link) => {
                    self.cancelled += 1;
                    self.live.retain(|_, live| !Arc::ptr_eq(&live.link, &link));
                }
                Effect::Fail { waits, error, place, .. } => {
                    self.failures += usize::from(!waits.is_empty());
                    self.told_places.extend((!waits.is_empty()).then_some(place));
                    waits.iter().for_each(|wait| {
                        wait.0.borrow_mut().error.get_or_insert(error.clone());
                    });
                }
                Effect::Tell { layer, .. } => self.told.push(layer),
            }
        }
    }

    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.now += TICK;
            self.machine.tick(self.now);
            self.drain();
        }
    }

    /// The request that was made last and still runs, for a layer.
    fn last_of(&self, layer: u64) -> u64 {
        *self.live.iter().rfind(|(_, live)| live.layer == layer).expect("one runs").0
    }

    fn end(&mut self, request: u64, outcome: Outcome) {
        self.live.remove(&request);
        self.machine.end(request, outcome, self.now);
        self.drain();
    }

    fn fail(&mut self, request: u64, error: SourceError) {
        self.end(request, Outcome::Failed(error));
    }

    /// The next frame of a request comes; false when the request has nothing left to bring, and ends.
    fn receive(&mut self, request: u64) -> bool {
        let Some(live) = self.live.get_mut(&request) else { return false };
        let layer = live.layer;
        let Some(frame) = live.frames.next().filter(|frame| self.machine.is_wanted(request, layer, *frame)) else {
            self.end(request, Outcome::Done);
            return false;
        };
        live.link.count(usize::try_from(FRAME_LEN).unwrap());
        if self.machine.receive(request, layer, frame, self.now) {
            self.received.push((request, layer, frame));
        }
        self.drain();
        true
    }

    fn decode(&mut self, number: usize, is_right: bool) {
        let (request, layer, frame) = self.received.swap_remove(number);
        if is_right {
            self.present.insert((layer, frame));
            for wait in self.machine.arrive(request, layer, frame, self.now) {
                wait.0.borrow_mut().parts_left -= 1;
            }
        } else {
            self.machine.refuse(request, layer, frame, corrupt(frame), self.now);
        }
        self.drain();
    }

    /// Brings all of a request.
    fn complete(&mut self, request: u64) {
        while self.receive(request) {
            while !self.received.is_empty() {
                self.decode(0, true);
            }
        }
    }

    fn running(&self, class: Class) -> usize {
        self.live.values().filter(|live| live.class == class).count()
    }
}

fn corrupt(frame: u32) -> ReadError {
    let digest = Digest::of(b"");
    ReadError::Corrupt { blob: digest, frame, expected: digest, found: digest }
}

fn refused() -> SourceError {
    SourceError::refused("answered 404")
}

const READ: Class = Class::Frames(Priority::Read);

/// Twenty readers of a source that does not answer took all requests of the node: a read of an image from a healthy
/// registry got nothing for minutes.
#[test]
fn the_rest_goes_on_beside_readers_of_other_sources_only() {
    let mut world = World::with_layers(&["a", "a", "b"]);
    world.want(0, 0..1, Priority::Background);
    let rest = world.last_of(0);
    assert!(!world.machine.is_beside_reads(rest, world.now));
    world.want(2, 0..1, Priority::Read);
    assert!(!world.machine.is_beside_reads(rest, world.now));
    world.want(1, 0..1, Priority::Read);
    assert!(world.machine.is_beside_reads(rest, world.now));
    // Not for somebody who waits for ever.
    let asked = world.now;
    world.now += Duration::from_secs(3);
    assert!(!world.machine.is_beside_reads(rest, world.now));
    world.now = asked;
    // A reader who waits for what the rest brings would wait for itself.
    let reader = world.want(0, 0..1, Priority::Read);
    assert!(!world.machine.is_beside_reads(rest, world.now));
    assert!(!reader.is_over());
    world.complete(world.last_of(1));
    assert!(!world.machine.is_beside_reads(rest, world.now));
    world.complete(rest);
    assert!(!world.machine.is_beside_reads(rest, world.now));
}

#[test]
fn a_source_that_does_not_answer_keeps_no_other_waiting_in_any_class() {
    for priority in [Priority::Read, Priority::HotPack, Priority::Background] {
        let mut world = World::with_layers(&["dead", "dead", "dead", "healthy"]);
        for reader in 0..40 {
            world.want(u64::from(reader % 3), reader * 10..reader * 10 + 1, priority);
        }
        world.pass(Duration::from_secs(5));
        let wait = world.want(3, 0..1, priority);
        assert_eq!(world.asked.last(), Some(&(3, 3, 0..1)), "{priority:?}");
        let request = world.last_of(3);
        world.complete(request);
        assert!(wait.is_over() && wait.0.borrow().error.is_none());
    }
    let mut world = World::with_layers(&["dead", "healthy"]);
    (0..100).for_each(|_| world.want_stream(0));
    world.want_stream(1);
    assert_eq!(world.granted.last(), Some(&1));
}

#[test]
fn many_sources_that_do_not_answer_take_no_slot_from_one_that_does() {
    let names: Vec<String> = (0..60).map(|number| format!("dead {number}")).collect();
    let mut sources: Vec<&str> = names.iter().map(String::as_str).collect();
    sources.push("healthy");
    let mut world = World::with_layers(&sources);
    for frame in 0..20 {
        (0..60).for_each(|layer| drop(world.want(layer, frame * 10..frame * 10 + 1, Priority::Read)));
    }
    // As many as one source alone could have beside others; the second half is for those that bring something.
    assert_eq!(world.running(READ), 24);
    world.want(60, 0..1, Priority::Read);
    assert_eq!(world.running(READ), 24);
    // Nobody has been heard of: the slot of who has had his turn changes hands.
    world.pass(TICK * 40);
    assert_eq!(world.asked[24..].iter().filter(|(layer, ..)| *layer == 60).count(), 1);
    assert_eq!(world.running(READ), 24);
    world.complete(world.last_of(60));
    // From now on its reads wait for nobody.
    for frame in 1..5 {
        let wait = world.want(60, frame..frame + 1, Priority::Read);
        assert_eq!(world.asked.last(), Some(&(60, 60, frame..frame + 1)));
        world.complete(world.last_of(60));
        assert!(wait.is_over() && wait.0.borrow().error.is_none());
    }
}

/// A registry under hundreds of names and ports had a request for each at a time.
#[test]
fn names_of_one_registry_had_a_slot_each_without_limit() {
    // More than twice the slots of any class.
    const NAMES: u64 = 600;
    let names: Vec<String> = (0..NAMES).map(|number| format!("port {number}")).collect();
    let mut world = World::with_layers(&names.iter().map(String::as_str).collect::<Vec<_>>());
    for class in Class::ALL {
        let want = |world: &mut World, layer, frame| match class {
            Class::Stream(kind) => world.want_stream_for(layer, kind),
            Class::Frames(priority) => drop(world.want(layer, frame..frame + 1, priority)),
        };
        // All of them have brought something before.
        (0..NAMES).for_each(|layer| want(&mut world, layer, 0));
        while let Some(request) = world.live.keys().next().copied() {
            if matches!(class, Class::Stream(_)) {
                world.machine.stream_works(request);
                world.end(request, Outcome::Done);
            } else {
                world.complete(request);
            }
        }
        (0..NAMES).for_each(|layer| want(&mut world, layer, 10));
        let limits = world.machine.limits(class);
        assert_eq!(world.running(class), limits.node * 2, "{class:?}");
        // They come round, however slow each of them is: nobody waits for another's 4 MiB.
        let begun = |world: &World| world.asked.len() + world.granted.len();
        let before = begun(&world);
        world.pass(Duration::from_secs(2));
        assert_eq!(begun(&world) - before, limits.node * 2, "{class:?}");
        assert_eq!(world.running(class), limits.node * 2, "{class:?}");
        world.now += Duration::from_secs(100);
        for layer in 0..NAMES {
            world.machine.forget(layer, world.now);
            world.drain();
        }
        (0..NAMES).for_each(|layer| world.set_places(layer, &[(layer, &names[usize::try_from(layer).unwrap()])]));
        world.present.clear();
    }
}

#[test]
fn a_source_that_is_fast_keeps_its_slots_when_few_compete_and_has_one_when_many_do() {
    let names: Vec<String> = (0..60).map(|number| format!("source {number}")).collect();
    let mut world = World::with_layers(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let read_all = |world: &mut World, layers: Range<u64>, frames: Range<u32>| {
        for frame in frames {
            layers.clone().for_each(|layer| drop(world.want(layer, frame * 2..frame * 2 + 1, Priority::Read)));
        }
    };
    read_all(&mut world, 0..60, 0..1);
    while let Some(request) = world.live.keys().next().copied() {
        world.complete(request);
    }
    let at = |world: &World, layer| world.live.values().filter(|live| live.layer == layer).count();
    read_all(&mut world, 0..2, 1..13);
    assert_eq!((at(&world, 0), at(&world, 1)), (12, 12));
    read_all(&mut world, 2..60, 1..13);
    assert_eq!(world.running(READ), 48);
    world.pass(TICK * 20);
    // Their turn was over, and others had none.
    assert_eq!((0..60).map(|layer| at(&world, layer)).max(), Some(1));
}

#[test]
fn a_source_below_the_least_rate_has_one_slot_until_it_brings_something() {
    let mut world = World::with_layers(&["trickling", "trickling"]);
    for reader in 0..12 {
        world.want(u64::from(reader % 2), reader * 10..reader * 10 + 1, Priority::Read);
    }
    assert_eq!(world.running(READ), 12);
    for _ in 0..110 {
        world.live.values().for_each(|live| live.link.count(800));
        world.pass(TICK);
    }
    assert_eq!(world.running(READ), 1);
    let request = *world.live.keys().next().expect("one runs");
    world.complete(request);
    assert!(world.running(READ) > 1);
}

#[test]
fn a_refusal_leads_to_the_next_place_at_once_and_the_one_that_worked_is_asked_first() {
    let mut world = World::with_layers(&["a"]);
    world.set_places(0, &[(2, "c"), (1, "b"), (0, "a")]);
    let wait = world.want(0, 0..1, Priority::Read);
    world.fail(world.last_of(0), refused());
    world.fail(world.last_of(0), SourceError::unusable("a page"));
    world.complete(world.last_of(0));
    assert_eq!(world.asked, [(0, 2, 0..1), (0, 1, 0..1), (0, 0, 0..1)]);
    assert!(wait.is_over() && wait.0.borrow().error.is_none());

    // A new place takes nothing away from the one that works.
    world.set_places(0, &[(3, "d"), (2, "c"), (1, "b"), (0, "a")]);
    world.pass(Duration::from_secs(10));
    world.want(0, 5..6, Priority::Read);
    assert_eq!(world.asked[3..], [(0, 0, 5..6)]);
    world.fail(world.last_of(0), refused());
    assert_eq!(world.asked[4..], [(0, 3, 5..6)]);
}

#[test]
fn a_new_place_is_asked_at_once_for_what_waits() {
    let mut world = World::with_layers(&["gone"]);
    world.want(0, 0..1, Priority::Read);
    world.fail(world.last_of(0), refused());
    assert!(world.live.is_empty());
    world.set_places(0, &[(1, "new"), (0, "gone")]);
    assert_eq!(world.asked, [(0, 0, 0..1), (0, 1, 0..1)]);
}

/// One reader of a registry that answered 404 made 1,100 requests a second, and got an error after 20 ms.
#[test]
fn a_reader_waits_through_refusals_and_asks_a_bounded_number_of_times() {
    let mut world = World::with_layers(&["refusing"]);
    let wait = world.want(0, 0..1, Priority::Read);
    for _ in 0..150 {
        world.pass(TICK);
        while let Some(request) = world.live.keys().next().copied() {
            world.fail(request, refused());
        }
    }
    assert!(!wait.is_over());
    // At 0, 0.25, 0.75, 1.75, 3.75, 7.75, 11.75 s, as ticks go.
    assert_eq!(world.asked.len(), 7);
    world.pass(Duration::from_secs(4));
    world.complete(world.last_of(0));
    assert!(wait.is_over() && wait.0.borrow().error.is_none());
}

#[test]
fn readers_of_a_refusing_place_share_its_tries() {
    let mut world = World::with_layers(&["refusing"]);
    for _ in 0..150 {
        for frame in 0..20 {
            world.want(0, frame * 2..frame * 2 + 1, Priority::Read);
        }
        world.pass(TICK);
        while let Some(request) = world.live.keys().next().copied() {
            world.fail(request, refused());
        }
    }
    // Twelve at once, as none is known to fail yet; then one at a time.
    assert_eq!(world.asked.len(), 12 + 6);
}

#[test]
fn a_reader_gives_up_when_its_patience_is_over_and_the_next_one_hears_it_at_once() {
    let mut world = World::with_layers(&["hanging"]);
    let first = world.want(0, 0..1, Priority::Read);
    world.pass(PATIENCE / 2);
    let second = world.want(0, 0..1, Priority::Read);
    world.pass(PATIENCE / 2 - TICK);
    assert!(!first.is_over());
    world.pass(TICK);
    let error = first.0.borrow().error.clone();
    let Some(ReadError::Source { error, .. }) = error else { panic!("{error:?}") };
    assert_eq!(error.kind, SourceErrorKind::Passing);
    assert_eq!(error.message, "frame 0 has not come in 60s: no answer within 30 s");
    assert_eq!(world.told_places, [Some(0)], "the one that hangs");
    assert!(!second.is_over(), "it has its own time");
    world.pass(PATIENCE / 2);
    assert!(second.is_over());

    // The kernel asks a second time.
    let asked = world.asked.len();
    let again = world.want(0, 0..1, Priority::Read);
    assert!(again.0.borrow().error.is_some());
    assert_eq!(world.asked.len(), asked);
    world.pass(Duration::from_secs(3));
    assert!(!world.want(0, 0..1, Priority::Read).is_over());
}

/// A read over several frames, of which one had failed a moment ago, was answered, and waited on for the others: they
/// were asked for every 30 s for ever, and nothing was verified meanwhile.
#[test]
fn a_read_that_was_answered_left_frames_that_nobody_gave_up() {
    let mut world = World::with_layers(&["hanging"]);
    world.want(0, 3..4, Priority::Read);
    world.pass(PATIENCE);
    let several = world.want(0, 1..5, Priority::Read);
    assert!(several.0.borrow().error.is_some());
    assert!(world.machine.pending.is_empty() && world.live.is_empty(), "{:?}", world.machine.pending);
    let activity = world.machine.activity(0, world.now);
    assert_eq!((activity.frames_wanted, activity.reads), (0, Vec::new()));
    let asked = world.asked.len();
    world.pass(PATIENCE * 2);
    assert_eq!(world.asked.len(), asked);
    assert!(world.machine.is_quiet_since(world.now - PATIENCE));

    // The same of wrong bytes, which are in the way of what another reader wants.
    let several = world.want(0, 0..4, Priority::Read);
    let other = world.want(0, 2..3, Priority::Read);
    let request = world.last_of(0);
    world.receive(request);
    let (request, layer, frame) = world.received.swap_remove(0);
    world.machine.fail(request, layer, frame, corrupt(frame), world.now);
    world.drain();
    assert!(several.0.borrow().error.is_some() && !other.is_over());
    assert_eq!(world.machine.activity(0, world.now).frames_awaited, [2]);
    world.end(request, Outcome::Done);
    assert_eq!(world.asked.last(), Some(&(0, 0, 2..3)));
}

/// `lazuli status` named files that the fetching of the rest was at as read now: a first user thought of an intrusion.
#[test]
fn what_is_fetched_in_the_background_is_no_reader_waiting() {
    let mut world = World::with_layers(&["source"]);
    let _rest = world.want(0, 0..2, Priority::Background);
    let activity = world.machine.activity(0, world.now);
    assert_eq!((activity.frames_wanted, activity.frames_awaited), (2, vec![]));
    let _read = world.want(0, 1..2, Priority::Read);
    assert_eq!(world.machine.activity(0, world.now).frames_awaited, [1]);
}

/// Somebody who looks at a container that hangs is told since when each read waits, and for whom.
#[test]
fn a_read_that_waits_has_an_age_and_a_reason() {
    let mut world = World::with_layers(&["source"]);
    let since = world.now;
    let first = world.want(0, 0..2, Priority::Read);
    world.pass(TICK * 20);
    let _rest = world.want(0, 1..3, Priority::Background);
    let second = world.want(0, 1..2, Priority::Read);
    let activity = world.machine.activity(0, world.now);
    let reads = [(since, 0), (since + TICK * 20, FRAME_LEN)].map(|(since, offset)| WaitingRead { since, offset });
    assert_eq!((activity.reads, activity.failure, activity.is_paused), (reads.to_vec(), None, false));
    world.fail(world.last_of(0), SourceError::refused("registry.example answered 403"));
    let activity = world.machine.activity(0, world.now);
    assert_eq!((activity.failure.as_deref(), activity.is_paused), (Some("registry.example answered 403"), true));
    assert_eq!(activity.reads.len(), 2);
    for wait in [first, second] {
        wait.0.borrow_mut().error = Some(corrupt(0));
    }
    assert_eq!(world.machine.activity(0, world.now).reads, []);
}

/// A reader may be answered in another way: its file is removed, or the process that asked has gone.
#[test]
fn who_waits_no_longer_is_nobody_to_wait_for() {
    let mut world = World::with_layers(&["hanging"]);
    let wait = world.want(0, 0..1, Priority::Read);
    assert!(!world.machine.is_quiet_since(world.now));
    wait.0.borrow_mut().error = Some(corrupt(0));
    assert!(world.machine.is_quiet_since(world.now));
    assert!(world.machine.activity(0, world.now).frames_awaited.is_empty());
    world.fail(world.last_of(0), SourceError::passing("reset"));
    world.pass(PATIENCE);
    assert_eq!((world.asked.len(), world.machine.pending.len()), (1, 0));
}

#[test]
fn a_failure_that_readers_wait_through_is_told_and_one_of_the_background_is_not() {
    let mut world = World::with_layers(&["read", "rest"]);
    let wait = world.want(0, 0..1, Priority::Read);
    world.want(1, 0..1, Priority::Background);
    world.fail(world.last_of(0), refused());
    world.fail(world.last_of(1), refused());
    assert!(!wait.is_over());
    assert_eq!(world.told, [0]);
}

#[test]
fn a_cache_without_patience_passes_a_failure_on_when_every_place_has_failed() {
    let mut world = World::new(RequestOptions::default(), None);
    world.set_places(0, &[(1, "b"), (0, "a")]);
    let wait = world.want(0, 0..1, Priority::Read);
    world.fail(world.last_of(0), refused());
    assert!(!wait.is_over());
    world.fail(world.last_of(0), refused());
    assert!(wait.0.borrow().error.is_some());
    assert_eq!(world.asked, [(0, 1, 0..1), (0, 0, 0..1)]);
}

#[test]
fn a_read_without_an_answer_is_asked_for_at_the_next_place_too_and_the_first_answer_wins() {
    for is_first_place_first in [false, true] {
        let mut world = World::with_layers(&["slow"]);
        world.set_places(0, &[(0, "slow"), (1, "quick")]);
        let wait = world.want(0, 0..3, Priority::Read);
        world.pass(Duration::from_millis(1400));
        assert_eq!(world.asked, [(0, 0, 0..3)]);
        world.pass(Duration::from_millis(200));
        assert_eq!(world.asked, [(0, 0, 0..3), (0, 1, 0..3)]);
        let requests: Vec<u64> = world.live.keys().copied().collect();
        let winner = if is_first_place_first { requests[0] } else { requests[1] };
        world.receive(winner);
        assert_eq!((world.live.len(), world.cancelled), (1, 1));
        world.decode(0, true);
        world.complete(winner);
        assert!(wait.is_over() && wait.0.borrow().error.is_none());
        assert_eq!(world.asked.len(), 2, "nothing is asked for a third time");
        // The place that answered is the first one now.
        world.want(0, 9..10, Priority::Read);
        assert_eq!(world.asked[2].1, u64::from(!is_first_place_first));
    }
}

#[test]
fn a_source_that_sends_all_of_a_blob_is_asked_once_for_all_of_it() {
    let mut world = World::with_layers(&["a"]);
    let waits: Vec<TestWait> = [7..9, 30..31].into_iter().map(|frames| world.want(0, frames, Priority::Read)).collect();
    let (first, second) = (world.last_of(0) - 1, world.last_of(0));
    assert_eq!(world.running(Class::Frames(Priority::Read)), 2);
    let frames = (0..40).map(|frame| (frame, u64::from(frame) * FRAME_LEN..u64::from(frame + 1) * FRAME_LEN));
    world.machine.take_all(first, frames, |frame| frame == 3, world.now);
    world.drain();
    // The other request has nothing left to bring, and what is wanted from now on comes with the first.
    assert_eq!((world.cancelled, world.live.contains_key(&second)), (1, false));
    let late = world.want(0, 39..40, Priority::Read);
    assert_eq!(world.asked.len(), 2);
    assert!(!world.machine.is_wanted(first, 0, 3) && world.machine.is_wanted(first, 0, 0));
    for frame in [0, 7, 8, 30, 39] {
        assert!(world.machine.receive(first, 0, frame, world.now), "{frame}");
        world.received.push((first, 0, frame));
        world.decode(0, true);
    }
    assert!(waits.iter().chain([&late]).all(TestWait::is_over));
    // Frames that did not pass by are asked for again.
    world.end(first, Outcome::Done);
    assert!(world.asked.len() > 2);
}

#[test]
fn when_one_of_two_fails_the_other_goes_on() {
    let mut world = World::with_layers(&["slow"]);
    world.set_places(0, &[(0, "slow"), (1, "quick")]);
    let wait = world.want(0, 0..1, Priority::Read);
    world.pass(Duration::from_secs(2));
    let requests: Vec<u64> = world.live.keys().copied().collect();
    world.fail(requests[0], refused());
    assert_eq!(world.asked.len(), 2);
    world.complete(requests[1]);
    assert!(wait.is_over() && wait.0.borrow().error.is_none());
}

#[test]
fn a_trickle_loses_its_slot_to_the_next_place() {
    let mut world = World::with_layers(&["trickling"]);
    world.set_places(0, &[(0, "trickling"), (1, "healthy")]);
    let wait = world.want(0, 0..1, Priority::Read);
    let request = world.last_of(0);
    let link = world.live[&request].link.clone();
    for _ in 0..110 {
        link.count(800);
        world.pass(TICK);
    }
    assert_eq!(world.asked, [(0, 0, 0..1), (0, 1, 0..1)]);
    assert_eq!(world.cancelled, 1);
    world.complete(world.last_of(0));
    assert!(wait.is_over() && wait.0.borrow().error.is_none());
}

#[test]
fn a_slow_link_that_nobody_else_waits_for_is_left_alone() {
    let mut world = World::with_layers(&["modem"]);
    world.want(0, 0..1, Priority::Read);
    let link = world.live[&world.last_of(0)].link.clone();
    for _ in 0..400 {
        link.count(800);
        world.pass(TICK);
    }
    assert_eq!((world.asked.len(), world.cancelled), (1, 0));
}

#[test]
fn requests_that_are_too_slow_together_become_fewer() {
    let mut world = World::with_layers(&["narrow"]);
    for reader in 0..12 {
        world.want(0, reader * 10..reader * 10 + 1, Priority::Read);
    }
    assert_eq!(world.running(READ), 12);
    for _ in 0..200 {
        // 60 KiB/s for all.
        let count = world.live.len();
        world.live.values().for_each(|live| live.link.count(6 * 1024 / count));
        world.pass(TICK);
    }
    let running = world.running(READ);
    assert!((1..=4).contains(&running), "{running} requests share the link");
}

#[test]
fn a_request_without_any_answer_fails() {
    let mut world = World::with_layers(&["hanging"]);
    let wait = world.want(0, 0..1, Priority::Background);
    world.pass(Duration::from_secs(29));
    assert_eq!((world.asked.len(), world.cancelled), (1, 0));
    world.pass(Duration::from_secs(2));
    // A first failure may be a connection that broke.
    assert_eq!((world.asked.len(), world.cancelled), (2, 1));
    world.pass(Duration::from_secs(31));
    assert!(wait.0.borrow().error.is_some());
    assert!(world.live.is_empty());
}

#[test]
fn a_step_that_is_given_up_drops_its_requests_but_not_what_a_reader_wants() {
    let mut world = World::with_layers(&["hanging"]);
    let step = world.want(0, 0..8, Priority::Background);
    let reader = world.want(0, 0..1, Priority::Read);
    assert_eq!(world.running(Class::Frames(Priority::Background)), 2);
    world.machine.drop_background(0, &(0..u32::MAX), world.now);
    world.drain();
    assert!(step.0.borrow().error.is_some());
    assert!(!reader.is_over());
    // The one that holds the reader's frame goes on.
    assert_eq!((world.live.len(), world.cancelled), (1, 1));
    world.complete(world.last_of(0));
    assert!(reader.0.borrow().error.is_none() && reader.is_over());
}

#[test]
fn wrong_bytes_are_asked_for_elsewhere_and_fail_at_last() {
    let mut world = World::with_layers(&["a"]);
    world.set_places(0, &[(1, "b"), (0, "a")]);
    let wait = world.want(0, 0..1, Priority::Read);
    for _ in 0..3 {
        let request = world.last_of(0);
        world.receive(request);
        world.end(request, Outcome::Done);
        world.decode(0, false);
    }
    assert_eq!(world.asked, [(0, 1, 0..1), (0, 0, 0..1), (0, 1, 0..1)]);
    assert!(matches!(wait.0.borrow().error, Some(ReadError::Corrupt { .. })));
    // A program that asks again and again waits for a while before it is asked for.
    let again = world.want(0, 0..1, Priority::Read);
    world.pass(Duration::from_millis(1900));
    assert_eq!((again.is_over(), world.asked.len()), (false, 3));
    world.pass(TICK * 2);
    world.complete(world.last_of(0));
    assert!(again.is_over() && again.0.borrow().error.is_none());
}

#[test]
fn a_forgotten_layer_fails_its_readers_and_ends_its_requests() {
    let mut world = World::with_layers(&["a", "b"]);
    let waits = [world.want(0, 0..1, Priority::Read), world.want(0, 50..51, Priority::Background)];
    let other = world.want(1, 0..1, Priority::Read);
    world.machine.forget(0, world.now);
    world.drain();
    assert!(waits.iter().all(|wait| matches!(wait.0.borrow().error, Some(ReadError::Stopped(_)))));
    assert!(!other.is_over());
    assert_eq!(world.live.values().map(|live| live.layer).collect::<Vec<_>>(), [1]);
}

/// One thing that happens.
#[derive(Debug, Clone)]
enum Step {
    Want { layer: u64, first: u32, count: u32, priority: usize },
    WantStream { layer: u64 },
    Pass { ticks: u32 },
    Receive { which: prop::sample::Index },
    Trickle { which: prop::sample::Index },
    Fail { which: prop::sample::Index, kind: usize },
    End { which: prop::sample::Index },
    Decode { which: prop::sample::Index, is_right: bool },
    SetPlaces { layer: u64, places: Vec<u64> },
    DropBackground { layer: u64 },
    Forget { layer: u64 },
}

const LAYERS: u64 = 6;
const SOURCES: [&str; 6] = ["u", "v", "w", "x", "y", "z"];

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        8 => (0..LAYERS, 0u32..30, 1u32..8, 0usize..3)
            .prop_map(|(layer, first, count, priority)| Step::Want { layer, first, count, priority }),
        1 => (0..LAYERS).prop_map(|layer| Step::WantStream { layer }),
        3 => prop_oneof![1u32..5, 1u32..700].prop_map(|ticks| Step::Pass { ticks }),
        8 => index().prop_map(|which| Step::Receive { which }),
        1 => index().prop_map(|which| Step::Trickle { which }),
        3 => (index(), 0usize..3).prop_map(|(which, kind)| Step::Fail { which, kind }),
        1 => index().prop_map(|which| Step::End { which }),
        8 => (index(), prop::bool::weighted(0.9)).prop_map(|(which, is_right)| Step::Decode { which, is_right }),
        1 => (0..LAYERS, prop::collection::vec(0u64..6, 1..4))
            .prop_map(|(layer, places)| Step::SetPlaces { layer, places }),
        1 => (0..LAYERS).prop_map(|layer| Step::DropBackground { layer }),
        1 => (0..LAYERS).prop_map(|layer| Step::Forget { layer }),
    ]
}

const PRIORITIES: [Priority; 3] = [Priority::Read, Priority::HotPack, Priority::Background];

impl World {
    /// The places that a layer can have: place n of layer l is number 10 l + n.
    fn set_numbered_places(&mut self, layer: u64, places: &[u64]) {
        let mut numbers = places.to_vec();
        numbers.sort_unstable();
        numbers.dedup();
        let source = |number: u64| SOURCES[usize::try_from(number + layer).unwrap() % SOURCES.len()];
        let places: Vec<_> = numbers.into_iter().map(|number| (10 * layer + number, source(number))).collect();
        self.set_places(layer, &places);
    }

    fn take(&mut self, step: Step) {
        let live: Vec<u64> = self.live.keys().copied().collect();
        let pick = |which: &prop::sample::Index| (!live.is_empty()).then(|| live[which.index(live.len())]);
        match step {
            Step::Want { layer, first, count, priority } => {
                self.want(layer, first..first + count, PRIORITIES[priority]);
            }
            Step::WantStream { layer } => self.want_stream(layer),
            Step::Pass { ticks } => self.pass(TICK * ticks),
            Step::Receive { which } => {
                pick(&which).map(|request| self.receive(request));
            }
            Step::Trickle { which } => {
                pick(&which).inspect(|request| self.live[request].link.count(100));
            }
            Step::Fail { which, kind } => {
                let error = [SourceError::passing("p"), SourceError::refused("r"), SourceError::unusable("u")];
                if let Some(request) = pick(&which) {
                    self.fail(request, error[kind].clone());
                }
            }
            Step::End { which } => {
                if let Some(request) = pick(&which) {
                    self.end(request, Outcome::Lost);
                }
            }
            Step::Decode { which, is_right } => {
                if !self.received.is_empty() {
                    self.decode(which.index(self.received.len()), is_right);
                }
            }
            Step::SetPlaces { layer, places } => self.set_numbered_places(layer, &places),
            Step::DropBackground { layer } => {
                self.machine.drop_background(layer, &(0..u32::MAX), self.now);
                self.drain();
            }
            Step::Forget { layer } => {
                self.machine.forget(layer, self.now);
                self.drain();
                // Opened again.
                self.set_numbered_places(layer, &[0, 1]);
            }
        }
    }

    /// The invariants.
    fn check(&self) {
        for ((layer, frame), pending) in &self.machine.pending {
            let bringing: Vec<_> =
                self.live.iter().filter(|(number, _)| self.machine.is_wanted(**number, *layer, *frame)).collect();
            match pending.state {
                FrameState::Queued | FrameState::Received { .. } => assert_eq!(bringing.len(), 0),
                FrameState::Coming { hedge: None, .. } => assert_eq!(bringing.len(), 1, "frame {frame} of {layer}"),
                FrameState::Coming { hedge: Some(_), .. } => {
                    assert_eq!(bringing.len(), 2);
                    assert_ne!(bringing[0].1.place, bringing[1].1.place);
                }
            }
            let is_received = matches!(pending.state, FrameState::Received { .. });
            assert!(is_received || pending.is_wanted(), "frame {frame} of {layer} is fetched for nobody");
            assert!(!self.present.contains(&(*layer, *frame)) || matches!(pending.state, FrameState::Received { .. }));
        }
        for class in Class::ALL {
            let limits = self.machine.limits(class);
            let taken: Vec<_> = self.machine.taken(class).into_iter().filter(|taken| taken.is_of_class).collect();
            let at = |source: &str| taken.iter().filter(|taken| &*taken.source == source).count();
            assert!(taken.len() <= limits.node_max(), "{class:?}");
            let unproven = taken.iter().filter(|taken| !taken.is_proven).count();
            SOURCES.iter().for_each(|source| assert!(at(source) <= limits.source));
            // A layer that has nothing and may have something has got it.
            for (number, layer) in &self.machine.layers {
                let Class::Frames(priority) = class else { continue };
                let is_queued = self.machine.pending.iter().any(|(key, pending)| {
                    let is_deferred = self.machine.deferred.iter().any(|(_, deferred)| deferred == key);
                    let is_queued = pending.state == FrameState::Queued && !is_deferred;
                    key.0 == *number && is_queued && pending.priority == priority
                });
                if is_queued && let Some(place) = layer.place_for(&[], self.now) {
                    let at_place = self.machine.running.values().filter(|other| other.layer == *number).count();
                    let is_proven = self.machine.standings.of(&place.place.source).is_proven;
                    let is_crowded = taken.len() >= limits.node_max() || !is_proven && unproven >= limits.node;
                    let has_source_none = at(&place.place.source) == 0 && !is_crowded;
                    // A frame with wrong bytes may wait for another place than this one.
                    assert!(!(has_source_none && at_place == 0 && layer.places.len() == 1), "{class:?} of {number}");
                }
            }
        }
        let started = |live: &Live| u64::from(live.frames.end - live.frames.start) * FRAME_LEN <= 4 << 20;
        assert!(self.live.values().all(started));
        for wait in self.waits.iter().filter(|wait| !wait.is_over()) {
            let deadline = wait.0.borrow().deadline;
            assert!(deadline.is_none_or(|deadline| self.now < deadline), "somebody waits longer than readers do");
        }
        assert_eq!(self.live.len(), self.machine.running.len());
    }
}

fn small_options() -> RequestOptions {
    let limits = |node, source, layer| RequestLimits { node, source, layer };
    RequestOptions {
        read: limits(2, 2, 2),
        opening: limits(1, 1, 1),
        hot: limits(3, 2, 2),
        background: limits(2, 1, 1),
        ..RequestOptions::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 512, ..ProptestConfig::default() })]

    /// Whatever happens, in whatever order: a frame is asked for once (or twice, at two places), slots are kept, nobody
    /// who may be asked is left out, and no reader waits longer than patience. When everything works again, everybody
    /// has been answered, once.
    #[test]
    fn every_wait_ends_and_every_frame_is_asked_for_once(steps in prop::collection::vec(step(), 0..120)) {
        let mut world = World::new(small_options(), Some(PATIENCE));
        (0..LAYERS).for_each(|layer| world.set_numbered_places(layer, &[0, 1]));
        for step in steps {
            world.take(step);
            world.check();
        }
        // From here on every source answers.
        for _ in 0..1000 {
            let Some(request) = world.live.keys().next().copied() else {
                if world.received.is_empty() && world.machine.pending.is_empty() {
                    break;
                }
                while !world.received.is_empty() {
                    world.decode(0, true);
                }
                world.pass(TICK);
                continue;
            };
            world.complete(request);
            world.check();
        }
        prop_assert!(world.machine.pending.is_empty());
        prop_assert!(world.waits.iter().all(Waiter::is_over));
        world.pass(Duration::from_secs(70));
        prop_assert!(world.machine.is_idle());
    }
}
