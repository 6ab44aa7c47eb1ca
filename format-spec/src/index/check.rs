//! The rules that an index keeps beyond its form (SPEC.md 6): a reader that has checked it may follow every number.

use std::collections::VecDeque;

use crate::{
    index::Index,
    limits::*,
    records::*,
    table::{self, FormatError},
};

impl<B: AsRef<[u8]>> Index<B> {
    /// Proves every rule of SPEC.md 6, checksums of the sections included; linear in the length.
    ///
    /// # Errors
    ///
    /// The first rule broken, with the number of the record.
    pub fn check(&self) -> Result<(), FormatError> {
        let (_, entries) = table::parse(self.bytes.as_ref())?;
        table::check_sections(self.bytes.as_ref(), entries)?;
        self.check_rules()
    }

    /// Proves that the plain address space is within its limit (SPEC.md 9); constant time.
    ///
    /// # Errors
    ///
    /// [`FormatError::Space`] when it is not.
    pub fn check_space(&self) -> Result<(), FormatError> {
        let frames_len = self.frames().last().map_or(0, |frame| frame.blob_range().end);
        let per_frames = frames_len.saturating_mul(SPACE_PER_FRAME_BYTE);
        let space_max = SPACE_LEN_FREE.saturating_add(per_frames).min(SPACE_LEN_MAX);
        let space_len = self.space_len;
        if space_len > space_max { Err(FormatError::Space { space_len, space_max, frames_len }) } else { Ok(()) }
    }

    /// The same as [`Self::check`] of an index whose sections were compared with their checksums
    /// ([`crate::table::WireIndex::to_open`]).
    ///
    /// # Errors
    ///
    /// Those of [`Self::check`].
    pub fn check_rules(&self) -> Result<(), FormatError> {
        self.check_strings()?;
        self.check_directories()?;
        self.check_inodes()?;
        self.check_data()?;
        self.check_hot_pack()
    }

    /// Sets are runs of xattrs that follow each other, so that an attribute counts once in what follows.
    fn check_strings(&self) -> Result<(), FormatError> {
        let strings_len = self.strings.len() as u64;
        let xattrs: &[Xattr] = self.records(&self.xattrs);
        let mut texts_len = 0u64;
        for (number, xattr) in (0..).zip(xattrs) {
            let ensure = |holds, rule| ensure(holds, "xattr", number, rule);
            let (name_len, value_len) = (xattr.name_len.get(), xattr.value_len.get());
            let ends = [(xattr.name_offset, name_len), (xattr.value_offset, value_len)]
                .map(|(offset, len)| u64::from(offset.get()) + u64::from(len));
            ensure(ends.iter().all(|end| *end <= strings_len), "lies outside the strings")?;
            let name = self.string(xattr.name_offset.get(), name_len.into());
            ensure((1..=NAME_LEN_MAX).contains(&name.len()) && !name.contains(&0), "its name is not allowed")?;
            ensure(value_len <= XATTR_VALUE_LEN_MAX, "its value is longer than 64 KiB")?;
            texts_len += u64::from(name_len) + u64::from(value_len);
        }
        let mut xattr_end = 0;
        for (number, set) in (0..).zip(self.records::<XattrSet>(&self.xattr_sets)) {
            let ensure = |holds, rule| ensure(holds, "xattr set", number, rule);
            let run = xattr_end..set.first.get() as usize + set.count.get() as usize;
            ensure(set.first.get() as usize == xattr_end, "does not start where the one before it ends")?;
            let in_set = xattrs.get(run.clone());
            ensure(in_set.is_some(), "lies outside the xattrs")?;
            let names = in_set.unwrap_or_default().iter();
            let names = names.map(|xattr| self.string(xattr.name_offset.get(), xattr.name_len.get().into()));
            ensure(names.is_sorted_by(|name, next| name < next), "its names do not ascend")?;
            xattr_end = run.end;
        }
        ensure(xattr_end == xattrs.len(), "xattr", xattr_end as u64, "belongs to no set")?;
        for (number, inode) in (0..).zip(self.inodes()).filter(|(_, inode)| inode.is_symlink()) {
            let target_len = inode.size.get();
            ensure(target_len <= TARGET_LEN_MAX, "inode", number, "its target is longer than 4095 bytes")?;
            texts_len += target_len;
        }
        ensure(texts_len <= TEXTS_LEN_MAX, "strings", 0, "targets and xattrs have more than 256 MiB together")
    }

    /// Breadth-first order makes the directories a tree: each range starts where the one before it ended,
    /// so a directory has one parent and no directory is its own ancestor.
    fn check_directories(&self) -> Result<(), FormatError> {
        let (inodes, dirents) = (self.inodes(), self.dirents());
        let dirent_rule = |number: usize, rule| FormatError::Rule { what: "dirent", number: number as u64, rule };
        let root = inodes.first().ok_or(FormatError::Rule { what: "inode", number: 0, rule: "there is no root" })?;
        ensure(
            root.is_directory() && root.payload == 0 && root.parent == 0,
            "inode",
            0,
            "the root is no directory that starts at dirent 0",
        )?;
        let mut end = directory_end(root, 0, dirents.len())?;
        // Directories whose entries are still to come, and where these end.
        let mut directories = VecDeque::from([(0, end)]);
        let mut links = vec![0u32; inodes.len()];
        count_links(&mut links, 0, 2);
        let mut previous_name: Option<&[u8]> = None;
        let mut name_end = 0;
        for (number, dirent) in dirents.iter().enumerate() {
            while directories.front().is_some_and(|(_, end)| *end <= number) {
                directories.pop_front();
                previous_name = None;
            }
            let ensure = |holds, rule| if holds { Ok(()) } else { Err(dirent_rule(number, rule)) };
            let directory = directories.front().map(|(directory, _)| *directory);
            let directory = directory.ok_or(dirent_rule(number, "belongs to no directory"))?;
            ensure(dirent.name_offset.get() as usize == name_end, "its name is not the next one")?;
            let name = self.name(number);
            name_end += name.len();
            check_name(name).map_err(|rule| dirent_rule(number, rule))?;
            ensure(previous_name < Some(name), "names do not ascend")?;
            previous_name = Some(name);
            if dirent.inode == WHITEOUT {
                continue;
            }
            let inode_number = dirent.inode.get();
            let inode = self.inode(inode_number).ok_or(dirent_rule(number, "there is no such inode"))?;
            let has_names = links.get(inode_number as usize).is_some_and(|links| *links > 0);
            ensure(inode_number != 0, "names the root")?;
            ensure(has_names || inode.parent == directory, "is the first of an inode with another parent")?;
            if !inode.is_directory() {
                count_links(&mut links, inode_number, 1);
                continue;
            }
            ensure(!has_names, "names a directory that has a name already")?;
            ensure(inode.payload.get() as usize == end, "names a directory whose dirents are not the next ones")?;
            count_links(&mut links, inode_number, 2);
            count_links(&mut links, directory, 1);
            end = directory_end(inode, inode_number.into(), dirents.len())?;
            directories.push_back((inode_number, end));
        }
        ensure(end == dirents.len(), "dirent", end as u64, "belongs to no directory")?;
        ensure(name_end == self.names.len(), "dirent", dirents.len() as u64, "names are left over")?;
        for (number, (inode, links)) in (0..).zip(inodes.iter().zip(links)) {
            ensure(links > 0, "inode", number, "it has no name")?;
            ensure(inode.nlink == links, "inode", number, "its link count is not the number of its names")?;
        }
        Ok(())
    }

    fn check_inodes(&self) -> Result<(), FormatError> {
        let (mut plain_end, mut previous_offset) = (0u64, 0u64);
        ensure(
            self.space_len.is_multiple_of(PLAIN_ALIGN),
            "header",
            0,
            "the plain address space does not end at a multiple of 4096",
        )?;
        let xattr_set_count = self.xattr_sets.len() / size_of::<XattrSet>();
        let (inode_count, layer_count) = (self.inodes().len(), self.layers().len().max(1));
        let is_layer = self.layers().len() == 0;
        for (number, inode) in (0..).zip(self.inodes()) {
            let ensure = |holds, rule| ensure(holds, "inode", number, rule);
            ensure(inode.mtime_nanoseconds < 1_000_000_000, "its time has more than a second of nanoseconds")?;
            ensure(inode.mode.get() & !(mode::TYPE | 0o7777) == 0, "its mode has unknown bits")?;
            ensure(inode.flags.get() & !flag::ALL == 0, "it has unknown flags")?;
            ensure((inode.parent.get() as usize) < inode_count, "its parent does not exist")?;
            ensure((inode.layer.get() as usize) < layer_count, "its layer does not exist")?;
            if is_layer && !inode.is_regular() {
                ensure(inode.plain_offset == previous_offset, "its offset is not that of the inode before it")?;
            }
            let xattrs = inode.xattrs.get();
            ensure(xattrs == NO_XATTRS || (xattrs as usize) < xattr_set_count, "its xattr set does not exist")?;
            match inode.file_type() {
                mode::REGULAR if is_layer => {
                    let range = inode.plain_range();
                    ensure(range.start % PLAIN_ALIGN == 0, "its content is not aligned")?;
                    ensure(range.start == plain_end, "its content does not follow that of the file before it")?;
                    plain_end = range.end.checked_next_multiple_of(PLAIN_ALIGN).unwrap_or(u64::MAX);
                    previous_offset = range.start;
                    ensure(range.end <= self.space_len, "its content lies outside the plain address space")?;
                }
                mode::SYMLINK => {
                    let target = self.symlink_target(inode);
                    ensure(!target.is_empty() && !target.contains(&0), "its target is empty or no path")?;
                }
                mode::REGULAR | mode::DIRECTORY | mode::CHARACTER | mode::BLOCK | mode::FIFO | mode::SOCKET => {}
                _ => ensure(false, "its file type is unknown")?,
            }
        }
        Ok(())
    }

    fn check_data(&self) -> Result<(), FormatError> {
        let (mut tar_end, mut plain_end) = (0, 0);
        for (number, extent) in (0..).zip(self.extents()) {
            let ensure = |holds, rule| ensure(holds, "extent", number, rule);
            let (tar, plain) = (extent.tar_range(), extent.plain_range());
            ensure(extent.len != 0, "it is empty")?;
            ensure(tar.start >= tar_end && tar.end <= self.tar_len, "it is out of order or outside the tar stream")?;
            ensure(plain.start >= plain_end && plain.end <= self.space_len, "it is out of order or outside the space")?;
            (tar_end, plain_end) = (tar.end, plain.end);
        }
        let (mut tar_end, mut blob_end) = (0, 0);
        for (number, frame) in (0..).zip(self.frames()) {
            let ensure = |holds, rule| ensure(holds, "frame", number, rule);
            ensure(
                frame.tar_offset == tar_end && frame.blob_offset == blob_end,
                "it does not follow the one before it",
            )?;
            ensure((1..=FRAME_PLAIN_LEN_MAX).contains(&frame.plain_len.get()), "its plain length is not allowed")?;
            let compressed_len = frame.compressed_len.get();
            ensure((1..=FRAME_COMPRESSED_LEN_MAX).contains(&compressed_len), "its compressed length is not allowed")?;
            (tar_end, blob_end) = (frame.tar_range().end, frame.blob_range().end);
        }
        ensure(tar_end == self.tar_len, "frame", self.frames().len() as u64, "the frames do not cover the tar stream")?;
        self.check_space()
    }

    fn check_hot_pack(&self) -> Result<(), FormatError> {
        let is_content = |inode: &&Inode| inode.is_regular() && inode.size != 0;
        let piece_count = self.hot_pieces().len();
        let files: Vec<_> = if piece_count == 0 {
            Vec::new()
        } else {
            self.inodes().iter().filter(is_content).map(Inode::plain_range).collect()
        };
        let mut plain_len = 0u64;
        for (number, piece) in (0..).zip(self.hot_pieces()) {
            let ensure = |holds, rule| ensure(holds, "hot piece", number, rule);
            let range = piece.plain_range();
            ensure(piece.len != 0 && range.start % PLAIN_ALIGN == 0, "it is empty or not aligned")?;
            let file = files.get(files.partition_point(|file| file.end <= range.start)).cloned().unwrap_or_default();
            ensure(file.start <= range.start && range.end <= file.end, "it lies outside its file")?;
            ensure(range.end == file.end || range.end % PLAIN_ALIGN == 0, "it ends within a page of its file")?;
            plain_len += u64::from(piece.len.get());
        }
        for (number, frame) in (0..).zip(self.hot_frames()) {
            let (plain, compressed) = (frame.plain_len.get(), frame.compressed_len.get());
            let is_allowed =
                (1..=FRAME_PLAIN_LEN_MAX).contains(&plain) && (1..=FRAME_COMPRESSED_LEN_MAX).contains(&compressed);
            ensure(is_allowed, "hot frame", number, "its length is not allowed")?;
            plain_len = plain_len.checked_sub(plain.into()).unwrap_or(u64::MAX);
        }
        let frame_count = self.hot_frames().len() as u64;
        ensure(plain_len == 0, "hot frame", frame_count, "frames and pieces of the hot pack differ in length")?;
        let dedup_count = self.dedup.len() / size_of::<DedupLocation>();
        ensure(dedup_count <= 1, "dedup section", dedup_count as u64, "there are several")?;
        let is_allowed = |dedup: &DedupLocation| dedup.plain_len.max(dedup.compressed_len) <= INDEX_LEN_MAX;
        let is_allowed = self.dedup().is_none_or(is_allowed);
        ensure(is_allowed, "dedup section", 0, "it is longer than 1 GiB")
    }
}

/// Checks the name of a directory entry.
///
/// # Errors
///
/// The rule that it breaks.
pub fn check_name(name: &[u8]) -> Result<(), &'static str> {
    match name {
        b"" | b"." | b".." => Err("its name is empty, . or .."),
        _ if name.len() > NAME_LEN_MAX => Err("its name is longer than 255 bytes"),
        _ if name.iter().any(|byte| matches!(byte, 0 | b'/')) => Err("its name has a slash or a zero byte"),
        _ => Ok(()),
    }
}

/// Counts names of an inode, which exists.
fn count_links(links: &mut [u32], number: u32, count: u32) {
    if let Some(links) = links.get_mut(number as usize) {
        *links += count;
    }
}

fn directory_end(directory: &Inode, number: u64, dirent_count: usize) -> Result<usize, FormatError> {
    let end = directory.dirent_range().end;
    ensure(end <= dirent_count, "inode", number, "its dirents do not exist")?;
    Ok(end)
}

fn ensure(holds: bool, what: &'static str, number: u64, rule: &'static str) -> Result<(), FormatError> {
    if holds { Ok(()) } else { Err(FormatError::Rule { what, number, rule }) }
}
