"""Valid bytes made invalid: flips, cuts, splices, and changes inside JSON."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

from hypothesis import strategies as st

#: Values that stand where others belong.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 63, 64, 2**31 - 1, 2**31, -(2**31), 2**63, 10**30, 0.5, -0.0, float("inf"),
    float("nan"), "", "x", "0", "\0", "\ud800", "\x1b[2J", "../../x", "x" * 5000, [], {}, [None], [[]], {"": None},
    "deep 900", "deep 5000",
)  # fmt: skip
#: A text ``deep N`` becomes a list nested so deeply, which cannot be built here.
_DEPTHS = (900, 5000)
_BYTES = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b'"', b"{", b"}", b"[" * 3000, b"9" * 5000, b"\x80\x04.", b"null")


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the seeds after one to four mutations."""
    return mutate(draw(st.randoms(use_true_random=False)), seeds)


def mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    """See :func:`mutated`."""
    data = rng.choice(seeds)
    for _ in range(rng.randint(1, 4)):
        data = rng.choice((_flip, _cut, _splice, _insert, _json, _json, _json, _header))(rng, data, seeds)
    return data


def _flip(rng: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    begin, end = sorted(rng.randint(0, len(data)) for _ in range(2))
    return rng.choice((data[:end], data[begin:], data[:begin] + data[end:]))


def _splice(rng: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    other = rng.choice(seeds)
    begin, end = sorted(rng.randint(0, len(other)) for _ in range(2))
    place = rng.randint(0, len(data))
    return data[:place] + other[begin:end] + data[place:]


def _insert(rng: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    place = rng.randint(0, len(data))
    return data[:place] + rng.choice(_BYTES) + data[place:]


def _json(rng: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    """Another value, name or length somewhere in one of the JSON texts, one a line or one in all."""
    lines = [data] if _parsed(data) is not None else data.split(b"\n")
    place = rng.randrange(len(lines))
    value = _parsed(lines[place])
    if value is None:
        return data
    lines[place] = _written(_changed(rng, value))
    return b"\n".join(lines)


def _header(rng: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    """Another header of a safetensors file, with its length."""
    if len(data) < 8:
        return data
    (size,) = struct.unpack("<Q", data[:8])
    value = _parsed(data[8 : 8 + size]) if size < len(data) else None
    if value is None:
        return data
    header = _written(_changed(rng, value))
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _written(value: Any) -> bytes:
    text = json.dumps(value)
    for depth in _DEPTHS:
        text = text.replace(f'"deep {depth}"', "[" * depth + "]" * depth)
    return text.encode()


def _changed(rng: random.Random, value: Any) -> Any:
    """The value with one change at a random place inside."""
    odd = rng.choice(ODD)
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return odd
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, kind = rng.choice(keys), rng.random()
    if kind < 0.6:
        value[key] = _changed(rng, value[key])
    elif kind < 0.75:
        del value[key]
    elif kind < 0.9:
        value[key] = value[rng.choice(keys)] if kind < 0.85 else odd
    elif isinstance(value, dict):
        value[rng.choice(("x", str(key) + "x", ""))] = value.pop(key)
    else:
        value.append(value[key])
    return value
