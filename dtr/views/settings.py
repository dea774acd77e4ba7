"""Every setting with its value and where that came from; nothing secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dtr.config import Origin, Settings
from dtr.state.client import mask

__all__ = ["SettingView", "SettingsView", "masked", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingView:
    """One setting. ``origin`` is argument, environment, file or default; ``place`` is the option, the variable or the file."""

    name: str
    value: Any
    origin: str
    place: str
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsView:
    """Every setting, in the order of :class:`Settings`."""

    settings: tuple[SettingView, ...]


def read(*, environ: Mapping[str, str], **given: Any) -> SettingsView:
    """All settings as :meth:`Settings.load` merges them; passwords in URLs are masked.

    Raises:
        ConfigError: as :meth:`Settings.load`.
    """
    values = Settings.load(environ=environ, **given).as_dict()
    found = Settings.origins(environ=environ, **given)
    views = tuple(
        SettingView(
            name=spec.name,
            value=masked(values[spec.name]),
            origin=found[spec.name].kind,
            place=_place(spec.name, found[spec.name]),
            about=spec.metadata["what"],
        )
        for spec in fields(Settings)
    )
    return SettingsView(settings=views)


def _place(name: str, origin: Origin) -> str:
    return f"--{'url' if name == 'redis_url' else name}" if origin.kind == "argument" else origin.place


def masked(value: Any) -> Any:
    """The value without secrets: a URL's password, and what looks like a key in its query."""
    if not isinstance(value, str) or "://" not in value:
        return value
    return re.sub(r"(?i)([?&][^=&]*(?:password|secret|token|key)[^=&]*=)[^&]*", r"\1***", mask(value))
