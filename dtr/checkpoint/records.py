"""The JSON records that the store keeps: canonical, with a checksum of their own, and parsed without trust.

Canonical means sorted keys, no spaces, UTF-8. ``checksum`` is the SHA-256 of the record without that member, so that a person can
check one: ``jq -cSj 'del(.checksum)' manifest.json | sha256sum``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Set as AbstractSet
from typing import Any, Final

from dtr.errors import InvalidInput, ManifestInvalid

__all__ = ["MAX_BYTES", "clean_text", "decode", "encode", "incarnation", "integer", "members", "moment_ms", "text"]

MAX_BYTES: Final = 64 << 20
MAX_DEPTH: Final = 32
_MAX_TEXT: Final = 4_000


def encode(record: dict[str, Any]) -> bytes:
    """The bytes of a record, its checksum added. Raises InvalidInput if it holds what JSON cannot."""
    try:
        _check_depth(record, MAX_DEPTH)
        checksum = f"sha256:{hashlib.sha256(_canonical(record)).hexdigest()}"
        content = _canonical({**record, "checksum": checksum}) + b"\n"
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidInput(f"a record must be plain JSON: {exc}", field="data") from exc
    if len(content) > MAX_BYTES:
        raise InvalidInput(f"a record has at most {MAX_BYTES} bytes, got {len(content)}", field="data")
    return content


def _canonical(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _check_depth(value: Any, levels: int) -> None:
    """Refuse what would come back as something else: keys that are not text, tuples, nesting beyond what ``decode`` takes."""
    if not levels:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if type(value) is dict:
        if not all(type(key) is str for key in value):
            raise TypeError("keys must be text")
        for item in value.values():
            _check_depth(item, levels - 1)
    elif type(value) is list:
        for item in value:
            _check_depth(item, levels - 1)
    elif value is not None and type(value) not in {bool, int, float, str}:
        raise TypeError(f"a {type(value).__name__} is not JSON")


def decode(content: bytes, what: str) -> dict[str, Any]:
    """The members of a record whose checksum is right; ManifestInvalid, naming ``what``, for anything else."""
    if len(content) > MAX_BYTES:
        raise ManifestInvalid(f"{what} has {len(content)} bytes, more than {MAX_BYTES}")
    try:
        record = json.loads(bytes(content).decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
        if type(record) is not dict:
            raise ValueError("not an object")
        _check_depth(record, MAX_DEPTH)
        checksum = record.pop("checksum", None)
        expected = f"sha256:{hashlib.sha256(_canonical(record)).hexdigest()}"
    except (ValueError, TypeError, RecursionError) as exc:
        raise ManifestInvalid(f"{what} is truncated or not a record of dtr: {exc}") from exc
    if checksum != expected:
        raise ManifestInvalid(f"{what} was altered: its checksum is {str(checksum)[:80]!r}, its content has {expected}")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member occurs twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def members(record: Any, expected: AbstractSet[str], what: str) -> dict[str, Any]:
    """The record, if it is an object with exactly the expected members; ManifestInvalid otherwise."""
    if type(record) is not dict:
        raise ManifestInvalid(f"{what} must be an object, got {_shown(record)}")
    if record.keys() != expected:
        missing, unknown = sorted(expected - record.keys()), sorted(record.keys() - expected)
        raise ManifestInvalid(f"{what} lacks the members {missing} and has the unknown ones {_shown(unknown)}")
    return record


# --- checks of members, each raising InvalidInput -------------------------------------------------------------------


def text(value: Any, field: str) -> str:
    """Encodable text of at most 4,000 characters."""
    if type(value) is not str or len(value) > _MAX_TEXT or value != clean_text(value):
        raise InvalidInput(f"{field} must be text of at most {_MAX_TEXT} characters, got {_shown(value)}", field=field)
    return value


def clean_text(value: str) -> str:
    """Any text, made such that it can be recorded: an odd character in a reason must not keep an abort from being written."""
    return value.encode("utf-8", "backslashreplace").decode()[:_MAX_TEXT]


def integer(value: Any, field: str, low: int, high: int) -> int:
    """A plain integer from low to high."""
    if type(value) is not int or not low <= value <= high:
        raise InvalidInput(f"{field} must be an integer from {low} to {high}, got {_shown(value)}", field=field)
    return value


def moment_ms(value: Any, field: str) -> int:
    """Milliseconds since the epoch."""
    return integer(value, field, 0, 10**14)


def incarnation(value: Any, field: str = "incarnation") -> str:
    """12 hex digits."""
    if type(value) is not str or len(value) != 12 or not set(value) <= set("0123456789abcdef"):
        raise InvalidInput(f"{field} must be 12 hex digits, got {_shown(value)}", field=field)
    return value


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
