//! The part of a wanted range that an answer holds. Deciding only, from the head of the answer.
//!
//! Source: RFC 9110 14.2 to 14.4, 15.3.7 and 15.5.17. A server may answer a range with all of the blob, or with
//! another range: whoever asks looks at `Content-Range` and asks for the rest.

use std::ops::Range;

use reqwest::{Response, StatusCode, header};

use crate::{error::clean, transport::header_text};

/// The part of a blob that is still to come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Offset in the blob of the next byte.
    pub(crate) next: u64,
    /// Where to stop; unknown until somebody has said how long the blob is.
    pub(crate) end: Option<u64>,
    /// Length of the whole blob, where the caller or an answer has said it.
    pub(crate) blob_len: Option<u64>,
}

/// The head of an answer, as far as it matters here.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) status: StatusCode,
    /// Empty without one.
    pub(crate) content_range: String,
    pub(crate) content_len: Option<u64>,
    /// Whether it calls itself a web page.
    pub(crate) is_page: bool,
}

/// The content of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// How many of its bytes lie in front of the next one wanted.
    pub(crate) skip: u64,
    /// Where it ends in the blob, if it says so.
    pub(crate) end: Option<u64>,
    /// The wanted range, with what the answer says about the blob.
    pub(crate) wanted: Wanted,
    /// Whether it is all of the blob where a range was asked for.
    pub(crate) is_whole: bool,
}

/// The use of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Use(Part),
    /// It does not say which part it is: ask once more, without a range.
    AskWhole,
    /// Neither a part nor all of the blob.
    Refusal,
}

impl Head {
    pub(crate) fn of(response: &Response) -> Self {
        let text = |name| header_text(response.headers(), name).unwrap_or_default();
        Self {
            status: response.status(),
            content_range: text(header::CONTENT_RANGE).to_owned(),
            content_len: response.content_length(),
            is_page: text(header::CONTENT_TYPE).trim_start().to_ascii_lowercase().starts_with("text/html"),
        }
    }
}

impl Wanted {
    /// Whether less than all is wanted.
    pub(crate) fn is_partial(&self) -> bool {
        self.next > 0 || self.end.is_some()
    }

    /// Whether nothing is left to come.
    pub(crate) fn is_done(&self) -> bool {
        self.end == Some(self.next)
    }

    /// The value of a `Range` header.
    pub(crate) fn range_header(&self) -> String {
        let last = self.end.map_or(String::new(), |end| end.saturating_sub(1).to_string());
        format!("bytes={}-{last}", self.next)
    }

    /// The verdict on an answer with this head; `is_ranged` says whether a range was asked for.
    ///
    /// # Errors
    ///
    /// The reason why it is unusable.
    pub(crate) fn judge(&self, head: &Head, is_ranged: bool) -> Result<Verdict, String> {
        match head.status {
            StatusCode::PARTIAL_CONTENT => match parse_content_range(&head.content_range) {
                Some((range, blob_len)) => self.accept_range(range, blob_len, head.content_len).map(Verdict::Use),
                None if is_ranged => Ok(Verdict::AskWhole),
                None => Err(format!("Content-Range {:?}", clean(&head.content_range))),
            },
            StatusCode::OK => self.accept_whole(head).map(Verdict::Use),
            StatusCode::RANGE_NOT_SATISFIABLE => Err(format!("the blob ends before byte {}", self.next)),
            _ => Ok(Verdict::Refusal),
        }
    }

    fn accept_range(&self, range: Range<u64>, blob_len: Option<u64>, content_len: Option<u64>) -> Result<Part, String> {
        let mut wanted = self.clone();
        if let Some(blob_len) = blob_len {
            wanted.learn_blob_len(blob_len)?;
        }
        let Range { start, end } = range;
        if !range.contains(&self.next) {
            return Err(format!("bytes {range:?} where byte {} was asked for", self.next));
        }
        if let Some(len) = content_len.filter(|len| *len != range.end - range.start) {
            return Err(format!("{len} bytes for {range:?}"));
        }
        if wanted.end.is_none() {
            wanted.end = Some(range.end);
        }
        let is_whole = range.start < self.next && Some(range) == wanted.blob_len.map(|len| 0..len);
        Ok(Part { skip: self.next - start, end: Some(end), wanted, is_whole })
    }

    fn accept_whole(&self, head: &Head) -> Result<Part, String> {
        let mut wanted = self.clone();
        // A blob may be a page; a portal's page has its length by accident only.
        if head.is_page
            && (head.content_len.is_none() || self.blob_len.is_some_and(|len| head.content_len != Some(len)))
        {
            return Err("an HTML page instead of the blob, so perhaps no registry".to_owned());
        }
        if let Some(len) = head.content_len {
            wanted.learn_blob_len(len)?;
        }
        Ok(Part { skip: self.next, end: head.content_len, wanted, is_whole: self.is_partial() })
    }

    /// Takes in what an answer says about the length of the blob.
    fn learn_blob_len(&mut self, found: u64) -> Result<(), String> {
        if let Some(expected) = self.blob_len.filter(|expected| *expected != found) {
            return Err(format!("the blob has {found} bytes, expected {expected}"));
        }
        let end = *self.end.get_or_insert(found);
        if end > found || self.next > found {
            return Err(format!("the blob has {found} bytes, asked for bytes up to {end}"));
        }
        self.blob_len = Some(found);
        Ok(())
    }
}

/// `bytes FIRST-LAST/LENGTH` as a half-open range and the length, if known. Source: RFC 9110 14.4.
pub(crate) fn parse_content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (range, len) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?);
    let len = if len == "*" { None } else { Some(len.parse::<u64>().ok()?) };
    (first <= last && len.is_none_or(|len| last < len)).then_some(())?;
    Some((first..last.checked_add(1)?, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_content_ranges() {
        assert_eq!(parse_content_range("bytes 5-9/20"), Some((5..10, Some(20))));
        assert_eq!(parse_content_range("bytes 0-0/*"), Some((0..1, None)));
        for text in
            ["", "bytes */20", "bytes 9-5/20", "bytes 5-20/20", "items 5-9/20", "bytes 0-18446744073709551615/*"]
        {
            assert_eq!(parse_content_range(text), None, "{text}");
        }
    }

    /// Bytes 200 to 300 of a blob of 1000.
    fn wanted() -> Wanted {
        Wanted { next: 200, end: Some(300), blob_len: Some(1000) }
    }

    fn head(status: u16, content_range: &str, content_len: Option<u64>) -> Head {
        let status = StatusCode::from_u16(status).unwrap();
        Head { status, content_range: content_range.to_owned(), content_len, is_page: false }
    }

    #[test]
    fn a_part_is_used_for_what_it_has() {
        let check = |range: &str, len, skip, end| {
            let part = Part { skip, end: Some(end), wanted: wanted(), is_whole: end == 1000 };
            assert_eq!(wanted().judge(&head(206, range, len), true), Ok(Verdict::Use(part)), "{range}");
        };
        check("bytes 200-299/1000", Some(100), 0, 300);
        check("bytes 200-209/1000", Some(10), 0, 210);
        check("bytes 128-299/1000", None, 72, 300);
        check("bytes 0-999/*", Some(1000), 200, 1000);
    }

    #[test]
    fn a_part_without_the_next_byte_is_refused() {
        let check = |head: Head, expected: &str| {
            assert_eq!(wanted().judge(&head, true), Err(expected.to_owned()));
        };
        check(head(206, "bytes 201-300/1000", None), "bytes 201..301 where byte 200 was asked for");
        check(head(206, "bytes 100-199/1000", None), "bytes 100..200 where byte 200 was asked for");
        check(head(206, "bytes 200-299/1001", None), "the blob has 1001 bytes, expected 1000");
        check(head(206, "bytes 200-299/1000", Some(99)), "99 bytes for 200..300");
        check(head(200, "", Some(250)), "the blob has 250 bytes, expected 1000");
        check(head(416, "bytes */100", None), "the blob ends before byte 200");
        let page = Head { is_page: true, ..head(200, "", None) };
        check(page, "an HTML page instead of the blob, so perhaps no registry");
    }

    #[test]
    fn a_part_that_does_not_say_which_is_asked_for_as_a_whole() {
        for range in ["", "bytes */1000", "multipart"] {
            assert_eq!(wanted().judge(&head(206, range, Some(100)), true), Ok(Verdict::AskWhole), "{range}");
            assert!(wanted().judge(&head(206, range, Some(100)), false).is_err(), "{range}");
        }
    }

    #[test]
    fn all_of_a_blob_is_used_from_the_next_byte_on() {
        for len in [Some(1000), None] {
            let part = Part { skip: 200, end: len, wanted: wanted(), is_whole: true };
            assert_eq!(wanted().judge(&head(200, "", len), true), Ok(Verdict::Use(part)));
        }
        let all = Wanted { next: 0, end: None, blob_len: None };
        let known = Wanted { next: 0, end: Some(7), blob_len: Some(7) };
        let part = Part { skip: 0, end: Some(7), wanted: known, is_whole: false };
        assert_eq!(all.judge(&head(200, "", Some(7)), false), Ok(Verdict::Use(part)));
    }
}
