"""An event as a line for a person. Pure; an event of an unknown kind shows its fields."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from dtr.views.events import Event
from dtr.views.words import count_of, duration, size

__all__ = ["moment", "sentence", "style"]

_RED: Final = frozenset(
    {
        "run_ended",
        "barrier_broken",
        "barrier_timeout",
        "ckpt_aborting",
        "ckpt_aborted",
        "ckpt_quarantined",
        "quarantined",
        "save_failed",
        "shard_quarantined",
        "stalled",
    }
)
_YELLOW: Final = frozenset({"departed", "ckpt_abandoned", "samples_skipped", "state_created"})
_GREEN: Final = frozenset({"run_formed", "ckpt_committed", "state_ready", "resumed", "shards_released"})


def moment(at_ms: int) -> str:
    """Local time of this machine, to the second: ``11-23 03:07:12``."""
    return time.strftime("%m-%d %H:%M:%S", time.localtime(at_ms / 1000))


def style(event: Event) -> str:
    """The colour of its name."""
    if event.event in _RED:
        return "red"
    return "yellow" if event.event in _YELLOW else "green" if event.event in _GREEN else ""


def sentence(event: Event) -> str:
    """What happened, without its time and kind."""
    write = _SENTENCES.get(event.event)
    try:
        text = write(event.fields) if write is not None else ""
    except (KeyError, ValueError):
        text = ""  # another version of dtr wrote it with other fields
    return text or " ".join(f"{name}={value}" for name, value in event.fields.items())


def _round(fields: Mapping[str, str]) -> str:
    name, run, number = fields["round"].rsplit(":", 3)[-3:]
    who = ", ".join(f"{worker} (rank {rank})" for rank, _, worker in (word.partition(":") for word in fields["missing"].split()))
    return f"{name} round {number} of run {run}: {fields['reason']}; missing: {who or 'nobody'}"


def _ckpt(fields: Mapping[str, str]) -> str:
    amount, reason = fields.get("size_bytes", ""), fields.get("reason", "")
    shown = f", {size(int(amount))}" if amount.isdigit() and int(amount) else ""
    return f"{fields['run']}/{fields['step']}{shown}" + (f": {reason}" if reason else "")


def _at(fields: Mapping[str, str]) -> str:
    return f" at step {fields['step']}" if fields.get("step") else ""


_SENTENCES: Final[Mapping[str, Callable[[Mapping[str, str]], str]]] = {
    "joined": lambda f: f"{f['worker']} on {f['host']}, process {f['pid']}, generation {f['generation']}",
    "departed": lambda f: f"{f['worker']}: {f['reason']}",
    "run_formed": lambda f: (
        f"{f['run']} with {count_of(int(f['world_size']), 'rank')}" + (f" after {f['previous']}" if f.get("previous") else "")
    ),
    "run_ended": lambda f: f"{f['run']}: rank {f['rank']} ({f['worker']}) departed: {f['reason']}",
    "stalled": lambda f: f"{f['worker']}{_at(f)}: {f['reason']}",
    "resumed": lambda f: f"{f['worker']}{_at(f)} goes on after {duration(int(f['after_ms']) / 1000)}",
    "save_failed": lambda f: f"{f['run']}/{f['step']} of rank {f['rank']} ({f['worker']}), {f['state'].lower()}: {f['reason']}",
    "barrier_broken": _round,
    "barrier_timeout": _round,
    "ckpt_begun": _ckpt,
    "ckpt_sealed": _ckpt,
    "ckpt_committed": _ckpt,
    "ckpt_aborting": _ckpt,
    "ckpt_aborted": _ckpt,
    "ckpt_abandoned": _ckpt,
    "ckpt_retired": _ckpt,
    "shard_quarantined": lambda f: (
        f"shard {f['shard']} of data set {f['dataset']} is left out, {f['worker']} cannot read it: {f['reason']}"
    ),
    "shards_released": lambda f: f"shards {f['shards']} of data set {f['dataset']} are read again, from the next epoch or run on",
    "samples_skipped": lambda f: f"{f['samples']} of data set {f['dataset']} are left out from now on: {f['reason']}",
    "ckpt_quarantined": lambda f: f"{f['run']}/{f['step']} {f['reason']}",
}
