"""Lineage, candidates and retention decided from values alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr.checkpoint.lineage import Lineage, Link, Segment, chain, from_index, head_of, split_name
from dtr.checkpoint.manifest import Manifest, PartFacts, Replicated
from dtr.checkpoint.parts import Fence, Spec
from dtr.checkpoint.restoring.candidates import parts_of
from dtr.checkpoint.saving.announce import Save
from dtr.checkpoint.saving.handle import Commit, SaveHandle
from dtr.checkpoint.saving.progress import Sight
from dtr.checkpoint.saving.publisher import error_of
from dtr.errors import CheckpointAbandoned, CheckpointAborted, CheckpointConflict


def link(run: str, parent: str = "", step: int | None = None, at: int = 0) -> Link:
    return Link(run=run, parent_run=parent, parent_step=step, created_at_ms=at)


LINKS = {
    "0001-a": link("0001-a", at=1),
    "0002-b": link("0002-b", "0001-a", 30, at=2),
    "0003-c": link("0003-c", "0002-b", 70, at=3),
    "0004-d": link("0004-d", "0002-b", 50, at=4),  # 0003-c was left
}


class TestChain:
    def test_follows_what_each_run_continues(self) -> None:
        """The segments are the head, its parent up to the restored step, and so on; a branch that was left is not among them."""
        lineage = chain(LINKS, "0004-d")
        assert lineage.segments == (
            Segment(run="0004-d", last=None),
            Segment(run="0002-b", last=50),
            Segment(run="0001-a", last=30),
        )
        assert lineage.ancestors() == [("0001-a", 30), ("0002-b", 50)]

    def test_takes_a_step_up_to_the_restored_one_inclusive(self) -> None:
        """What a run saved after the step that its successor restored is off the lineage."""
        lineage = chain(LINKS, "0004-d")
        assert [lineage.takes(*c) for c in [("0002-b", 50), ("0002-b", 51), ("0003-c", 60), ("0004-d", 10**9), ("0001-a", 31)]] == [
            True, False, False, True, False,
        ]  # fmt: skip

    def test_newest_first_goes_by_run_before_step(self) -> None:
        """A later run's checkpoint is newer than its parent's, whatever their steps."""
        lineage = chain(LINKS, "0004-d")
        given = [("0001-a", 30), ("0002-b", 50), ("0002-b", 90), ("0004-d", 40), ("0004-d", 45), ("0009-z", 1)]
        assert lineage.newest_first(given) == [("0004-d", 45), ("0004-d", 40), ("0002-b", 50), ("0001-a", 30)]

    def test_the_head_is_the_record_that_was_made_last(self) -> None:
        """The time in the records decides, so a counter that began again at 1 (Redis was lost) does not lose the newest run."""
        assert head_of(LINKS.values()) == "0004-d"
        assert head_of([*LINKS.values(), link("0001-x", "0004-d", 90, at=5)]) == "0001-x"
        assert head_of([]) == ""

    def test_a_circle_ends(self) -> None:
        """Damaged records that name each other do not hang a restore."""
        links = {"0001-a": link("0001-a", "0002-b", 1), "0002-b": link("0002-b", "0001-a", 1)}
        assert [s.run for s in chain(links, "0002-b").segments] == ["0002-b", "0001-a"]

    def test_a_missing_record_ends_the_chain_after_its_run(self) -> None:
        """What the last known record names is still taken: its checkpoints are there."""
        assert chain({"0002-b": LINKS["0002-b"]}, "0002-b").takes("0001-a", 30)


class TestIndex:
    def test_is_put_in_order_by_the_links(self) -> None:
        """Redis's hash has no order; what each run continues gives it."""
        held = {"0001-a": "30", "0004-d": "", "0002-b": "50"}
        assert from_index(held, LINKS) == chain(LINKS, "0004-d")

    def test_runs_without_a_link_come_last(self) -> None:
        """A run that the links do not reach still counts, behind the others."""
        lineage = from_index({"0004-d": "", "0001-a": "30", "0002-b": "50"}, {"0004-d": link("0004-d")})
        assert [s.run for s in lineage.segments] == ["0004-d", "0002-b", "0001-a"]

    def test_no_head_is_no_lineage(self) -> None:
        """An empty or headless hash says nothing."""
        assert from_index({}, {}) == from_index({"0001-a": "4"}, {}) == Lineage()

    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), min_size=1, max_size=10))
    def test_is_what_the_store_tells(self, parents: list[tuple[int, int]]) -> None:
        """Runs that each continue some earlier run: the index written from the chain reads back as the chain."""
        links = {}
        for n, (parent, step) in enumerate(parents):
            run = f"{n:04d}-r"
            links[run] = link(run, f"{parent % n:04d}-r", step, at=n) if n else link(run)
        lineage = chain(links, head_of(links.values()))
        held = {s.run: "" if s.last is None else str(s.last) for s in lineage.segments}
        assert from_index(held, links) == lineage

    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), min_size=2, max_size=10))
    def test_grows_as_the_chain_does(self, parents: list[tuple[int, int]]) -> None:
        """The lineage of a new run, made from the present one, is the chain through its record."""
        links = {}
        lineage = Lineage()
        for n, (_, step) in enumerate(parents):
            run = f"{n:04d}-r"
            base = (lineage.head, step) if n else None
            links[run] = link(run, base[0], base[1], at=n) if base else link(run, at=n)
            lineage = lineage.after(run, base)
        assert lineage == chain(links, head_of(links.values()))


def test_names_are_split_at_the_last_slash() -> None:
    """RUN/STEP as Redis has it; anything else is none."""
    assert split_name("0001-a/12") == ("0001-a", 12)
    assert [split_name(name) for name in ("", "0001-a", "0001-a/x", "/3", "0001-a/-1", "0001-a/²")] == [None] * 6


# --- which part a rank reads ------------------------------------------------------------------------------------------


def manifest(world_size: int = 2, *, replicated: Replicated = "none") -> Manifest:
    parts = tuple(
        PartFacts(
            rank=rank, worker=f"w{rank}", incarnation="0" * 12, object=f"runs/r/{rank}", size_bytes=8, checksum=f"crc64nvme:{rank:016x}"
        )
        for rank in range(1 if replicated == "all" else world_size)
    )
    return Manifest(
        decision="commit", job="j", run="0001-a", step=5, world_size=world_size, replicated=replicated, parent=None, created_at=1,
        parts=parts,
    )  # fmt: skip


def test_a_sharded_part_needs_its_world_size() -> None:
    """Each rank gets its own part; another number of ranks is told what would fit."""
    assert [part.rank for part in parts_of(manifest(4), 3, 4) if isinstance(part, PartFacts)] == [3]
    assert "world_size=4" in str(parts_of(manifest(4), 0, 3))


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (6, 7)])
def test_any_world_size_reads_a_replicated_part(rank: int, world_size: int) -> None:
    """There is one part, and it is everybody's."""
    assert parts_of(manifest(4, replicated="all"), rank, world_size) == manifest(4, replicated="all").parts


def test_a_state_that_is_replicated_in_part_needs_every_part() -> None:
    """The reader's own comes first; a rank that the checkpoint does not have reads them, too."""
    several = manifest(3, replicated="some")
    assert [part.rank for part in parts_of(several, 2, 3) if isinstance(part, PartFacts)] == [2, 0, 1]
    assert [part.rank for part in parts_of(several, 5, 8) if isinstance(part, PartFacts)] == [0, 1, 2]


# --- how a save ends --------------------------------------------------------------------------------------------------


def save(own_checksum: str = "") -> Save:
    return Save(
        handle=SaveHandle("0001-a", 5),
        spec=Spec(run="0001-a", step=5, world_size=1, store="/s"),
        fence=Fence(rank=0, worker="w", incarnation="0" * 12, host="h"),
        state_id="0" * 16,
        settle=lambda: None,
        started_s=0.0,
        own_checksum=own_checksum,
    )


def sight(state: str, checksum: str = "", reason: str = "") -> Sight:
    return Sight(state=state, reason=reason, size_bytes=1, checksum=checksum)


@pytest.mark.parametrize(
    ("own", "seen", "kind"),
    [
        ("", sight("WRITING"), None),
        ("", sight("COMMITTED", "crc:1"), None),
        ("", sight("ABORTED", reason="rank 1: no room"), CheckpointAborted),
        ("", sight("ABANDONED", reason="the job went on"), CheckpointAbandoned),
        ("", sight("ABORTING"), None),
        ("crc:1", sight("COMMITTED", "crc:1"), None),
        ("crc:2", sight("COMMITTED", "crc:1"), CheckpointConflict),
        ("crc:2", sight("WRITING", "crc:1"), CheckpointConflict),
        ("crc:2", sight("WRITING"), None),
    ],
)
def test_what_a_sight_means(own: str, seen: Sight, kind: type[Exception] | None) -> None:
    """A save ends badly by an abort, an abandoned run, or other bytes under the same step; ABORTING may still end either way."""
    error = error_of(save(own), seen)
    assert type(error) is (kind or type(None))
    if error is not None and not own:
        assert seen.reason in error.message


def test_the_first_end_of_a_handle_counts() -> None:
    """A commit that was reported is not taken back, and a future that a user cancels stays."""
    handle = SaveHandle("0001-a", 5)
    assert not handle.durable.cancel()
    handle.commit(Commit(run="0001-a", step=5, size_bytes=1, seconds=0.1))
    handle.fail("CLOSED", RuntimeError("late"))
    assert handle.durable.result(0).step == 5
    assert handle.state == "COMMITTED"
