"""Parts of a state by the paths of its values: ``model/layers/0/weight``, as they are named in a checkpoint's file. Pure.

A pattern is a path with ``*``, ``?`` and ``[...]`` as in file names; a ``*`` also spans slashes. It selects what lies below a match, too:
``model`` and ``model/*`` select the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Any, Final

from dtr.checkpoint.format.build import unflatten
from dtr.errors import InvalidInput, ManifestInvalid

__all__ = ["LEFT_OUT", "Patterns", "leaves", "mentioned", "prune", "step_name"]

LEFT_OUT: Final = object()  # a node that was not selected
_WHOLE: Final = "state"  # the path of a state that is a single value
_MAX_PATTERNS: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Patterns:
    """What was asked for; ``argument`` is what it was given as, for messages."""

    texts: tuple[str, ...]
    argument: str
    _any: re.Pattern[str] = field(repr=False, compare=False)

    @classmethod
    def of(cls, given: Any, argument: str) -> Patterns:
        """One pattern or several; raises InvalidInput that names ``argument``."""
        texts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list | tuple | set | frozenset) else ()
        if not 0 < len(texts) <= _MAX_PATTERNS or not all(isinstance(text, str) and text.strip("/") for text in texts):
            raise InvalidInput(
                f"{argument} must be a path pattern like 'model/*', or a list of them, got {str(given)[:80]!r}", field=argument
            )
        return cls(texts=texts, argument=argument, _any=re.compile("|".join(translate(text.strip("/")) for text in texts)))

    def names(self, path: str) -> bool:
        """Whether a pattern matches ``path`` itself."""
        return self._any.match(path) is not None

    def match(self, path: str) -> bool:
        """Whether ``path`` is selected: a pattern matches it, or a folder above it."""
        ends = [at for at, letter in enumerate(path) if letter == "/"]
        return any(self.names(path[:end]) for end in (*ends, len(path)))

    def __str__(self) -> str:
        return ", ".join(self.texts)


def step_name(key: Any) -> str:
    """A key or index as it stands in a path."""
    if type(key) is str and key.isalnum() and key.isascii():
        return key
    text = key if type(key) is str else repr(key)
    return text.replace("~", "~0").replace("/", "~1").encode("utf-8", "backslashreplace").decode()


def prune(spec: Any, patterns: Patterns, gap: Any = None) -> Any:
    """The tree with nothing but what the patterns select; a list keeps its length, with ``gap`` for each item that was not selected.

    Raises:
        InvalidInput: nothing is selected; the message says what there is.
    """
    found = _prune(spec, "" if _is_container(spec) else _WHOLE, patterns, gap)
    if found is LEFT_OUT:
        tops = [path for path, _ in _children(spec, "")] or [_WHOLE]
        shown = ", ".join(tops[:12]) + (", ..." if len(tops) > 12 else "")
        raise InvalidInput(
            f"{patterns.argument} selects nothing: {patterns} is no path of the checkpoint, which holds {shown}", field=patterns.argument
        )
    return found


def _prune(node: Any, path: str, patterns: Patterns, gap: Any) -> Any:
    if path and patterns.names(path):
        return node
    if not _is_container(node):
        return LEFT_OUT
    below = [_prune(child, name, patterns, gap) for name, child in _children(node, path)]
    if all(child is LEFT_OUT for child in below):
        return LEFT_OUT
    filled = [gap if child is LEFT_OUT else child for child in below]
    if type(node) is list:
        return filled
    ((kind, inner),) = node.items()
    if kind == "tuple":
        return {kind: filled}
    pairs = [(key, child) for key, child in zip(_keys(node), below, strict=True) if child is not LEFT_OUT]
    return {kind: dict(pairs) if type(inner) is dict else [list(pair) for pair in pairs]}


def _is_container(node: Any) -> bool:
    if type(node) is list:
        return True
    return type(node) is dict and len(node) == 1 and next(iter(node)) in {"dict", "items", "ordered", "tuple"}


def _keys(node: Any) -> list[Any]:
    """The keys of a container as the tree has them."""
    if type(node) is list:
        return list(range(len(node)))
    ((name, inner),) = node.items()
    if name == "tuple" and type(inner) is list:
        return list(range(len(inner)))
    if name == "dict" and type(inner) is dict:
        return list(inner)
    if type(inner) is list and all(type(pair) is list and len(pair) == 2 for pair in inner):
        return [pair[0] for pair in inner]
    raise ManifestInvalid(f"the tree of the part is malformed: a {name} that holds {type(inner).__name__}")


def _children(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Path and node of each item of a container."""
    if not _is_container(node):
        return
    inner = node if type(node) is list else next(iter(node.values()))
    values = list(inner.values()) if type(inner) is dict else inner
    for key, value in zip(_keys(node), values, strict=True):
        paired = type(node) is dict and next(iter(node)) in {"items", "ordered"}
        name = step_name(unflatten(key, {}) if paired else key)
        yield (f"{path}/{name}" if path else name), value[1] if paired else value


def leaves(spec: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and node of every value of the tree that is no container."""
    if not _is_container(spec):
        yield path or _WHOLE, spec
    for below, child in _children(spec, path):
        yield from leaves(child, below)


def mentioned(spec: Any, names: AbstractSet[str]) -> list[str]:
    """Those of ``names`` that the tree may refer to: any text in it that is one. A text that only looks like one costs its reading."""
    return sorted({text for text in _texts(spec) if text in names})


def _texts(node: Any) -> Iterable[str]:
    pending = [node]
    while pending:
        node = pending.pop()
        if type(node) is str:
            yield node
        elif type(node) is list:
            pending.extend(node)
        elif type(node) is dict:
            pending.extend(node.values())
