"""A tiny writer of R's serialization (R internals, §1.8), as a second opinion on what reads it."""

import gzip
import lzma
import struct
import zlib

HEAD = b"X\n" + struct.pack(">iii", 2, 0x00020A01, 0x00020300)
END = struct.pack(">i", 0xFE)


def char(text):
    return struct.pack(">ii", 0x00040009, len(text)) + text.encode()


def strings(*texts):
    return struct.pack(">ii", 16, len(texts)) + b"".join(map(char, texts))


def tagged(name, value):
    return struct.pack(">ii", 0x402, 1) + char(name) + value


def integers(values, flags=0):
    return struct.pack(f">ii{len(values)}i", 13 | flags, len(values), *values)


def reals(values):
    return struct.pack(f">ii{len(values)}d", 14, len(values), *values)


def factor(codes, levels):
    attributes = tagged("levels", strings(*levels)) + tagged("class", strings("factor")) + END
    return integers([code + 1 for code in codes], 0x300) + attributes


def named(flags=0, /, *, more=b"", **values):
    body = struct.pack(">ii", 19 | 0x200 | flags, len(values)) + b"".join(values.values())
    return body + tagged("names", strings(*values)) + more + END


def frame(rows, **columns):
    about = tagged("class", strings("data.frame"))
    about += tagged("row.names", integers([-(2**31), -rows]))
    return named(0x100, more=about, **columns)


def rda(**objects):
    body = b"".join(tagged(name, value) for name, value in objects.items()) + END
    return lzma.compress(b"RDX2\n" + HEAD + body)


def database(**objects):
    """The index and the content of a lazy-load data base."""
    content, places = b"", {}
    for name, value in objects.items():
        data = HEAD + value
        packed = struct.pack(">i", len(data)) + zlib.compress(data)
        places[name] = integers([len(content), len(packed)])
        content += packed
    index = named(variables=named(**places), references=named(), compressed=integers([1]))
    return gzip.compress(HEAD + index), content
