"""The header of a GGUF model file: what the model needs, and whether the file is whole.

Own code, because the file is not trusted: every length is checked against the file before anything is read by it,
and what is not needed (the vocabulary above all) is skipped. It knows nothing of engines and reads no tensor.
Source of the layout: the GGUF specification, ggml-org/ggml, docs/gguf.md.
"""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from llorch.errors import LaunchError

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_BUFFER_BYTES: Final = 1024 * 1024

# What no model comes near; a corrupt count must not keep us busy.
_MAX_KEYS: Final = 65_536
_MAX_KEY_BYTES: Final = 65_535
_MAX_TENSORS: Final = 262_144
_MAX_DIMENSIONS: Final = 8
_MAX_STRINGS: Final = 4_194_304
_MAX_FOUND: Final = 64
_MAX_LAYERS: Final = 16_384
_MAX_ALIGNMENT: Final = 1024 * 1024

_UINT32: Final = struct.Struct("<I")
_UINT64: Final = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_INTEGERS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_VALUE_BYTES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type, strings and arrays apart."""

_TENSOR_BLOCKS: Final = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
"""Elements and bytes of a block, by ggml's number of the type. Of newer types the size is not known."""

_NEEDED: Final = re.compile(
    rb"general\.(?:architecture|alignment)|split\.count|[\w-]{1,64}\.(?:context_length|block_count|embedding_length"
    rb"|attention\.(?:head_count|head_count_kv|key_length|value_length))"
)
_PART: Final = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_F16_BYTES: Final = 2


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the file tells of its model; 0 for a number that it does not tell. `file_bytes` is its size as found.

    `head_count_kv` is one number, or one for each layer. Lengths of keys and values are in elements per head.
    """

    architecture: str
    file_bytes: int
    context_length: int = 0
    """The tokens that the model was trained for."""
    block_count: int = 0
    embedding_length: int = 0
    head_count: int = 0
    head_count_kv: int | tuple[int, ...] = 0
    key_length: int = 0
    value_length: int = 0
    split_count: int = 1
    """Files that the model is spread over."""


def read_header(path: Path) -> GgufHeader:
    """Read the header and compare the file's size with its tensors. Blocks, for well below a second.

    Raises LaunchError when the file cannot be read, is no GGUF of version 2 or 3, is corrupt, or is cut off.
    """
    with _open(path) as (file, size):
        return _Reader(path, file, size).read()


def trained_context(path: Path) -> int | None:
    """The context that the model was trained for, in tokens; None where that cannot be read, or is not told."""
    try:
        return read_header(path).context_length or None
    except LaunchError:
        return None


def kv_bytes_per_token(header: GgufHeader) -> int:
    """Bytes of KV cache for one token of context, K and V in f16; 0 where the file does not tell.

    It is an upper bound: layers with a sliding window or a compressed cache need less.
    """
    heads = header.head_count_kv
    total = heads * header.block_count if isinstance(heads, int) else sum(heads[: header.block_count])
    return total * (header.key_length + header.value_length) * _F16_BYTES


def find_parts(path: Path) -> tuple[Path, ...]:
    """All files of a model that is spread over `…-00001-of-0000N.gguf`, by its name; else the file alone."""
    match = _PART.search(path.name)
    if match is None or not 1 < int(match["count"]) <= 999:
        return (path,)
    stem, count = path.name[: match.start()], int(match["count"])
    return tuple(path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1))


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file and its size. What the system refuses, also in the middle, becomes a LaunchError."""
    try:
        with path.open("rb", buffering=_BUFFER_BYTES) as file:
            size = file.seek(0, 2)
            file.seek(0)
            yield file, size
    except OSError as exc:
        raise LaunchError(f"The model file {path} cannot be read: {exc.strerror}.") from exc


@dataclass(slots=True)
class _Reader:
    """One pass over a header. `_at` is the place in the file; nothing is read beyond `size`."""

    path: Path
    file: BinaryIO
    size: int
    _at: int = field(default=0, init=False)
    _strings: int = field(default=0, init=False)
    _found: dict[str, int | tuple[int, ...] | str] = field(default_factory=dict, init=False)

    def read(self) -> GgufHeader:
        if self._take(4) != _MAGIC:
            raise LaunchError(f"{self.path} is not a GGUF model file: give the path of one.")
        version = self._uint32()
        if version not in _VERSIONS:
            raise LaunchError(f"{self.path} is GGUF of version {version}, not 2 or 3: convert it anew.")
        tensors = self._count(self._uint64(), _MAX_TENSORS, least_bytes=24, what="tensors")
        keys = self._count(self._uint64(), _MAX_KEYS, least_bytes=13, what="keys")
        for _ in range(keys):
            self._read_pair()
        self._check_tensors(tensors)
        return self._header()

    # ---- keys and values

    def _read_pair(self) -> None:
        length = self._uint64()
        if length > _MAX_KEY_BYTES:
            raise self._corrupt(f"a key of {length} bytes")
        key = self._take(length)
        kind = self._uint32()
        if _NEEDED.fullmatch(key):
            name = key.decode("ascii", "replace")
            self._found[name] = self._needed_value(name, kind)
            self._count(len(self._found), _MAX_FOUND, least_bytes=0, what="keys about the model's shape")
        else:
            self._skip_value(kind)

    def _needed_value(self, name: str, kind: int) -> int | tuple[int, ...] | str:
        if kind == _STRING:
            length = self._uint64()
            if length > _MAX_KEY_BYTES:
                raise self._corrupt(f"{name} has {length} bytes")
            return self._take(length).decode("utf-8", "replace")
        if kind == _ARRAY:
            element = self._uint32()
            count = self._count(self._uint64(), _MAX_LAYERS, least_bytes=1, what=f"elements in {name}")
            return tuple(self._integer(name, element) for _ in range(count))
        return self._integer(name, kind)

    def _integer(self, name: str, kind: int) -> int:
        if kind not in _INTEGERS:
            raise self._corrupt(f"{name} is not a whole number")
        value = int(struct.unpack(_INTEGERS[kind], self._take(_VALUE_BYTES[kind]))[0])
        if value < 0:
            raise self._corrupt(f"{name} is {value}")
        return value

    def _skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip(self._uint64())
        elif kind == _ARRAY:
            self._skip_array()
        elif kind in _VALUE_BYTES:
            self._skip(_VALUE_BYTES[kind])
        else:
            raise self._corrupt(f"a value of the unknown type {kind}")

    def _skip_array(self) -> None:
        element, count = self._uint32(), self._uint64()
        if element == _STRING:
            self._strings += self._count(count, _MAX_STRINGS - self._strings, least_bytes=8, what="strings")
            for _ in range(count):
                self._skip(self._uint64())
        elif element in _VALUE_BYTES:
            self._skip(count * _VALUE_BYTES[element])
        else:
            raise self._corrupt(f"an array of the type {element}")

    # ---- tensors

    def _check_tensors(self, count: int) -> None:
        """Whether the file is as long as its tensors say; their data begins behind the header, aligned."""
        end = max((self._read_tensor() for _ in range(count)), default=0)
        alignment = self._number("general.alignment", default=32)
        if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._corrupt(f"an alignment of {alignment}")
        needed = -(-self._at // alignment) * alignment + end
        if count and needed > self.size:
            raise LaunchError(
                f"{self.path} is cut off, with {self.size} of the {needed} bytes that its tensors need:"
                " copy or download it again."
            )

    def _read_tensor(self) -> int:
        """Where its data ends, from the beginning of all data. Of an unknown type only the beginning is known."""
        self._skip(self._uint64())
        dimensions = self._uint32()
        if dimensions > _MAX_DIMENSIONS:
            raise self._corrupt(f"a tensor of {dimensions} dimensions")
        shape = [self._uint64() for _ in range(dimensions)]
        kind, offset = self._uint32(), self._uint64()
        if kind not in _TENSOR_BLOCKS:
            return offset
        elements, block_bytes = _TENSOR_BLOCKS[kind]
        if shape and shape[0] % elements:
            raise self._corrupt(f"a tensor row of {shape[0]} elements in blocks of {elements}")
        total = 1
        for length in shape:
            total *= length
        return offset + total // elements * block_bytes

    # ---- the result

    def _header(self) -> GgufHeader:
        architecture = self._found.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            raise self._corrupt("no general.architecture")
        attention = f"{architecture}.attention."
        embedding = self._number(f"{architecture}.embedding_length")
        heads = self._numbers(f"{attention}head_count")
        head_count = heads if isinstance(heads, int) else max(heads, default=0)
        per_head = embedding // head_count if head_count else 0
        return GgufHeader(
            architecture=architecture,
            file_bytes=self.size,
            context_length=self._number(f"{architecture}.context_length"),
            block_count=self._number(f"{architecture}.block_count"),
            embedding_length=embedding,
            head_count=head_count,
            head_count_kv=self._numbers(f"{attention}head_count_kv", default=heads),
            key_length=self._number(f"{attention}key_length", default=per_head),
            value_length=self._number(f"{attention}value_length", default=per_head),
            split_count=max(1, self._number("split.count")),
        )

    def _number(self, name: str, default: int = 0) -> int:
        value = self._found.get(name, default)
        if not isinstance(value, int):
            raise self._corrupt(f"{name} is not a whole number")
        return value

    def _numbers(self, name: str, default: int | tuple[int, ...] = 0) -> int | tuple[int, ...]:
        value = self._found.get(name, default)
        if isinstance(value, str):
            raise self._corrupt(f"{name} is not a whole number")
        return value

    # ---- bytes

    def _uint32(self) -> int:
        return int(_UINT32.unpack(self._take(4))[0])

    def _uint64(self) -> int:
        return int(_UINT64.unpack(self._take(8))[0])

    def _take(self, count: int) -> bytes:
        self._advance(count)
        taken = self.file.read(count)
        if len(taken) != count:  # it became shorter since we looked
            raise self._cut_off()
        return taken

    def _skip(self, count: int) -> None:
        self._advance(count)
        self.file.seek(self._at)

    def _advance(self, count: int) -> None:
        if count > self.size - self._at:
            raise self._cut_off()
        self._at += count

    def _count(self, count: int, most: int, *, least_bytes: int, what: str) -> int:
        """The count, when so many could be there at all."""
        if count > most:
            raise self._corrupt(f"{count} {what}")
        if count * least_bytes > self.size - self._at:
            raise self._cut_off()
        return count

    def _cut_off(self) -> LaunchError:
        return LaunchError(
            f"{self.path} is cut off or corrupt: its header leads beyond its end at {self.size} bytes:"
            " copy or download it again."
        )

    def _corrupt(self, what: str) -> LaunchError:
        return LaunchError(f"{self.path} is corrupt, its header has {what}: copy or download it again.")
