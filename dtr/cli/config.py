"""``dtr config``: the settings and where they come from."""

from __future__ import annotations

import os

import rich_click as click

from dtr.cli.options import reading_options
from dtr.cli.screen import Screen, show
from dtr.cli.table import cell
from dtr.views import settings as view
from dtr.views.settings import SettingsView

__all__ = ["config"]


@click.group(short_help="The settings and where they come from.")
def config() -> None:
    """The settings and where they come from."""


@config.command("show", short_help="Every setting: value, origin, meaning.")
@reading_options
def show_(url: str | None, job: str | None, as_json: bool) -> None:
    """Every setting with its value and where that came from: an option beats DTR_NAME, which beats dtr.toml, which beats the default.

    Passwords are masked.
    """
    show(view.read(environ=os.environ, redis_url=url, job=job), json=as_json, human=_human)


def _human(screen: Screen, found: SettingsView) -> None:
    widest = max(len(setting.name) for setting in found.settings)
    for setting in found.settings:
        value = "-" if setting.value is None else str(setting.value)
        style, place = ("dim", "") if setting.origin == "default" else ("bold", f"  from {setting.place}")
        screen.entry([cell(setting.name.ljust(widest), "bold")], value + place, style)
        screen.entry([cell(" " * widest)], setting.about, "dim")
