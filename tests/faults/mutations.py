"""Sound files made unsound with an eye to what they are: trees of JSON and YAML, headers, arrays.

Every function takes the bytes of a sound file and a generator, and gives the bytes of a damaged one.
"""

import copy
import io
import json
import struct
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
import yaml
from faults.broken_images import MUTATIONS

Random = np.random.Generator
Mutate = Callable[[bytes, Random], bytes]

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2.5, -0.0, 2**31, 2**63, -(2**64), 10**300, 1e308, -1e308, 1e-300,
    float("nan"), float("inf"), float("-inf"), "", "x", "nan", "1e5", "0", "..", "../../../etc/passwd", "/dev/zero",
    "/dev/null", "\0", "a\0b", "\ud800", "\udcff", "line\nline\x1b[31m", "<script>", "{}", "[bold]x", "x" * 5000,
    [], {}, [[]], [{}], [None], [1, "a", None], {"": None}, {"a": {"b": []}}, [0] * 3, [1e999] * 3, [[1.0, "x"]],
)  # fmt: skip


def odd(random: Random) -> Any:
    return copy.deepcopy(ODD[int(random.integers(len(ODD)))])


def places(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value of a tree but the tree itself."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found: list[tuple[Any, ...]] = []
    for key, value in inside:
        found += [(*above, key), *places(value, (*above, key))]
    return found


def changed_number(value: Any, random: Random) -> Any:
    """A number near or far from this one; anything odd in place of what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return odd(random)
    ways = (lambda v: -v, lambda v: v + 1, lambda v: v - 1, lambda v: v * 10**6, float, str, lambda v: [v])
    return ways[int(random.integers(len(ways)))](value)


def change_tree(tree: Any, random: Random) -> Any:
    """A tree with one to three of its values replaced, dropped, moved, renamed or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(int(random.integers(1, 4))):
        paths = places(tree)
        if not paths or random.random() < 0.02:
            return odd(random)
        *above, last = paths[int(random.integers(len(paths)))]
        holder = tree
        for key in above:
            holder = holder[key]
        way = random.random()
        if way < 0.45:
            holder[last] = odd(random)
        elif way < 0.65:
            holder[last] = changed_number(holder[last], random)
        elif way < 0.8:
            del holder[last]
        elif way < 0.87:
            _add(holder, last, random)
        elif way < 0.94:  # another value of the tree in its place
            other: Any = tree
            for key in paths[int(random.integers(len(paths)))]:
                other = other[key] if isinstance(other, dict | list) and _has(other, key) else other
            holder[last] = copy.deepcopy(other)
        else:
            holder[last] = nested(holder[last], int(random.integers(1, 40)))
    return tree


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else isinstance(key, int) and key < len(holder)


def _add(holder: Any, last: Any, random: Random) -> None:
    if isinstance(holder, list):
        holder.append(copy.deepcopy(holder[last]))
    else:
        name = odd(random)
        holder[name if isinstance(name, str) else f"{last}s"] = holder.pop(last)


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def damage_json(data: bytes, random: Random) -> bytes:
    """JSON whose tree, or rarely whose text, is damaged."""
    if random.random() < 0.8:
        return json.dumps(change_tree(json.loads(data), random)).encode()
    return damage_text(data, random)


def damage_yaml(data: bytes, random: Random) -> bytes:
    if random.random() < 0.8:
        return yaml.safe_dump(change_tree(yaml.safe_load(data), random), sort_keys=False).encode(
            errors="replace"
        )
    return damage_text(data, random)


def damage_lines(data: bytes, random: Random) -> bytes:
    """JSON lines, a few of them damaged."""
    lines = data.splitlines(keepends=True)
    for place in random.choice(len(lines), int(random.integers(1, 4)), replace=False):
        lines[place] = damage_json(lines[place], random) + b"\n"
    return b"".join(lines)


def damage_text(data: bytes, random: Random) -> bytes:
    """Text that is not what its reader expects of any text."""
    ways: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: data + data,
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode(errors="replace").encode("utf-16"),
        lambda: data[: len(data) // 2] + b"\0" + data[len(data) // 2 :],
        lambda: data[: len(data) // 2] + b"\xff\xfe\xed\xa0\x80" + data[len(data) // 2 :],
        lambda: data.replace(b"\n", b"\r\n") + b"\x1a",
        lambda: data.replace(b":", b":\t", 1),
        lambda: b"[" * 100_000,
        lambda: b'{"a":' * 100_000,
        lambda: b"- " * 3000,
        lambda: b"{" * 3000,
        lambda: b"[" * 900 + b"]" * 900,
        lambda: b'{"a": ' + b"9" * 6000 + b"}",
        lambda: b"<!doctype html><title>404</title>",
        lambda: b'{"' + b"k" * (10_000_000 if random.random() < 0.02 else 100_000) + b'": 1}',
        lambda: _doubled(data),
    ]
    if random.random() < 0.4:
        return list(MUTATIONS.values())[int(random.integers(len(MUTATIONS)))](data or b"\n", random)
    return ways[int(random.integers(len(ways)))]()


def _doubled(data: bytes) -> bytes:
    """A mapping with a key that is there twice."""
    name = data.partition(b'"')[2].partition(b'"')[0]
    return data.replace(b"{", b'{"%b": 7, ' % name, 1)


def damage_bytes(data: bytes, random: Random) -> bytes:
    return list(MUTATIONS.values())[int(random.integers(len(MUTATIONS)))](data or b"\0", random)


def damage_arrays(data: bytes, random: Random) -> bytes:
    """An .npz with an array of other type, shape, length or values; or with objects in it, which numpy pickles."""
    if random.random() < 0.3:
        return damage_bytes(data, random)
    with np.load(io.BytesIO(data)) as file:
        arrays: dict[str, Any] = {name: file[name] for name in file.files}
    names = sorted(arrays)
    for _ in range(int(random.integers(1, 3))):
        name = names[int(random.integers(len(names)))]
        arrays[name] = _odd_array(arrays[name], random)
        if random.random() < 0.1:
            del arrays[name]
            names.remove(name)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _odd_array(array: Any, random: Random) -> Any:
    ways: list[Callable[[], Any]] = [
        lambda: array[:-1],
        lambda: array[:0],
        lambda: np.concatenate([array, array]),
        lambda: array.astype(np.float32),
        lambda: array.astype(np.int8),
        lambda: array.astype("U8"),
        lambda: array[None],
        lambda: np.array(3),
        lambda: np.array([{"a": 1}] * max(1, len(array)), dtype=object),
        lambda: np.full_like(array, -1) if array.dtype.kind in "iu" else array,
        lambda: np.full(array.shape, np.iinfo(np.int64).max),
        lambda: np.full(array.shape, np.nan),
        lambda: random.permutation(array),
        lambda: random.integers(-(2**40), 2**40, array.shape),
        lambda: random.integers(0, 2000, array.shape).astype(np.int64),
    ]
    try:
        return ways[int(random.integers(len(ways)))]()
    except (ValueError, TypeError, OverflowError, IndexError):
        return np.array(3)


# -- tar: a header is 512 bytes, its checksum made right again so that the lie is read

FIELDS = {
    "name": (0, 100), "mode": (100, 8), "owner": (108, 8), "group": (116, 8), "size": (124, 12), "time": (136, 12),
    "type": (156, 1), "link": (157, 100), "magic": (257, 6), "version": (263, 2), "major": (329, 8),
    "prefix": (345, 155),
}  # fmt: skip
TAR_VALUES = (
    b"", b"\0", b"0", b"-1", b"7" * 12, b"8", b"abc", b"\x80" + bytes(10) + b"\x01", b"\xff" * 12,
    b"\x80" + b"\xff" * 11,
    b"../../escaped", b"/tmp/fdkit-owned", b"a/../../../b", b"L", b"K", b"x", b"g", b"S", b"1", b"2", b"3", b"5", b"6",
    b"\xff\xfe.jpg", b"new\nline.jpg", b"\x1b[31m.jpg", b"n" * 99, b"00000000777\0", b"77777777777\0", b".jpg",
)  # fmt: skip

NAMES = (
    "../../out.jpg", "/etc/passwd.jpg", "a\nb.jpg", "\x1b[2J.jpg", "a/" * 60 + "b.jpg", ".jpg", "..", "", "train/x.jpg",
    "a.b.c.jpg", "\udcff.jpg", "x.cls", "x.json", "0/1.jpg", "a" * 300 + ".png",
)  # fmt: skip
RECORDS: tuple[dict[str, str], ...] = (
    {"size": "-5"}, {"size": "9" * 30}, {"path": "\0"}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
    {"GNU.sparse.map": "0,9999999999,x"}, {"GNU.sparse.size": "-1"}, {"mtime": "nan"}, {"uid": "x"},
)  # fmt: skip


def damage_tar(data: bytes, random: Random) -> bytes:
    """A tar with a lying header, a member of odd content or name, or damaged bytes."""
    way = random.random()
    if way < 0.2:
        return damage_bytes(data, random)
    if way < 0.6:
        return _lying_header(data, random)
    return _odd_member(data, random)


def _lying_header(data: bytes, random: Random) -> bytes:
    headers = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
    blocks = bytearray(data)
    for _ in range(int(random.integers(1, 3))):
        start = headers[int(random.integers(len(headers)))]
        offset, size = list(FIELDS.values())[int(random.integers(len(FIELDS)))]
        value = TAR_VALUES[int(random.integers(len(TAR_VALUES)))][:size].ljust(size, b"\0")
        blocks[start + offset : start + offset + size] = value
        blocks[start + 148 : start + 156] = b" " * 8
        blocks[start + 148 : start + 156] = b"%06o\0 " % (sum(blocks[start : start + 512]) % 8**6)
    return bytes(blocks)


def _odd_member(data: bytes, random: Random) -> bytes:
    """The same members but one, whose name, type or content is odd; PAX records lie too."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(member, archive.extractfile(member)) for member in archive.getmembers()]
        contents = [(member, file.read() if file else b"") for member, file in members]
    chosen = int(random.integers(len(contents)))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number, (member, content) in enumerate(contents):
            if number == chosen:
                content = _make_odd(member, content, random)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _make_odd(member: tarfile.TarInfo, content: bytes, random: Random) -> bytes:
    way = int(random.integers(6))
    if way == 0:
        member.name = NAMES[int(random.integers(len(NAMES)))]
    elif way == 1:
        kinds = (
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.BLKTYPE,
            tarfile.FIFOTYPE,
            tarfile.DIRTYPE,
        )
        member.type = kinds[int(random.integers(len(kinds)))]
        member.linkname = "../../../etc/passwd"
        return b""
    elif way == 2:
        member.pax_headers = dict(RECORDS[int(random.integers(len(RECORDS)))])
    elif member.name.endswith(".json"):
        return damage_json(content, random)
    elif member.name.endswith(".cls"):
        return damage_text(content, random) if random.random() < 0.5 else json.dumps(odd(random)).encode()
    else:
        return damage_bytes(content, random)
    return content


def damage_safetensors(data: bytes, random: Random) -> bytes:
    """A safetensors file whose header lies about what follows it."""
    if random.random() < 0.3:
        return damage_bytes(data, random)
    (length,) = struct.unpack("<Q", data[:8])
    header = damage_json(data[8 : 8 + length].rstrip(), random)
    stated = len(header) if random.random() < 0.9 else int(random.integers(0, 2 * len(header) + 2))
    return struct.pack("<Q", stated) + header + data[8 + length :]


BY_SUFFIX: dict[str, Mutate] = {
    ".json": damage_json,
    ".jsonl": damage_lines,
    ".yaml": damage_yaml,
    ".txt": damage_text,
    ".npz": damage_arrays,
    ".tar": damage_tar,
    ".safetensors": damage_safetensors,
}
"""How a file is damaged; any other byte by byte."""


def damage(name: str, data: bytes, random: Random) -> bytes:
    """A damaged form of a file, by its name."""
    suffix = name[name.rindex(".") :] if "." in name else ""
    return BY_SUFFIX.get(suffix, damage_bytes)(data, random)
