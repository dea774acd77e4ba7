"""The demo's data: the sources of Python's standard library as flat files of bytes, cut into samples of one length.

Guarantees: files hold whole samples only, so that they can be registered as they are; the same library gives the same bytes.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dtr.errors import Unavailable

__all__ = ["Corpus", "library", "sources", "write_corpus"]

_NOT_READ: Final = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What was written: ``sources`` modules were read into ``files`` files that hold ``samples`` samples."""

    folder: Path
    sources: int
    files: int
    samples: int
    size_bytes: int


def library() -> Path:
    """Where this Python has its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def sources(folder: Path) -> Iterator[Path]:
    """The Python files below ``folder``, in one order everywhere; tests and installed packages are left out."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _NOT_READ)
        yield from (Path(here, name) for name in sorted(files) if name.endswith(".py"))


def write_corpus(target: Path, *, source: Path, sample_bytes: int, file_samples: int, limit_bytes: int) -> Corpus:
    """Write the sources below ``source`` into ``target``, file after file, until ``limit_bytes`` are there.

    Args:
        target: a folder, made if absent.
        source: the library.
        sample_bytes: length of one sample.
        file_samples: samples in one file; the last one may have fewer.
        limit_bytes: how much is wanted; what goes beyond a whole sample is left out.

    Raises:
        Unavailable: there is not even one sample to be had.
    """
    target.mkdir(parents=True, exist_ok=True)
    text = bytearray()
    read = 0
    for path in sources(source):
        if len(text) >= limit_bytes:
            break
        text += path.read_bytes()
        read += 1
    samples = min(len(text), limit_bytes) // sample_bytes
    if samples == 0:
        raise Unavailable(f"there are no Python sources in {source}: install the standard library's sources to run the demo")
    file_bytes = file_samples * sample_bytes
    whole = memoryview(text)[: samples * sample_bytes]
    files = range(0, len(whole), file_bytes)
    for number, begin in enumerate(files):
        (target / f"stdlib-{number:03d}.bin").write_bytes(whole[begin : begin + file_bytes])
    return Corpus(folder=target, sources=read, files=len(files), samples=samples, size_bytes=len(whole))
