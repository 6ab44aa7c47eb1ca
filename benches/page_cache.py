"""What of a directory's files is in the page cache: for benches/hot_set.

page_cache.py ROOT                 a line for each file with pages there: path, and page numbers
page_cache.py --compare HOT PAGES  pages touched, hot, and both; HOT as the example hot_set prints it
"""

import ctypes
import os
import stat
import sys

PAGE = 4096
PROT_READ, MAP_SHARED = 1, 1

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def cached_pages(path, size):
    descriptor = os.open(path, os.O_RDONLY)
    address = libc.mmap(None, size, PROT_READ, MAP_SHARED, descriptor, 0)
    os.close(descriptor)
    resident = ctypes.create_string_buffer((size + PAGE - 1) // PAGE)
    if libc.mincore(address, size, resident) != 0:
        raise OSError(ctypes.get_errno(), "mincore", path)
    libc.munmap(address, size)
    return [page for page, byte in enumerate(resident.raw) if byte & 1 and page * PAGE < size]


def show(root):
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) and status.st_size > 0:
                pages = cached_pages(path, status.st_size)
                if pages:
                    print(path[len(root):], " ".join(map(str, pages)), sep="\t")


def compare(hot_file, touched_file):
    hot = {}
    for line in open(hot_file):
        _, path, ranges = line.rstrip("\n").split("\t")
        pages = hot.setdefault(path, set())
        for start, end in (map(int, pair.split("-")) for pair in ranges.split()):
            pages.update(range(start // PAGE, (end + PAGE - 1) // PAGE))
    touched = {}
    for line in open(touched_file):
        path, pages = line.rstrip("\n").split("\t")
        touched[path] = set(map(int, pages.split()))
    both = sum(len(pages & hot.get(path, set())) for path, pages in touched.items())
    print(sum(map(len, touched.values())), sum(map(len, hot.values())), both)


if sys.argv[1] == "--compare":
    compare(*sys.argv[2:4])
else:
    show(sys.argv[1])
