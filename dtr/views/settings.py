"""Every setting with its value and where that came from; nothing secret."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dtr.config import Settings
from dtr.state.client import mask

__all__ = ["SettingView", "SettingsView", "masked", "origins", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingView:
    """One setting. ``origin`` is ``argument``, ``environment`` or ``default``, or ``file``; ``place`` is the variable or the file."""

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
    found = origins(environ=environ, **given)
    views = tuple(
        SettingView(
            name=spec.name,
            value=masked(values[spec.name]),
            origin=found[spec.name][0],
            place=found[spec.name][1],
            about=spec.metadata["what"],
        )
        for spec in fields(Settings)
    )
    return SettingsView(settings=views)


def origins(*, environ: Mapping[str, str], **given: Any) -> dict[str, tuple[str, str]]:
    """Where each setting comes from: (argument | environment | file | default, the variable or file), for settings that load."""
    file = environ.get("DTR_CONFIG", "dtr.toml")
    table = tomllib.loads(Path(file).read_text(encoding="utf-8")) if Path(file).exists() else {}

    def origin(name: str) -> tuple[str, str]:
        if given.get(name) is not None:
            return "argument", f"--{'url' if name == 'redis_url' else name}"
        if f"DTR_{name.upper()}" in environ:
            return "environment", f"DTR_{name.upper()}"
        return ("file", file) if name in table else ("default", "")

    return {spec.name: origin(spec.name) for spec in fields(Settings)}


def masked(value: Any) -> Any:
    """The value without secrets: a URL's password, and what looks like a key in its query."""
    if not isinstance(value, str) or "://" not in value:
        return value
    return re.sub(r"(?i)([?&][^=&]*(?:password|secret|token|key)[^=&]*=)[^&]*", r"\1***", mask(value))
