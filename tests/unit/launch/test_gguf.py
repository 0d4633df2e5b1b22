"""The header of a GGUF file: what is read of whole ones, and that nothing but LaunchError comes of broken ones."""

import struct
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llorch.errors import LaunchError
from llorch.launch.gguf import GgufHeader, find_parts, kv_bytes_per_token, read_header
from llorch.launch.model_file import locate_demo_model

TINY_MODEL = Path(__file__).resolve().parents[3] / ".cache" / "models" / "tiny.gguf"
UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9
F32, Q4_1 = 0, 3
SHARED_PATH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=2000)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def string(key: str, value: str) -> bytes:
    return text(key) + struct.pack("<I", STRING) + text(value)


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", UINT32, value)


def numbers(key: str, values: Sequence[int]) -> bytes:
    return text(key) + struct.pack("<IIQ", ARRAY, UINT32, len(values)) + struct.pack(f"<{len(values)}I", *values)


def tensor(name: str, shape: Sequence[int], *, kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(pairs: Sequence[bytes], tensors: Sequence[bytes] = (), *, version: int = 3, data: int = 0) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32 + data)


LLAMA = (
    string("general.architecture", "llama"),
    number("llama.context_length", 4096),
    number("llama.block_count", 4),
    number("llama.embedding_length", 512),
    number("llama.attention.head_count", 8),
)


def read(path: Path, content: bytes) -> GgufHeader:
    path.write_bytes(content)
    return read_header(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


# ---- whole files


def test_tiny_model_is_read() -> None:
    header = read_header(TINY_MODEL)
    assert header == GgufHeader(
        architecture="llama",
        file_bytes=TINY_MODEL.stat().st_size,
        context_length=2048,
        block_count=2,
        embedding_length=64,
        head_count=4,
        head_count_kv=2,
        key_length=16,
        value_length=16,
    )
    assert kv_bytes_per_token(header) == 2 * 2 * (16 + 16) * 2


def test_demonstration_model_is_read() -> None:
    header = read_header(locate_demo_model())
    assert (header.architecture, header.context_length, header.block_count) == ("llama", 8192, 30)
    assert (header.head_count, header.head_count_kv, header.key_length) == (9, 3, 64)
    assert kv_bytes_per_token(header) == 30 * 3 * (64 + 64) * 2


def test_keys_may_stand_in_any_order(path: Path) -> None:
    assert read(path, gguf(LLAMA[::-1])).context_length == 4096


def test_every_head_has_its_own_kv_where_nothing_else_is_told(path: Path) -> None:
    header = read(path, gguf(LLAMA))
    assert (header.head_count_kv, header.key_length, header.value_length) == (8, 64, 64)
    assert kv_bytes_per_token(header) == 4 * 8 * 128 * 2


def test_lengths_that_are_told_win(path: Path) -> None:
    told = (number("llama.attention.key_length", 192), number("llama.attention.value_length", 128))
    assert kv_bytes_per_token(read(path, gguf((*LLAMA, *told)))) == 4 * 8 * 320 * 2


def test_layers_may_differ_in_their_heads(path: Path) -> None:
    header = read(path, gguf((*LLAMA, numbers("llama.attention.head_count_kv", (2, 0, 2, 0)))))
    assert header.head_count_kv == (2, 0, 2, 0)
    assert kv_bytes_per_token(header) == 4 * 128 * 2


def test_what_the_file_does_not_tell_is_zero(path: Path) -> None:
    header = read(path, gguf([string("general.architecture", "mystery")]))
    assert (header.context_length, header.block_count, header.key_length) == (0, 0, 0)
    assert kv_bytes_per_token(header) == 0


def test_other_values_of_every_kind_are_skipped(path: Path) -> None:
    kinds = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    scalars = [text(f"x.{kind}") + struct.pack(f"<I{code}", kind, 1) for kind, code in kinds.items()]
    arrays = [text(f"y.{kind}") + struct.pack(f"<IIQ2{code}", ARRAY, kind, 2, 1, 1) for kind, code in kinds.items()]
    words = text("tokenizer.ggml.tokens") + struct.pack("<IIQ", ARRAY, STRING, 2) + text("a") + text("")
    header = read(path, gguf((*scalars, *arrays, words, string("z", "…"), *LLAMA)))
    assert header.context_length == 4096


def test_version_2_is_read(path: Path) -> None:
    assert read(path, gguf(LLAMA, version=2)).architecture == "llama"


def test_size_of_a_tensor_of_an_unknown_type_is_not_guessed(path: Path) -> None:
    assert read(path, gguf(LLAMA, [tensor("t", (1 << 40,), kind=999)])).architecture == "llama"


def test_parts_of_a_model_are_found_by_name(tmp_path: Path) -> None:
    assert find_parts(tmp_path / "a-00002-of-00003.gguf") == tuple(
        tmp_path / f"a-0000{number}-of-00003.gguf" for number in (1, 2, 3)
    )
    for name in ("a.gguf", "a-00001-of-00001.gguf", "a-00001-of-99999.gguf"):
        assert find_parts(tmp_path / name) == (tmp_path / name,)


# ---- broken files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off or corrupt: its header leads beyond its end at 0 bytes: copy or download it again"),
        (b"PK\x03\x04 no model at all", "is not a GGUF model file"),
        (gguf(LLAMA, version=1), "GGUF of version 1, not 2 or 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "GGUF of version 50331648"),
        (gguf([]), r"no general\.architecture"),
        (gguf([number("general.architecture", 1)]), r"no general\.architecture"),
        (gguf([string("general.architecture", "")]), r"no general\.architecture"),
        (gguf((*LLAMA, number("general.alignment", 0))), "an alignment of 0"),
        (gguf((*LLAMA, number("general.alignment", 48))), "an alignment of 48"),
        (gguf((*LLAMA, string("llama.context_length", "4k"))), "context_length is not a whole number"),
        (gguf((*LLAMA, string("llama.attention.head_count_kv", "4"))), "head_count_kv is not a whole number"),
        (gguf((*LLAMA, numbers("llama.block_count", [4]))), "block_count is not a whole number"),
        (gguf((*LLAMA, text("llama.block_count") + struct.pack("<Ii", INT32, -4))), "block_count is -4"),
        (gguf((*LLAMA, text("llama.block_count") + struct.pack("<If", FLOAT32, 4))), "is not a whole number"),
        (gguf((*LLAMA, text("x") + struct.pack("<I", 13))), "a value of the unknown type 13"),
        (gguf((*LLAMA, text("x") + struct.pack("<IIQ", ARRAY, ARRAY, 1))), "an array of the type 9"),
        (gguf([text(bytes(70_000))]), "a key of 70000 bytes"),
        (gguf([number(f"a{n}.block_count", 1) for n in range(65)]), "65 keys about the model's shape"),
        (gguf(LLAMA, [tensor("t", (1,) * 9)], data=4), "a tensor of 9 dimensions"),
        (gguf(LLAMA, [tensor("t", (33,), kind=Q4_1)], data=40), "a tensor row of 33 elements in blocks of 32"),
    ],
)
def test_broken_header_is_refused_with_the_reason(path: Path, content: bytes, message: str) -> None:
    with pytest.raises(LaunchError, match=rf"{path}.*{message}"):
        read(path, content)


@pytest.mark.parametrize("length", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_lengths_are_never_trusted(path: Path, length: int) -> None:
    """Not for memory, and not for time: the file could not hold that much."""
    claims = [
        text("x") + struct.pack("<IQ", STRING, length),
        text("x") + struct.pack("<IIQ", ARRAY, STRING, length),
        text("x") + struct.pack("<IIQ", ARRAY, UINT32, length),
        text("llama.attention.head_count_kv") + struct.pack("<IIQ", ARRAY, UINT32, length),
        string("general.architecture", "")[:-8] + struct.pack("<Q", length),
    ]
    for claim in claims:
        with pytest.raises(LaunchError, match="corrupt"):
            read(path, gguf([claim]))
    for tensors, pairs in ((length, 0), (0, length)):
        with pytest.raises(LaunchError, match="corrupt"):
            read(path, b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs))


def test_missing_tensor_data_is_told_with_both_sizes(path: Path) -> None:
    """A download that broke off is found before the engine is started with it."""
    whole = gguf(LLAMA, [tensor("a", (64, 2)), tensor("b", (64,), kind=Q4_1, offset=512)], data=512 + 40)
    assert read(path, whole).architecture == "llama"
    with pytest.raises(LaunchError, match=rf"is cut off, with {len(whole) - 1} of the {len(whole)} bytes"):
        read(path, whole[:-1])


def test_file_that_is_not_there_or_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"absent\.gguf cannot be read: No such file"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(LaunchError, match="cannot be read: Is a directory"):
        read_header(tmp_path)


def test_every_truncation_of_the_tiny_model_is_found(path: Path) -> None:
    """In the header, in the vocabulary, and in the tensors."""
    whole = TINY_MODEL.read_bytes()
    lengths = {0, 3, 4, 7, 8, 23, 24, 25, len(whole) // 3, len(whole) // 2, len(whole) - 1}
    lengths |= set(range(0, len(whole), len(whole) // 16))
    for length in sorted(lengths):
        with pytest.raises(LaunchError, match="cut off"):
            read(path, whole[:length])


def test_every_truncation_of_the_demonstration_model_is_found(path: Path) -> None:
    whole = locate_demo_model()
    size = whole.stat().st_size
    with whole.open("rb") as source, path.open("wb") as copy:
        copy.write(source.read(4_000_000))
        copy.truncate(size)  # the rest is never read
    assert read_header(path) == read_header(whole)
    for length in (size - 1, size // 2, 4_000_000, 1_785_664, 1_785_000, 1_000_000, 100_000, 1000, 100, 10):
        with path.open("r+b") as copy:
            copy.truncate(length)
        with pytest.raises(LaunchError, match="cut off"):
            read_header(path)


SMALL = gguf(
    (*LLAMA, numbers("llama.attention.head_count_kv", (2, 2, 2, 2)), string("general.name", "small")),
    [tensor("a", (64, 2)), tensor("b", (64,), kind=Q4_1, offset=512)],
    data=552,
)


@SHARED_PATH
@given(flips=st.lists(st.tuples(st.integers(0, len(SMALL) - 553), st.integers(1, 255)), min_size=1, max_size=8))
def test_flipped_bytes_make_a_header_or_a_launch_error(path: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(SMALL)
    for place, mask in flips:
        content[place] ^= mask
    expect_header_or_launch_error(path, bytes(content))


@SHARED_PATH
@given(tail=st.binary(max_size=400), kept=st.integers(0, 200))
def test_random_bytes_make_a_header_or_a_launch_error(path: Path, tail: bytes, kept: int) -> None:
    expect_header_or_launch_error(path, SMALL[:kept] + tail)


@settings(SHARED_PATH, max_examples=10)
@given(place=st.one_of(st.integers(0, 1200), st.integers(0, 1_770_303)), mask=st.integers(1, 255))
def test_flipped_byte_in_a_real_header_is_survived_quickly_in_little_memory(path: Path, place: int, mask: int) -> None:
    content = bytearray(TINY_MODEL.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)
    del content
    tracemalloc.start()
    began = time.monotonic()
    try:
        read_header(path)
    except LaunchError:
        pass
    took_s, (_, peak) = time.monotonic() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took_s < 10  # with the tracing, which is what takes long
    assert peak < 16 * 1024 * 1024


def expect_header_or_launch_error(path: Path, content: bytes) -> None:
    try:
        header = read(path, content)
    except LaunchError:
        return
    assert kv_bytes_per_token(header) >= 0
    assert header.architecture
