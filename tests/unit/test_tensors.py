"""The file of a part: laid out before it is copied, valid for the safetensors package, and read without trust."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from dtr.checkpoint import checksum
from dtr.checkpoint.format import copying, tensors
from dtr.checkpoint.format.tensors import Tensor
from dtr.errors import IntegrityError, InvalidInput

LEAVES = {
    "b": Tensor.of(np.arange(3, dtype=np.uint8)),
    "x": Tensor.of(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "d": Tensor.of(np.array(2.5)),
    "z": Tensor.of(np.zeros((0, 4))),
    "flag": Tensor.of(np.array([True, False])),
    "c": Tensor.of(np.array([1 + 2j])),
    "bf": Tensor(label="BF16", array=np.array([0x3F80, 0x7FC1], np.uint16)),
}


def written(leaves: dict[str, Tensor], metadata: dict[str, str] | None = None, *, threads: int = 1) -> bytearray:
    layout = tensors.arrange(leaves).layout(metadata or {})
    buffer = bytearray(layout.size_bytes)
    layout.copy_into(buffer, leaves, threads=threads)
    return buffer


def test_the_size_is_known_before_the_copy() -> None:
    """size_bytes is the file's exact size, header included, whatever the metadata."""
    arrangement = tensors.arrange(LEAVES)
    for metadata in ({}, {"a": "x"}, {"a": "x" * 1000, "ünï": "\n\"'"}):
        layout = arrangement.layout(metadata)
        buffer = bytearray(layout.size_bytes)
        layout.copy_into(buffer, LEAVES)
        assert tensors.read(buffer).metadata == metadata
        assert len(safetensors.numpy.load(bytes(written({"x": LEAVES["x"]}, metadata)))) == 1


def test_the_safetensors_package_opens_it(tmp_path: Any) -> None:
    """Names, dtypes (bfloat16 as well), shapes, bytes and metadata, by the reference implementation."""
    path = tmp_path / "part.safetensors"
    path.write_bytes(written(LEAVES, {"dtr": "{}"}))
    with safetensors.safe_open(path, "numpy") as opened:
        assert opened.metadata() == {"dtr": "{}"}
        assert set(opened.keys()) == set(LEAVES)
        assert {name: opened.get_slice(name).get_dtype() for name in LEAVES} == {name: tensor.label for name, tensor in LEAVES.items()}
        assert {name: tuple(opened.get_slice(name).get_shape()) for name in LEAVES} == {name: t.shape for name, t in LEAVES.items()}
        for name in set(LEAVES) - {"bf"}:
            assert opened.get_tensor(name).tobytes() == LEAVES[name].array.tobytes()


def test_data_is_aligned() -> None:
    """The data begins at a multiple of 64, and each array at a multiple of its alignment, in any order of sizes."""
    buffer = np.zeros(100_000, np.uint8)
    start = -buffer.ctypes.data % 64
    for metadata in ({"a": "x" * n} for n in range(70)):
        layout = tensors.arrange(LEAVES).layout(metadata)
        assert len(layout.header) % 64 == 0
        view = buffer[start : start + layout.size_bytes]
        layout.copy_into(view, LEAVES)
        assert all(tensor.array.flags.aligned for tensor in tensors.read(view).tensors.values())


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_layout_is_copied_bit_by_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous, transposed, strided, broadcast, reversed, byte-swapped and padded arrays, in threads and in pieces."""
    for name in ("LARGE_BYTES", "_PIECE_BYTES", "_WORTH_THREADS_BYTES"):
        monkeypatch.setattr(copying, name, 1000)
    base = np.random.default_rng(0).integers(0, 256, 40_000, dtype=np.uint8)
    arrays: dict[str, NDArray[Any]] = {
        "plain": base.view(np.float64),
        "transposed": base.view(np.float32).reshape(100, 100).T,
        "strided": base.view(np.int16)[1::3],
        "reversed": base[::-1],
        "broadcast": np.broadcast_to(base[:7], (50, 7)),
        "swapped": base.view(">c16")[::2],
        "void": base.view("V5")[::-2],
        "padded": np.zeros(3, np.dtype([("a", "u1"), ("b", "f8")], align=True))[::2],
    }
    leaves = {name: Tensor.of(array) for name, array in arrays.items()}
    found = tensors.read(written(leaves, threads=threads)).tensors
    for name, array in arrays.items():
        opaque = array.view(f"V{array.itemsize}")  # numpy's own copies skip the padding of a structure
        assert found[name].array.tobytes() == opaque.tobytes(), name


def test_a_signalling_nan_survives_a_strided_copy() -> None:
    """No floating-point instruction touches the bits."""
    bits = np.array([0x7FA00001, 0xFF800001, 0x7FC12345, 0x80000000] * 2, np.uint32)
    found = tensors.read(written({"x": Tensor.of(bits.view(np.float32)[::2])})).tensors["x"].array
    assert found.view(np.uint32).tolist() == bits[::2].tolist()


def test_leaves_must_be_those_that_were_arranged() -> None:
    """A changed structure is refused before a byte is written."""
    layout = tensors.arrange(LEAVES).layout({})
    buffer = bytearray(layout.size_bytes)
    for leaves in (
        {name: tensor for name, tensor in LEAVES.items() if name != "x"},
        {**LEAVES, "more": LEAVES["x"]},
        {("y" if name == "x" else name): tensor for name, tensor in LEAVES.items()},
        {**LEAVES, "x": Tensor.of(np.zeros(7, np.float32))},
    ):
        with pytest.raises(InvalidInput, match="arranged"):
            layout.copy_into(buffer, leaves)
    assert not any(buffer)


def test_the_buffer_must_hold_it() -> None:
    """Too short or read-only memory is refused; longer memory is left alone behind the file."""
    layout = tensors.arrange(LEAVES).layout({})
    for buffer in (bytearray(layout.size_bytes - 1), bytes(layout.size_bytes)):
        with pytest.raises(InvalidInput, match="buffer"):
            layout.copy_into(buffer, LEAVES)
    longer = bytearray(b"\xaa" * (layout.size_bytes + 100))
    layout.copy_into(longer, LEAVES)
    assert longer[layout.size_bytes :] == b"\xaa" * 100


def test_an_arrangement_can_be_kept() -> None:
    """The next save of the same structure needs only its own metadata and bytes."""
    arrangement = tensors.arrange(LEAVES)
    later = {name: Tensor(label=tensor.label, array=tensor.array.copy()) for name, tensor in LEAVES.items()}
    later["x"].array[:] = 9
    layout = arrangement.layout({"step": "2"})
    buffer = bytearray(layout.size_bytes)
    layout.copy_into(buffer, later)
    assert buffer == written(later, {"step": "2"})


def test_a_reserved_name() -> None:
    """The one name that the format keeps for itself."""
    with pytest.raises(InvalidInput, match="__metadata__"):
        tensors.arrange({"__metadata__": LEAVES["x"]})


def test_no_tensors_at_all() -> None:
    """A state of scalars only is a valid file, too."""
    buffer = written({}, {"dtr": "1"})
    assert tensors.read(buffer).tensors == {}
    assert safetensors.numpy.load(bytes(buffer)) == {}


def test_a_file_of_the_package_is_read() -> None:
    """What others wrote: another order, no alignment, no metadata."""
    arrays: dict[str, NDArray[Any]] = {
        "a": np.arange(3, dtype=np.uint8),
        "b": np.arange(4, dtype=np.float64),
        "c": np.zeros((2, 0), np.int16),
    }
    found = tensors.read(safetensors.numpy.save(arrays))
    assert found.metadata == {}
    assert {name: tensor.array.tolist() for name, tensor in found.tensors.items()} == {
        name: array.tolist() for name, array in arrays.items()
    }


# --- damaged and hostile files ---


def forged(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE: list[tuple[str, Callable[[], bytes]]] = [
    ("empty", lambda: b""),
    ("seven bytes", lambda: b"\1" * 7),
    ("no header", lambda: bytes(8)),
    ("header of one", lambda: forged(b"{")),
    ("header longer than the file", lambda: forged({}, length=1000)),
    ("header of 2**64 - 1", lambda: forged({}, length=2**64 - 1)),
    ("no JSON", lambda: forged(b"{nonsense}")),
    ("no object", lambda: forged([1])),
    ("deep", lambda: forged(b"[" * 50_000)),
    ("not UTF-8", lambda: forged(b'{"\xff": 1}')),
    ("metadata no object", lambda: forged({"__metadata__": []})),
    ("metadata no text", lambda: forged({"__metadata__": {"a": 1}})),
    ("entry no object", lambda: forged({"a": 1})),
    ("entry lacks shape", lambda: forged({"a": {"dtype": "U8", "data_offsets": [0, 0]}})),
    ("entry has more", lambda: forged({"a": {**entry(), "more": 1}}, bytes(4))),
    ("unknown dtype", lambda: forged({"a": entry("F128")}, bytes(4))),
    ("dtype no text", lambda: forged({"a": entry(7)}, bytes(4))),
    ("negative dimension", lambda: forged({"a": entry(shape=[-4])}, bytes(4))),
    ("two negative dimensions", lambda: forged({"a": entry(shape=[-2, -2])}, bytes(4))),
    ("dimension no integer", lambda: forged({"a": entry(shape=[4.0])}, bytes(4))),
    ("shape no list", lambda: forged({"a": entry(shape=4)}, bytes(4))),
    ("too many dimensions", lambda: forged({"a": entry(shape=[1] * 65, offsets=[0, 1])}, bytes(1))),
    ("shape larger than its bytes", lambda: forged({"a": entry(shape=[5])}, bytes(4))),
    ("shape of 10**30", lambda: forged({"a": entry(shape=[10**30])}, bytes(4))),
    ("empty shape of 2**62", lambda: forged({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])})),
    ("offsets backwards", lambda: forged({"a": entry(offsets=[4, 0])}, bytes(4))),
    ("offsets negative", lambda: forged({"a": entry(offsets=[-4, 0])}, bytes(4))),
    ("offsets of one", lambda: forged({"a": entry(offsets=[0])}, bytes(4))),
    ("offsets beyond the file", lambda: forged({"a": entry(shape=[8], offsets=[0, 8])}, bytes(4))),
    ("10**15 bytes", lambda: forged({"a": entry(shape=[10**15], offsets=[0, 10**15])}, bytes(4))),
    ("overlap", lambda: forged({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6))),
    ("the same bytes twice", lambda: forged({"a": entry(), "b": entry()}, bytes(4))),
    ("hole", lambda: forged({"a": entry(), "b": entry(offsets=[6, 10])}, bytes(10))),
    ("hole in front", lambda: forged({"a": entry(offsets=[2, 6])}, bytes(6))),
    ("bytes behind", lambda: forged({"a": entry()}, bytes(5))),
    ("one byte short", lambda: bytes(written(LEAVES)[:-1])),
    ("one byte more", lambda: bytes(written(LEAVES) + b"\0")),
]


@pytest.mark.parametrize("make", [make for _, make in HOSTILE], ids=[name for name, _ in HOSTILE])
def test_hostile_files_are_refused(make: Callable[[], bytes]) -> None:
    """Each is an IntegrityError, and no memory is allocated for what a file only declares."""
    with pytest.raises(IntegrityError, match="not a valid part"):
        tensors.read(make())


# --- checksum ---


def test_the_checksum_is_crc64nvme() -> None:
    """The check value of the catalogue of CRCs, and the empty one."""
    assert checksum.of(b"123456789") == "crc64nvme:ae8b14860a799888"
    assert checksum.of(b"") == "crc64nvme:0000000000000000"


def test_a_running_checksum() -> None:
    """In pieces of any size, and of any contiguous buffer, it is that of the whole."""
    content = np.random.default_rng(1).integers(0, 2**63, 5_000_000, dtype=np.int64)
    running = checksum.Running()
    for start in range(0, content.nbytes, 7_000_001):
        running.update(content.data.cast("B")[start : start + 7_000_001])
    assert running.text == checksum.of(content) == checksum.of(content.tobytes())


@pytest.mark.parametrize("value", ["crc64nvme:ae8b14860a799888"])
def test_how_a_checksum_is_written(value: str) -> None:
    """Exactly so."""
    assert checksum.is_checksum(value)
    for other in (value.upper(), value[:-1], value + "0", value + "\n", "sha256:" + value, None, 7, value.encode()):
        assert not checksum.is_checksum(other)
