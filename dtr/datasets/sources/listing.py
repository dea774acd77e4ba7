"""Which files a data set has, said in few words: brace patterns, and the indexes of MDS and WebDataset. Pure."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from dtr.errors import DatasetMismatch, InvalidInput
from dtr.placement import MAX_SHARDS

__all__ = ["expand", "index_of", "static_folder"]

_BRACES = re.compile(r"\{([^{}]*)\}")
_LIMIT = f"at most {MAX_SHARDS:,} are supported"
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})", re.ASCII)


def expand(pattern: str) -> list[str]:
    """Every text that a pattern stands for: ``{a,b}`` is each of them, ``{003..120}`` each number, with as many digits as the first has.

    Raises InvalidInput for braces that are neither, or for too many texts.
    """
    parts = _BRACES.split(pattern)
    if any("{" in fixed or "}" in fixed for fixed in parts[::2]):
        raise InvalidInput(f"path: the braces of {_short(pattern)} do not match", field="path")
    choices, count = list[Sequence[str]](), 1
    for number, part in enumerate(parts):
        choices.append([part] if number % 2 == 0 else _choices(part, pattern))
        count *= len(choices[-1])
        if count > MAX_SHARDS:  # before the next one is spelt out
            raise InvalidInput(f"path: {_short(pattern)} stands for {count:,} files or more; {_LIMIT}", field="path")
    return ["".join(words) for words in itertools.product(*choices)]


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 200 else f"{pattern[:200]}...")


def static_folder(pattern: str) -> str:
    """The folder above the first brace."""
    return pattern.partition("{")[0].rpartition("/")[0]


def index_of(content: bytes, format: str, name: str) -> dict[tuple[str, ...], int]:
    """The files that an ``index.json`` lists for this format and their samples; none if it is the index of something else.

    A key has the name of the file and, where the writer compressed it, then the compressed one's.

    Raises DatasetMismatch if it is damaged.
    """
    if format not in {"mds", "tar"}:
        return {}
    try:
        index = orjson.loads(content)
        if not isinstance(index, dict):
            raise TypeError("it is no JSON object")
        if format == "mds" and "shards" in index:
            return _once(map(_mds, index["shards"]))
        if format == "tar" and "shardlist" in index:
            return _once(((_relative(shard["url"]),), _count(shard["nsamples"])) for shard in index["shardlist"])
    except (orjson.JSONDecodeError, LookupError, TypeError, ValueError, AttributeError) as exc:
        raise DatasetMismatch(f"{name} is no index of {format} files: {exc}", file=name) from exc
    return {}


def _once(listed: Iterable[tuple[tuple[str, ...], int]]) -> dict[tuple[str, ...], int]:
    found: dict[tuple[str, ...], int] = {}
    for files, samples in listed:
        if files in found:
            raise ValueError(f"it lists {files[0]!r} twice")
        found[files] = samples
    return found


def _mds(shard: Any) -> tuple[tuple[str, ...], int]:
    if shard["format"] != "mds":
        raise ValueError(f"a shard has format {shard['format']!r}")
    files = [shard["raw_data"], *([shard["zip_data"]] if shard.get("zip_data") else [])]
    return tuple(_relative(file["basename"]) for file in files), _count(shard["samples"])


def _relative(name: Any) -> str:
    path = os.path.normpath(str(name).removeprefix("./"))
    if path.startswith(("/", "..")) or "://" in path or "\0" in path or not isinstance(name, str):
        raise ValueError(f"it names {name!r}, which is not below it")
    return path


def _count(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"a number of samples is {number!r}")
    return number


def _choices(inside: str, pattern: str) -> list[str]:
    bounds = _RANGE.fullmatch(inside)
    if bounds is not None:
        low, high = int(bounds[1]), int(bounds[2])
        if high < low:
            raise InvalidInput(f"path: {{{inside}}} in {_short(pattern)} runs backwards; expected {{000..127}}", field="path")
        if high - low >= MAX_SHARDS:
            raise InvalidInput(f"path: {{{inside}}} in {_short(pattern)} stands for {high - low + 1:,} files; {_LIMIT}", field="path")
        return [str(number).zfill(len(bounds[1])) for number in range(low, high + 1)]
    if "," not in inside:
        raise InvalidInput(f"path: {{{inside[:80]}}} in {_short(pattern)} must be {{000..127}} or {{a,b}}", field="path")
    return inside.split(",")
