//! The log of a [`crate::TestRegistry`]: what it answered, and when.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

/// From 1 March of the year 0 to 1 January 1970, counted as [`parse_time`] does.
const DAYS_TO_1970: u64 = 719_469;

/// One answer of the registry, as it logged it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    /// HTTP method.
    pub method: String,
    /// Path and query of the request.
    pub path: String,
    /// HTTP status.
    pub status: u64,
    /// Bytes of the body that were written.
    pub body_bytes: u64,
    /// When the answer was written.
    pub ended: SystemTime,
    /// How long that took, from the request on.
    pub took: Duration,
}

impl Served {
    /// Whether this was (a part of) a blob being read.
    pub fn is_blob_read(&self) -> bool {
        self.method == "GET" && self.path.contains("/blobs/sha256:")
    }

    /// The part of the answer that was written at `moment`, if it was written steadily; `None` when it was not asked
    /// for yet.
    pub fn bytes_at(&self, moment: SystemTime) -> Option<u64> {
        let began = self.ended.checked_sub(self.took)?;
        let since = moment.duration_since(began).ok()?;
        let bytes = u128::from(self.body_bytes) * since.as_nanos() / self.took.as_nanos().max(1);
        Some(u64::try_from(bytes).unwrap_or(u64::MAX).min(self.body_bytes))
    }
}

/// The answer that a line tells of; `None` for lines about other things.
pub(crate) fn parse_line(line: &str) -> Option<Served> {
    let entry: Value = serde_json::from_str(line).ok()?;
    Some(Served {
        status: entry["http.response.status"].as_u64()?,
        method: entry["http.request.method"].as_str()?.to_owned(),
        path: entry["http.request.uri"].as_str()?.to_owned(),
        body_bytes: entry["http.response.written"].as_u64()?,
        ended: parse_time(entry["time"].as_str()?)?,
        took: parse_duration(entry["http.response.duration"].as_str()?)?,
    })
}

/// A time of RFC 3339 in UTC: `2026-11-29T01:44:08.69Z`.
fn parse_time(text: &str) -> Option<SystemTime> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.split('-').map(|number| number.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let mut time = time.split(':').map(|number| number.parse::<f64>().ok());
    let (hours, minutes, seconds) = (time.next()??, time.next()??, time.next()??);
    // Years begin in March here, so that the leap day ends one.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year.checked_sub(1)?, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day;
    let whole = Duration::from_secs(days.checked_sub(DAYS_TO_1970)? * 86_400);
    Some(UNIX_EPOCH + whole + Duration::try_from_secs_f64(hours * 3600.0 + minutes * 60.0 + seconds).ok()?)
}

/// A duration as Go writes it: `1m2.5s`, `8.79ms`, `120µs`.
fn parse_duration(text: &str) -> Option<Duration> {
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let number = rest.find(|character: char| character.is_alphabetic())?;
        let unit = rest[number..].find(|character: char| character.is_ascii_digit());
        let end = unit.map_or(rest.len(), |unit| number + unit);
        let one = match &rest[number..end] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        seconds += rest[..number].parse::<f64>().ok()? * one;
        rest = &rest[end..];
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Served {
        Served {
            method: "GET".to_owned(),
            path: "/v2/a/blobs/sha256:00".to_owned(),
            status: 206,
            body_bytes: 100,
            ended: UNIX_EPOCH + Duration::from_secs(1_795_916_648),
            took: Duration::from_secs(4),
        }
    }

    #[test]
    fn log_lines_of_answers_are_understood() {
        let line = r#"{"http.request.method":"GET","http.request.uri":"/v2/a/blobs/sha256:00",
            "http.response.status":206,"http.response.written":100,"http.response.duration":"4s",
            "msg":"response completed","time":"2026-11-29T01:44:08.000000000Z"}"#;
        assert_eq!(parse_line(line), Some(answer()));
        assert_eq!(parse_line(r#"{"msg":"listening on 127.0.0.1:5000"}"#), None);
        assert_eq!(parse_line("no json"), None);
    }

    #[test]
    fn times_and_durations_are_those_of_the_log() {
        let seconds = |text| parse_time(text).unwrap().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert_eq!(seconds("1970-01-01T00:00:00Z"), 0);
        assert_eq!(seconds("2024-02-29T12:00:00.5Z"), 1_709_208_000);
        assert_eq!(parse_duration("1m2.5s"), Some(Duration::from_millis(62_500)));
        assert_eq!(parse_duration("120µs"), Some(Duration::from_micros(120)));
        assert_eq!(parse_duration("3 days"), None);
    }

    #[test]
    fn an_answer_counts_as_far_as_it_was_written() {
        let served = answer();
        let at = |seconds| served.bytes_at(served.ended - Duration::from_secs(4) + Duration::from_secs(seconds));
        assert_eq!((at(0), at(1), at(4), at(9)), (Some(0), Some(25), Some(100), Some(100)));
        assert_eq!(served.bytes_at(served.ended - Duration::from_secs(5)), None);
    }
}
