# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Changes of bytes, and the pieces in which bytes may be received. The conversations call this.

    mutate(rng, data)
    for piece in pieces(rng, bytes(data)): ...
"""

import re

INTERESTING = [b"\r\n\r\n", b"\n\n", b"\r", b"\n", b"\0", b"\xff\xff\xff\xff", b":", b" ", b"\t", b",", b"0\r\n\r\n",
               b"-1", b"0x10", b"+5", b"99999999999999999999", b"Content-Length: 3\r\n",
               b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
               b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"HTTP/1.1 100 Continue\r\n\r\n",
               b"\r\n folded", b"\xc3\xa9\xed\xa0\x80"]
NUMBER = re.compile(rb"[0-9]+")


def mutate(rng, data):
    """Change data, a bytearray, in one place"""
    if not data:
        data += rng.choice(INTERESTING)
        return
    # Half of them where the first head is
    place = rng.randrange(min(len(data), rng.choice((400, len(data)))))
    end = min(len(data), place + rng.choice((1, 2, 4, 16, 300)))
    kind = rng.randrange(9)
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[place] = rng.choice((0, 1, 10, 13, 32, 127, 255))
    elif kind == 2:
        del data[place:end]
    elif kind == 3:
        data[place:place] = data[place:end]
    elif kind == 4:
        data[place:place] = rng.choice(INTERESTING)
    elif kind == 5:
        del data[place:]
    elif kind == 6:
        part = bytes(data[place:end])
        del data[place:end]
        other = rng.randrange(len(data) + 1)
        data[other:other] = part
    elif kind == 7:
        match = NUMBER.search(data, place)
        if match:
            value = int(match[0][:30])
            data[match.start():match.end()] = b"%d" % abs(rng.choice((value + 1, value - 1, value * 10, 0, 1 << 31, 1 << 64)))
    else:
        data[place:place] = bytes([data[place]]) * rng.choice((2, 5, 10, 10, 10, 1000, 1000, 70000))


def pieces(rng, data):
    """data as it may be received: as a whole, in a few pieces, or each byte alone"""
    chance = rng.random()
    if chance < 0.4:
        yield data
        return
    most = 1 if chance > 0.98 and len(data) < 300 else 1 + len(data) // int(1 + 4 * rng.random())
    while data:
        size = 1 + int(most * rng.random())
        yield data[:size]
        data = data[size:]
