"""The demo's data: the sources of Python's standard library as flat files of bytes, cut into numbered samples of one length.

Guarantees: files hold whole samples only, so that they can be registered as they are; the same library gives the same bytes. Each sample
begins with its own number, so that whoever is given one knows which it is without asking who gave it. Samples lie in a random order,
always the same, so that those which follow each other in a file are not of one module.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dtr.errors import Unavailable

__all__ = ["COLUMN", "DATASET", "NUMBER_BYTES", "Corpus", "library", "numbered", "sources", "split", "write_corpus"]

Bytes = NDArray[np.uint8]

DATASET: Final = "stdlib"
COLUMN: Final = "tokens"  # what flat files have
NUMBER_BYTES: Final = 4
_NUMBER: Final = np.dtype("<u4")
_SEED: Final = 7
_NOT_READ: Final = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What was written: ``sources`` modules were read into ``files`` files that hold ``samples`` samples, numbered from 0."""

    folder: Path
    sources: int
    files: int
    samples: int


def library() -> Path:
    """Where this Python has its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def sources(folder: Path) -> Iterator[Path]:
    """The Python files below ``folder``, in one order everywhere; tests and installed packages are left out."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _NOT_READ)
        yield from (Path(here, name) for name in sorted(files) if name.endswith(".py"))


def write_corpus(target: Path, *, source: Path, text_bytes: int, file_samples: int, samples: int) -> Corpus:
    """Write the sources below ``source`` into ``target``, file after file, until ``samples`` are there.

    Args:
        target: a folder, made if absent.
        source: the library.
        text_bytes: length of the text in a sample, its number excepted.
        file_samples: samples in one file; the last one may have fewer.
        samples: how many are wanted; there are fewer if the library is smaller.

    Raises:
        Unavailable: there is not even one sample to be had.
    """
    target.mkdir(parents=True, exist_ok=True)
    text = bytearray()
    read = 0
    for path in sources(source):
        if len(text) >= samples * text_bytes:
            break
        text += path.read_bytes()
        read += 1
    found = min(len(text) // text_bytes, samples)
    if found == 0:
        raise Unavailable(f"there are no Python sources in {source}: install the standard library's sources to run the demo")
    texts = np.frombuffer(text, dtype=np.uint8, count=found * text_bytes).reshape(found, text_bytes)
    rows = numbered(texts[np.random.Generator(np.random.PCG64(_SEED)).permutation(found)])
    files = range(0, found, file_samples)
    for number, begin in enumerate(files):
        (target / f"{DATASET}-{number:03d}.bin").write_bytes(rows[begin : begin + file_samples].tobytes())
    return Corpus(folder=target, sources=read, files=len(files), samples=found)


def numbered(text: Bytes) -> Bytes:
    """Texts, one a row, each behind its number."""
    numbers = np.arange(len(text), dtype=_NUMBER).view(np.uint8).reshape(-1, NUMBER_BYTES)
    return np.concatenate([numbers, text], axis=1)


def split(rows: Bytes) -> tuple[NDArray[np.int64], Bytes]:
    """The samples' numbers and their texts, of rows as `numbered` made them, in any order."""
    numbers = np.ascontiguousarray(rows[:, :NUMBER_BYTES]).view(_NUMBER).reshape(-1).astype(np.int64)
    return numbers, rows[:, NUMBER_BYTES:]
