//! Logs that cannot be written.

use std::{
    fs::{self, File},
    io::Read as _,
};

use super::{output::FILE_LEN_MAX, *};

/// A filter with a typo was taken, and silenced everything.
#[test]
fn a_filter_with_a_typo_is_refused() {
    for text in ["info", "warn,storage=debug", "fusefs::trees=trace", "OFF", ""] {
        assert!(filter(text).is_ok(), "{text}");
    }
    for (text, word) in [("verbose", "verbose"), ("snapshoter=debug", "snapshoter"), ("storage=loud", "loud")] {
        let error = filter(text).unwrap_err();
        assert!(error.contains(word) && error.contains("give") && error.lines().count() == 1, "{error}");
    }
}

fn log_to(file: File) -> Log {
    Log::new(Output::of_file(file, None)).unwrap()
}

fn say(log: &Log, line: &str) {
    log.0.push(format!("{line}\n").as_bytes(), None, Instant::now());
}

fn pipe() -> (File, File) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    (reader.into(), writer.into())
}

#[test]
fn lines_come_out_whole_and_in_their_order() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let log = log_to(File::create(&path).unwrap());
    let lines: Vec<_> = (0..1000).map(|number| format!("line {number}")).collect();
    lines.iter().for_each(|line| say(&log, line));
    drop(log);
    assert!(fs::read_to_string(path).unwrap().lines().eq(lines.iter()));
}

#[test]
fn a_reader_who_stopped_reading_stops_nobody_and_is_told_what_is_lost() {
    let (mut reader, writer) = pipe();
    let log = log_to(writer);
    // More than pipe and queue hold together.
    let line = "x".repeat(1000);
    for _ in 0..1000 {
        say(&log, &line);
    }
    std::thread::spawn({
        let queue = log.0.clone();
        // The pipe ends with the process alone: this thread holds it open.
        move || queue.flush()
    });
    let mut text = String::new();
    let mut buffer = [0; 4096];
    let counts = |text: &str| -> (usize, usize) {
        let told =
            text.lines().filter_map(|line| line.strip_suffix(" lines of the log are lost: it could not be written"));
        (text.lines().filter(|text| **text == line).count(), told.map(|count| count.parse::<usize>().unwrap()).sum())
    };
    // It may be told several times: the writing thread takes what there is while more is being said.
    for _ in 0..10_000 {
        let len = reader.read(&mut buffer).unwrap();
        text.push_str(std::str::from_utf8(&buffer[..len]).unwrap());
        let (whole, lost) = counts(&text);
        if whole + lost >= 1000 && lost > 0 {
            break;
        }
        say(&log, "another one");
    }
    let (whole, lost) = counts(&text);
    assert!((100..1000).contains(&whole), "{whole}");
    assert!(whole + lost >= 1000 && lost > 0, "{whole} written, {lost} lost");
}

#[test]
fn a_log_that_fails_is_written_again_when_that_works() {
    let directory = tempfile::tempdir().unwrap();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut output = Output::of_file(full, None);
    assert!(output.write(b"lost\n").is_err());
    let (reader, writer) = pipe();
    drop(reader);
    assert!(Output::of_file(writer, None).write(b"lost\n").is_err());
    // The thread goes on through failures.
    let log = log_to(File::options().write(true).open("/dev/full").unwrap());
    for _ in 0..10 {
        say(&log, "lost");
        log.0.flush();
    }
    assert_eq!(log.0.lock().lost_count, 10);
    drop(directory);
}

#[test]
fn a_file_is_bounded_whatever_is_logged() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let file = File::options().create(true).append(true).open(&path).unwrap();
    let mut output = Output::of_file(file, Some(path.clone()));
    let lines = "a line of some length\n".repeat(10_000);
    let written = 5 * usize::try_from(FILE_LEN_MAX).unwrap() / lines.len();
    for _ in 0..written {
        output.write(lines.as_bytes()).unwrap();
    }
    output.write(b"the last one\n").unwrap();
    let names: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    for name in names {
        assert!(fs::metadata(directory.path().join(name)).unwrap().len() <= FILE_LEN_MAX);
    }
    assert!(fs::read_to_string(path).unwrap().ends_with("the last one\n"));
}

#[test]
fn a_line_that_repeats_is_left_out_and_others_are_not() {
    let (mut reader, writer) = pipe();
    let log = log_to(writer);
    let metadata = tracing::metadata!(
        name: "event",
        target: "test",
        level: Level::WARN,
        fields: &[],
        callsite: &CALLSITE,
        kind: tracing::metadata::Kind::EVENT
    );
    let place = metadata.callsite();
    for second in 0..1000 {
        log.0.push(format!("12:{second} WARN read failed\n").as_bytes(), Some(&place), Instant::now());
    }
    log.0.push(b"13:00 WARN something else\n", Some(&place), Instant::now());
    log.0.flush();
    let mut buffer = vec![0; 1 << 16];
    let len = reader.read(&mut buffer).unwrap();
    let text = String::from_utf8(buffer[..len].to_vec()).unwrap();
    assert_eq!(text.lines().filter(|line| line.contains("read failed")).count(), 10, "{text}");
    assert!(text.contains("[further lines equal to this one are left out for a minute]"), "{text}");
    assert!(text.ends_with("13:00 WARN something else\n"), "{text}");
}

struct NoCallsite;
static CALLSITE: NoCallsite = NoCallsite;

impl tracing::callsite::Callsite for NoCallsite {
    fn set_interest(&self, _: tracing::subscriber::Interest) {}

    fn metadata(&self) -> &tracing::Metadata<'_> {
        unreachable!("nobody asks")
    }
}
