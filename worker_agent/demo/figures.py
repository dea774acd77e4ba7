"""The numbers at the end: from the story to one flat value, as JSON and as a table. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from worker_agent.demo.proof import Proof
from worker_agent.demo.story import Story

__all__ = ["Figures", "Upload", "measure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """One committed checkpoint as its record tells: from being announced until all of it was in the store."""

    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured; None for what did not happen."""

    workers: int
    steps: int
    steps_redone: int
    samples: int
    epochs: float
    samples_lost: int
    samples_twice: int
    samples_redone: int
    seconds: float
    loss_first: float | None
    loss_last: float | None
    step_ms: float | None
    saves: int
    state_bytes: int
    stall_ms: float | None
    stall_worst_ms: float | None
    stall_gb_per_s: float | None
    durable_s: float | None
    upload_mb_per_s: float | None
    recorded_ms: float | None
    noticed_ms: float | None
    recovery_s: float | None
    full_again_s: float | None

    def as_dict(self) -> dict[str, float | int | None]:
        """By name, rounded to what the measurement is worth."""
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in dataclasses.asdict(self).items()}

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each line of the table."""
        again = f"; {self.steps_redone} done again" if self.steps_redone else ""
        rows = [
            (
                "steps",
                f"{self.steps} by {self.workers} trainer{'s' if self.workers > 1 else ''}{_with(', {:.0f} ms each', self.step_ms)}{again}",
            ),
            (
                "data",
                f"{self.samples:,} samples, {self.epochs:.2f} epochs; {self.samples_lost} lost, {self.samples_twice} twice"
                + (f", {self.samples_redone:,} done again" if self.samples_redone else ""),
            ),
            ("loss", f"{_with('{:.2f}', self.loss_first)} to {_with('{:.2f}', self.loss_last)} nats a byte"),
            ("stall per save", _stall(self)),
            ("durable after", _with("{:.2f} s", self.durable_s) or "-"),
            ("upload", _with("{:.0f} MB/s", self.upload_mb_per_s) or "-"),
        ]
        if self.noticed_ms is not None:
            redis = _with("; Redis knew after {:.0f} ms", self.recorded_ms)
            rows.append(("detection", f"{self.noticed_ms:.0f} ms to the last survivor{redis}"))
        if self.recovery_s is not None:
            full = _with("; with all {} again after {:.2f} s", self.full_again_s, self.workers)
            rows.append(("recovery", f"{self.recovery_s:.2f} s to the next step{full}"))
        return [*rows, ("in all", f"{self.seconds:.0f} s")]


def _with(template: str, value: float | None, *before: object) -> str:
    return "" if value is None else template.format(*before, value)


def _stall(found: Figures) -> str:
    if found.stall_ms is None:
        return "-"
    rate = _with(", {:.1f} GB/s", found.stall_gb_per_s)
    worst = _with("; longest of {}: {:.0f} ms", found.stall_worst_ms, found.saves)
    return f"{found.stall_ms:.0f} ms for {found.state_bytes / 1e6:.0f} MB{rate}{worst}"


def measure(story: Story, uploads: Sequence[Upload], proof: Proof, *, workers: int, seconds: float) -> Figures:
    """Gather the numbers. Medians, because the first save also makes its slot and a machine has moods."""
    losses, stalls = story.losses, story.stalls_s()
    tenth = max(1, len(losses) // 10)
    size = max((saved.size_bytes for ranks in story.saves.values() for saved in ranks.values()), default=0)
    stall_s = median(stalls) if stalls else None
    noticed = story.noticed_ms()
    rates = [upload.size_bytes / upload.seconds / 1e6 for upload in uploads if upload.seconds > 0]
    step_s = story.step_s
    return Figures(
        workers=workers,
        steps=len(losses),
        steps_redone=story.redone(),
        samples=proof.consumed,
        epochs=proof.consumed / proof.samples,
        samples_lost=proof.lost,
        samples_twice=proof.twice,
        samples_redone=proof.abandoned_samples,
        seconds=seconds,
        loss_first=fmean(losses[:tenth]) if losses else None,
        loss_last=fmean(losses[-tenth:]) if losses else None,
        step_ms=None if step_s is None else step_s * 1000,
        saves=len(stalls),
        state_bytes=size,
        stall_ms=None if stall_s is None else stall_s * 1000,
        stall_worst_ms=max(stalls) * 1000 if stalls else None,
        stall_gb_per_s=size / stall_s / 1e9 if stall_s else None,
        durable_s=median(commit.seconds for commit in story.commits.values()) if story.commits else None,
        upload_mb_per_s=median(rates) if rates else None,
        recorded_ms=story.recorded_ms(),
        noticed_ms=noticed[-1] if noticed else None,
        recovery_s=story.recovery_s(),
        full_again_s=story.full_again_s(workers),
    )
