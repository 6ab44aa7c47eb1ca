//! An index, and everything that it lists; beside the original's, entry by entry.

use std::{
    collections::{HashMap, HashSet},
    pin::Pin,
};

use format_spec::Digest;

use super::{
    Check, CheckError, check_embedded, check_len,
    notes::{compare_fields, compare_notes, compare_type},
    original::Original,
    report::{Findings, Part},
};
use crate::{
    image::{
        ImageSource, StoredManifest,
        manifest::{Descriptor, ImageIndex, IndexEntry},
        resolve::{INDEX_DEPTH_MAX, ResolveError, ResolvedImage, parse, read_image},
    },
    image::{manifest::REFERENCE_DIGEST, stale::describes_layers},
};

/// The entries that were checked, with those of the original: an index may list one thing many times.
pub(super) type Seen = HashSet<(Digest, Option<Digest>)>;

impl Check<'_> {
    /// Checks an index that is itself the `depth`th; `theirs` is what the original has in its place.
    ///
    /// # Errors
    ///
    /// When it cannot be understood, or the original's.
    pub(super) fn index<'s>(
        &'s mut self,
        ours: StoredManifest,
        theirs: Option<StoredManifest>,
        depth: usize,
        seen: &'s mut Seen,
    ) -> Pin<Box<dyn Future<Output = Result<(), CheckError>> + 's>> {
        Box::pin(async move {
            let place = format!("index {}", ours.digest);
            if depth > INDEX_DEPTH_MAX {
                let problem = format!("more than {INDEX_DEPTH_MAX} indexes within one another");
                self.done.findings.add(Part::List, place, problem);
                return Ok(());
            }
            let index: ImageIndex = parse(&ours).map_err(ResolveError::from)?;
            let theirs: Option<ImageIndex> = match theirs {
                Some(stored) if stored.is_index() => {
                    Some(parse(&stored).map_err(|error| CheckError::Original(error.into()))?)
                }
                Some(stored) => {
                    let problem = format!(
                        "it is one, the original {} is not: name one image of it with --platform",
                        stored.digest
                    );
                    self.done.findings.add(Part::List, place.clone(), problem);
                    None
                }
                None => None,
            };
            let list = |index: &'_ ImageIndex| index.manifests.clone();
            let their_entries = theirs.as_ref().map(list).unwrap_or_default();
            for (number, entry) in index.manifests.iter().enumerate() {
                let place = format!("{place}, entry {}", number + 1);
                self.entry(&place, entry, their_entries.get(number), depth, seen).await?;
            }
            if let Some(theirs) = &theirs {
                compare_lists(&place, &index, theirs, &self.pairs, &mut self.done.findings);
            }
            Ok(())
        })
    }

    /// Checks what an entry points to.
    async fn entry(
        &mut self,
        place: &str,
        ours: &IndexEntry,
        theirs: Option<&IndexEntry>,
        depth: usize,
        seen: &mut Seen,
    ) -> Result<(), CheckError> {
        let Some((entry, stored)) = self.follow(place, self.source, ours).await else { return Ok(()) };
        let findings = &mut self.done.findings;
        check_len(place, entry, stored.bytes.len() as u64, findings);
        check_embedded(place, entry, findings);
        if entry.media_type != stored.media_type {
            let problem = format!("it says {:?}, what it points to {:?}", entry.media_type, stored.media_type);
            findings.add(Part::List, format!("{place}, mediaType"), problem);
        }
        let original = self.original.zip(theirs);
        let theirs = match original {
            Some((original, entry)) => {
                self.follow(&format!("{place} of the original"), original, entry).await.map(|(_, stored)| stored)
            }
            None => None,
        };
        let their_digest = theirs.as_ref().map(|theirs| theirs.digest);
        self.pairs.extend(their_digest.map(|theirs| (theirs, stored.digest)));
        if !seen.insert((stored.digest, their_digest)) {
            return Ok(());
        }
        if stored.is_index() {
            return match self.index(stored, theirs, depth + 1, seen).await {
                Err(CheckError::Resolve(error)) => {
                    self.done.findings.add(Part::List, place, error);
                    Ok(())
                }
                result => result,
            };
        }
        match read_image(self.source, &stored).await {
            Err(error) => self.done.findings.add(Part::Manifest, place, error),
            Ok(None) => self.artifact(&stored, theirs.as_ref()).await,
            Ok(Some(image)) => {
                let original = match (self.original, &theirs) {
                    (Some(at), Some(theirs)) => self.their_image(place, at, theirs).await,
                    _ => None,
                };
                let stated = entry.platform.clone().filter(|platform| platform.is_stated());
                let platform = stated.unwrap_or_else(|| image.platform.clone());
                self.image(ResolvedImage { platform, ..image }, original).await?;
            }
        }
        Ok(())
    }

    /// The manifest that an entry points to; a finding where it cannot be had.
    async fn follow<'e>(
        &mut self,
        place: &str,
        source: &ImageSource,
        entry: &'e IndexEntry,
    ) -> Option<(&'e Descriptor, StoredManifest)> {
        let found = match entry.descriptor() {
            Ok(entry) => {
                source.manifest_of(entry).await.map(|stored| (entry, stored)).map_err(|error| error.to_string())
            }
            Err(reason) => Err(reason),
        };
        found.map_err(|problem| self.done.findings.add(Part::List, place, problem)).ok()
    }

    /// The original's image.
    async fn their_image<'o>(
        &mut self,
        place: &str,
        at: &'o ImageSource,
        theirs: &StoredManifest,
    ) -> Option<Original<'o>> {
        let place = format!("{place} of the original");
        match read_image(at, theirs).await {
            Ok(Some(image)) => return Some(Original { at, image }),
            Ok(None) => self.done.findings.add(Part::List, place, "it is no container image, this one is"),
            Err(error) => self.done.findings.add(Part::List, place, error),
        }
        None
    }
}

/// An index against the original's: `pairs` says what stands here for what stands there.
fn compare_lists(
    place: &str,
    ours: &ImageIndex,
    theirs: &ImageIndex,
    pairs: &HashMap<Digest, Digest>,
    findings: &mut Findings,
) {
    if ours.schema_version != theirs.schema_version {
        let problem = format!("it is {}, in the original {}", ours.schema_version, theirs.schema_version);
        findings.add(Part::List, format!("{place}, schemaVersion"), problem);
    }
    compare_type(place, &ours.media_type, &theirs.media_type, registry::media_type::OCI_INDEX, findings);
    compare_notes(place, ours.annotations.as_ref(), theirs.annotations.as_ref(), |_| false, &[], findings);
    compare_fields(place, &ours.rest, &theirs.rest, findings);
    let (our_count, their_count) = (ours.manifests.len(), theirs.manifests.len());
    if our_count != their_count {
        findings.add(Part::List, place, format!("it has {our_count} entries, the original {their_count}"));
    }
    for (number, (ours, theirs)) in ours.manifests.iter().zip(&theirs.manifests).enumerate() {
        let place = format!("{place}, entry {}", number + 1);
        match (ours, theirs) {
            (IndexEntry::Known(ours), IndexEntry::Known(theirs)) => {
                compare_entries(&place, ours, theirs, pairs, findings);
            }
            // That it cannot be understood has been said.
            (ours, theirs) if ours == theirs => {}
            _ => findings.add(Part::List, place, "it is another one in the original"),
        }
    }
}

/// An entry says what the original's says, but for what it points to.
fn compare_entries(
    place: &str,
    ours: &Descriptor,
    theirs: &Descriptor,
    pairs: &HashMap<Digest, Digest>,
    findings: &mut Findings,
) {
    let is_new = ours.digest != theirs.digest;
    if ours.platform != theirs.platform {
        let describe = |entry: &Descriptor| entry.platform.as_ref().map_or("nothing".to_owned(), ToString::to_string);
        let problem = format!("it is {}, in the original {}", describe(ours), describe(theirs));
        findings.add(Part::List, format!("{place}, platform"), problem);
    }
    let mut expected = theirs.annotations.clone();
    if let Some(about) = expected.as_mut().and_then(|notes| notes.get_mut(REFERENCE_DIGEST))
        && let Some(new) = about.parse().ok().and_then(|old: Digest| pairs.get(&old))
    {
        *about = new.to_string();
    }
    let may_be_gone = |key: &str| is_new && describes_layers(key);
    compare_notes(place, ours.annotations.as_ref(), expected.as_ref(), may_be_gone, &[], findings);
    let mut expected = theirs.rest.clone();
    if is_new {
        // The old manifest, or where it can be had.
        expected.remove("data");
        expected.remove("urls");
    }
    compare_fields(place, &ours.rest, &expected, findings);
    if !is_new && ours.media_type != theirs.media_type {
        let problem = format!("it is {:?}, in the original {:?}", ours.media_type, theirs.media_type);
        findings.add(Part::List, format!("{place}, mediaType"), problem);
    }
}
