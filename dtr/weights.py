"""Weights of workers from their measured speeds: pure, for :mod:`dtr.placement`.

Guarantees: only ratios of speeds count; a worker whose measured share is within `BAND` of the weight in force keeps that weight to the last
digit, so noise of up to 11 % around the true speeds moves no shard; a weight that does change becomes the measured one, in the middle of
its new band, so that it does not swing back. Nobody who was measured comes out with more than `MOST` times, or less than 1/`MOST`, of the
median worker's weight, not even with the weight in force, give or take the band. Who was not measured keeps the weight in force; a
newcomer gets the median.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from statistics import median, median_low
from typing import Final

from dtr.errors import StateCorrupt

__all__ = ["BAND", "MOST", "from_fields", "is_field", "settled", "to_fields"]

BAND: Final = 1.25
MOST: Final = 16.0
_PREFIX: Final = ":weight/"  # no worker_id begins with a colon


def settled(before: Mapping[str, float], speeds: Mapping[str, float], members: Collection[str]) -> dict[str, float]:
    """The weights of ``members``.

    Speeds have no scale of their own: they are given that of the weights in force by the median of the ratios between the two. So the
    worker in the middle keeps its weight exactly, and one that became slow changes no other's.

    Args:
        before: the weights in force, of the members of that time.
        speeds: samples per second of those that were measured; above 0.
        members: who is to have a weight.
    """
    measured = [worker for worker in sorted(members) if worker in speeds]
    weights = {worker: before[worker] for worker in members if worker in before}
    if measured:
        scale = median_low(before.get(worker, 1.0) / speeds[worker] for worker in measured)
        middle = median_low(scale * speeds[worker] for worker in measured)
        for worker in measured:
            found = min(max(scale * speeds[worker], middle / MOST), middle * MOST)
            stands = before.get(worker, 1.0)
            weights[worker] = stands if 1 / BAND <= found / stands <= BAND else float(f"{found:.3g}")
    usual = float(f"{median(weights.values()):.3g}") if weights else 1.0  # of two, between them: as likely near the one as the other
    return {worker: weights.get(worker, usual) for worker in sorted(members)}


def is_field(field: str) -> bool:
    """Whether a field of ``placement:NAME:GENERATION`` is a weight; else it is a worker, whose shards it holds."""
    return field.startswith(_PREFIX)


def to_fields(weights: Mapping[str, float]) -> dict[str, str]:
    """As they stand in Redis beside the shards: ``:weight/WORKER`` -> weight, for those whose weight is not 1."""
    return {_PREFIX + worker: f"{weight:.3g}" for worker, weight in weights.items() if weight != 1}


def from_fields(fields: Mapping[str, str]) -> dict[str, float]:
    """The weights in force of all workers of a placement. Raises StateCorrupt for what `to_fields` did not write."""
    weights = {worker: 1.0 for worker in fields if not is_field(worker)}
    for field, text in fields.items():
        if is_field(field):
            weights[field.removeprefix(_PREFIX)] = _weight(field, text)
    return weights


def _weight(field: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise StateCorrupt(f"placement: {field} must be a number above 0, got {text[:40]!r}")
    return weight
