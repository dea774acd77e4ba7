"""The formats of data files, and the one place that maps a name to one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from dtr.datasets.formats.contract import START_BYTES, Columns, Format, Measure, Span
from dtr.datasets.formats.jsonl import JsonLines
from dtr.datasets.formats.mds import Mds
from dtr.datasets.formats.npy import Npy
from dtr.datasets.formats.parquet import Parquet
from dtr.datasets.formats.tar import Tar
from dtr.datasets.formats.tokens import Tokens
from dtr.errors import InvalidInput

__all__ = ["START_BYTES", "Columns", "Format", "Measure", "Span", "format_of_fields", "make_format"]

_PLAIN: Mapping[str, Callable[[], Format]] = {"jsonl": JsonLines, "mds": Mds, "npy": Npy, "parquet": Parquet, "tar": Tar}  # without options
_NAMES = ("bin", *_PLAIN)
_OTHER_NAMES = {
    "json": "jsonl", "ndjson": "jsonl", "jsonlines": "jsonl", "numpy": "npy", "tokens": "bin", "raw": "bin", "webdataset": "tar",
    "wds": "tar", "pq": "parquet", "streaming": "mds", "mosaic": "mds",
}  # fmt: skip


def make_format(name: str, *, dtype: Any = None, sample_length: int | None = None, drop_remainder: bool = False) -> Format:
    """The format of this name with its options.

    Raises InvalidInput if there is none (the nearest is named), if an option is missing, or if one does not belong to it.
    """
    if name not in _NAMES:
        near = _OTHER_NAMES.get(str(name).lower()) or next(iter(difflib.get_close_matches(str(name).lower(), _NAMES, 1)), None)
        hint = f"did you mean {near!r}? " if near else ""
        raise InvalidInput(f"format: there is no format {name!r}; {hint}known are {', '.join(_NAMES)}", field="format")
    if name == "bin":
        if dtype is None or sample_length is None:
            missing = "dtype" if dtype is None else "sample_length"
            raise InvalidInput(f"format 'bin' needs {missing}=: a token file does not say what it holds", field=missing)
        return Tokens(dtype=dtype, sample_length=sample_length, drop_remainder=drop_remainder)
    for option, given in {"dtype": dtype, "sample_length": sample_length, "drop_remainder": drop_remainder or None}.items():
        if given is not None:
            raise InvalidInput(f"{option} belongs to format 'bin', not to {name!r}: leave it out", field=option)
    return _PLAIN[name]()


def format_of_fields(fields: Mapping[str, str]) -> Format:
    """The format that a spec in Redis names; other fields are ignored."""
    length = fields.get("sample_length")
    return make_format(
        fields["format"],
        dtype=fields.get("dtype"),
        sample_length=None if length is None else int(length),
        drop_remainder=fields.get("drop_remainder") == "true",
    )
