#!/usr/bin/env python3
"""A second reader of the Lazuli layer format, written from SPEC.md and nothing else.

    reader.py list BLOB            every name of the layer, a line each; then hot pack and dedup section
    reader.py cat BLOB PATH        the content of a file
    reader.py frames BLOB          every frame: offset, lengths, digest

It reads a blob that lies in a file. Every rule that it relies on is checked; numbers in brackets are
sections of SPEC.md. zstd comes from the command of that name.
"""

import hashlib
import json
import struct
import subprocess
import sys
import threading
import zlib

FOOTER_LEN = 128
FOOTER_MAGIC = 0x184D2A5F
NONE = 0xFFFFFFFF
FRAME_PLAIN_LEN_MAX = 4 << 20
INDEX_LEN_MAX = 1 << 30
EMPTY_FRAME = bytes.fromhex("28b52ffd2000010000")
TYPES = {0o14: "socket", 0o12: "symlink", 0o10: "file", 0o06: "block", 0o04: "directory", 0o02: "character",
         0o01: "fifo"}
REASONS = {1: "profile", 2: "command", 3: "interpreter", 4: "library", 5: "system", 6: "runtime"}


class FormatError(Exception):
    """The blob breaks a rule of the specification."""


def ensure(holds, what):
    if not holds:
        raise FormatError(what)


def unzstd(compressed, plain_len, limit):
    """Decompresses one frame that must have plain_len bytes, and never more than that."""
    ensure(plain_len <= limit, f"{plain_len} bytes are more than {limit}")
    with subprocess.Popen(["zstd", "-dc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        writer = threading.Thread(target=feed, args=(child.stdin, compressed))
        writer.start()
        plain = child.stdout.read(plain_len + 1)
        child.stdout.close()
        writer.join()
    ensure(len(plain) == plain_len, f"frame has not the {plain_len} bytes that it should")
    return plain


def feed(pipe, content):
    try:
        pipe.write(content)
        pipe.close()
    except BrokenPipeError:
        pass


class Layer:
    """A layer blob: footer, index, and the way from a file to its content."""

    def __init__(self, path):
        self.blob = open(path, "rb")
        self.blob_len = self.blob.seek(0, 2)
        self.read_index()
        self.read_records()
        self.decompressed = {}

    def at(self, offset, length):
        ensure(offset + length <= self.blob_len, "range lies outside the blob")
        self.blob.seek(offset)
        return self.blob.read(length)

    def read_index(self):
        frame = self.at(self.blob_len - FOOTER_LEN - 8, FOOTER_LEN + 8)  # [3]
        ensure(struct.unpack_from("<II", frame) == (FOOTER_MAGIC, FOOTER_LEN), "blob does not end with a footer")
        footer = frame[8:]
        magic, version, _, _, features, offset, compressed_len, plain_len = struct.unpack_from("<8sII5Q", footer)
        ensure(magic == b"LAZULIFT" and version == 1 and features == 0, "footer of another kind or version")
        ensure(zlib.crc32(footer[:124]) == struct.unpack_from("<I", footer, 124)[0], "footer has a wrong CRC-32")
        self.hot_offset, self.hot_len, self.dedup_offset, self.dedup_len = struct.unpack_from("<4Q", footer, 88)
        self.follows(0x184D2A51, offset, compressed_len)
        compressed = self.at(offset, compressed_len)
        ensure(hashlib.sha256(compressed).digest() == footer[56:88], "index has a wrong digest")  # [10]
        self.index_offset, self.index_end = offset, offset + compressed_len
        self.tar_len, self.space_len, self.sections = container(unzstd(compressed, plain_len, INDEX_LEN_MAX))

    def follows(self, magic, offset, length):
        """A skippable frame announces its content [2]."""
        ensure(struct.unpack("<II", self.at(offset - 8, 8)) == (magic, length), f"no frame {magic:x} at {offset - 8}")

    def records(self, kind, layout):
        return records_in(self.sections, kind, layout)

    def read_records(self):
        self.inodes = self.records(1, "<4IqIIQQ4I")
        self.dirents = self.records(2, "<II")
        self.names = self.sections.get(3, (1, b""))[1]
        self.strings = self.sections.get(4, (1, b""))[1]
        self.xattr_sets = self.records(5, "<II")
        self.xattrs = self.records(6, "<4I")
        self.extents = self.records(7, "<QQQ")
        self.frames = self.records(8, "<QQII32s")
        self.hot_frames = self.records(10, "<II32s")
        self.hot_pieces = self.records(11, "<QII")
        self.dedup = self.records(12, "<QQ32s")
        tar_end = blob_end = 0
        for blob_offset, tar_offset, compressed_len, plain_len, _ in self.frames:  # [6.5]
            ensure((blob_offset, tar_offset) == (blob_end, tar_end), "frames have a gap or overlap")
            blob_end, tar_end = blob_end + compressed_len, tar_end + plain_len
        ensure(tar_end == self.tar_len, "frames do not cover the tar stream")
        if not self.frames:  # [2.5]
            ensure(self.at(0, len(EMPTY_FRAME)) == EMPTY_FRAME, "blob does not begin with a frame")
            blob_end = len(EMPTY_FRAME)
        ensure(self.at(0, 4) == EMPTY_FRAME[:4], "blob does not begin with a frame")
        ensure(self.index_offset == blob_end + 8, "index is not behind the frames")  # [2.4]

    def children(self, inode):
        """Names and inode numbers of a directory [5.1, 5.2]."""
        first, count = self.inodes[inode][6], self.inodes[inode][7]
        for number in range(first, first + count):
            start = self.dirents[number][0]
            end = self.dirents[number + 1][0] if number + 1 < len(self.dirents) else len(self.names)
            yield self.names[start:end], self.dirents[number][1]

    def walk(self):
        """Every path below the root with its inode number, directories before what is in them."""
        pending = [(b"", 0)]
        while pending:
            path, inode = pending.pop()
            yield path or b"/", inode
            if inode != NONE and kind_of(self.inodes[inode]) == "directory":
                pending.extend(reversed([(path + b"/" + name, child) for name, child in self.children(inode)]))

    def frame(self, number):
        """The content of a frame, which is hashed before it is decompressed [10]."""
        if number not in self.decompressed:
            blob_offset, _, compressed_len, plain_len, digest = self.frames[number]
            compressed = self.at(blob_offset, compressed_len)
            ensure(hashlib.sha256(compressed).digest() == digest, f"frame {number} has a wrong digest")
            self.decompressed[number] = unzstd(compressed, plain_len, FRAME_PLAIN_LEN_MAX)
        return self.decompressed[number]

    def tar(self, offset, length):
        """Bytes of the tar stream."""
        pieces = []
        for number, (_, tar_offset, _, plain_len, _) in enumerate(self.frames):
            start, end = max(offset, tar_offset), min(offset + length, tar_offset + plain_len)
            if start < end:
                pieces.append(self.frame(number)[start - tar_offset:end - tar_offset])
        return b"".join(pieces)

    def content(self, inode):
        """The content of a regular file."""
        return self.plain(self.inodes[inode][8], self.inodes[inode][7])

    def plain(self, start, size):
        """A range of the plain address space: extents, and zeros where there are none [5.5]."""
        content = bytearray(size)
        for tar_offset, plain_offset, length in self.extents:
            first, last = max(plain_offset, start), min(plain_offset + length, start + size)
            if first < last:
                content[first - start:last - start] = self.tar(tar_offset + first - plain_offset, last - first)
        return bytes(content)

    def hot_pack(self):
        """The pieces of the hot pack [5.7, 5.8] with their bytes, which are those of the files."""
        ensure(sum(frame[0] for frame in self.hot_frames) == self.hot_len, "hot pack has another length")
        if self.hot_len:
            ensure(self.hot_offset == self.index_end + 8, "hot pack is not behind the index")
            self.follows(0x184D2A52, self.hot_offset, self.hot_len)
        offset, content = self.hot_offset, b""
        for compressed_len, plain_len, digest in self.hot_frames:
            compressed = self.at(offset, compressed_len)
            ensure(hashlib.sha256(compressed).digest() == digest, "hot frame has a wrong digest")
            content += unzstd(compressed, plain_len, FRAME_PLAIN_LEN_MAX)
            offset += compressed_len
        for plain_offset, length, reason in self.hot_pieces:
            piece, content = content[:length], content[length:]
            ensure(plain_offset % 4096 == 0 and piece == self.plain(plain_offset, length), "hot piece differs")
            yield plain_offset, REASONS.get(reason, "other"), piece
        ensure(not content, "hot frames are longer than the hot pieces")

    def dedup_pieces(self):
        """The pieces of the dedup section [5.9, 5.10], whose digests are those of the content."""
        for compressed_len, plain_len, digest in self.dedup:
            ensure(self.dedup_len == compressed_len, "dedup section has another length")
            end = self.hot_offset + self.hot_len if self.hot_len else self.index_end
            ensure(self.dedup_offset == end + 8, "dedup section is misplaced")
            self.follows(0x184D2A53, self.dedup_offset, compressed_len)
            compressed = self.at(self.dedup_offset, compressed_len)
            ensure(hashlib.sha256(compressed).digest() == digest, "dedup section has a wrong digest")
            _, _, sections = container(unzstd(compressed, plain_len, INDEX_LEN_MAX))
            end = 0
            for offset, length, digest in records_in(sections, 32, "<QQ32s"):
                ensure(end <= offset and 0 < length <= self.space_len - offset, "dedup piece out of order")
                ensure(hashlib.sha256(self.plain(offset, length)).digest() == digest, "dedup piece differs")
                yield offset, length, digest
                end = offset + length

    def describe(self, path, inode):
        """One line for a name: everything that the index says of it, as JSON."""
        line = {"path": path.decode("latin-1")}
        if inode == NONE:
            return json.dumps({**line, "type": "whiteout"})
        mode, uid, gid, nlink, seconds, nanoseconds, payload, size, _, xattrs, flags, _, _ = self.inodes[inode]
        kind = kind_of(self.inodes[inode])
        line.update(type=kind, mode=oct(mode & 0o7777), uid=uid, gid=gid, nlink=nlink, mtime=[seconds, nanoseconds])
        if kind == "file":
            line.update(size=size, sha256=hashlib.sha256(self.content(inode)).hexdigest())
        elif kind == "symlink":
            line.update(target=self.strings[payload:payload + size].decode("latin-1"))
        elif kind in ("block", "character"):
            line.update(device=[payload >> 8 & 0xFFF, payload & 0xFF | payload >> 12 & 0xFFF00])
        if flags:
            line.update(flags=[name for bit, name in enumerate(["implicit", "opaque"]) if flags >> bit & 1])
        if xattrs != NONE:
            first, count = self.xattr_sets[xattrs]
            line.update(xattrs={
                self.strings[name:name + name_len].decode("latin-1"): self.strings[value:value + value_len].hex()
                for name, name_len, value, value_len in self.xattrs[first:first + count]})
        return json.dumps(line)


def container(wire):
    """Undoes the wire form [4.3]; returns tar_len, space_len and the sections by kind [4.1, 4.2]."""
    index = bytearray(wire)
    magic, version, count, _, features, tar_len, space_len, length, _, crc = struct.unpack_from("<8sII5QII", index)
    ensure(magic == b"LAZULIDX" and version == 1 and features == 0, "index of another kind or version")
    ensure(length == len(index) and count <= 64, "index has another length or too many sections")
    ensure(zlib.crc32(index[:60] + index[64:64 + 32 * count]) == crc, "index header has a wrong CRC-32")
    sections = {}
    for number in range(count):
        kind, record_len, offset, length, crc, delta_words = struct.unpack_from("<IIQQII", index, 64 + 32 * number)
        ensure(offset % 8 == 0 and offset + length <= len(index) and length % record_len == 0, "misplaced section")
        section = bytes(index[offset:offset + length])
        if record_len > 1:
            section = bytes(records_of(section, record_len, delta_words))
        ensure(zlib.crc32(section) == crc, f"section {kind} has a wrong CRC-32")
        sections[kind] = (record_len, section)
    return tar_len, space_len, sections


def records_in(sections, kind, layout):
    """The records of a section [5] as tuples; empty if there is no such section."""
    record_len, section = sections.get(kind, (struct.calcsize(layout), b""))
    ensure(record_len == struct.calcsize(layout), f"section {kind} has records of another length")
    return list(struct.iter_unpack(layout, section))


def records_of(stored, record_len, delta_words):
    """Turns the columns of a section into records again [4.3]."""
    count = len(stored) // record_len
    records = bytearray(len(stored))
    for word in range(record_len // 4):
        columns = [stored[(4 * word + byte) * count:][:count] for byte in range(4)]
        previous = 0
        for number, parts in enumerate(zip(*columns)):
            value = int.from_bytes(bytes(parts), "little")
            if delta_words >> word & 1:
                value = previous = (value + previous) & 0xFFFFFFFF
            struct.pack_into("<I", records, number * record_len + 4 * word, value)
    return records


def kind_of(inode):
    return TYPES[inode[0] >> 12]


def main(arguments):
    if len(arguments) < 2:
        sys.exit(__doc__)
    command, layer = arguments[0], Layer(arguments[1])
    if command == "list":
        for path, inode in layer.walk():
            print(layer.describe(path, inode))
        for offset, reason, piece in layer.hot_pack():
            print(json.dumps({"hot": offset, "len": len(piece), "reason": reason,
                              "sha256": hashlib.sha256(piece).hexdigest()}))
        for offset, length, digest in layer.dedup_pieces():
            print(json.dumps({"dedup": offset, "len": length, "sha256": digest.hex()}))
    elif command == "cat":
        found = dict(layer.walk()).get(arguments[2].encode())
        ensure(found is not None, f"{arguments[2]} is not in the layer")
        sys.stdout.buffer.write(layer.content(found))
    elif command == "frames":
        for blob_offset, _, compressed_len, plain_len, digest in layer.frames:
            print(blob_offset, compressed_len, plain_len, "sha256:" + digest.hex())
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (FormatError, KeyError, IndexError, struct.error) as error:
        sys.exit(f"reader.py: {sys.argv[2]}: {error}")
