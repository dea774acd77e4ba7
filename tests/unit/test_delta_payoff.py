"""Delta rests where it does not pay, tries again ever less often, and is back at once where it does."""

from __future__ import annotations

from dtr.checkpoint.delta.payoff import FIRST_REST, LONGEST_REST, POOR_SAVES, History, advance

SIZE = 1000


def saves(history: History, sent: list[int | None]) -> tuple[History, list[str]]:
    events = []
    for n, bytes_ in enumerate(sent):
        history, event = advance(history, f"run/{n}", SIZE, bytes_)
        events.append(event)
    return history, events


def test_a_few_poor_saves_are_no_reason() -> None:
    """Below the limit, or with a good one between them, nothing happens."""
    poor = [950] * (POOR_SAVES - 1)
    history, events = saves(History(), [*poor, 100, *poor])
    assert set(events) == {""}
    assert history.rest == 0


def test_it_rests_and_says_so_once() -> None:
    """After POOR_SAVES in a row it rests for FIRST_REST saves, each of which counts down."""
    history, events = saves(History(), [950] * POOR_SAVES)
    assert events == [""] * (POOR_SAVES - 1) + ["off"]
    assert history.rest == FIRST_REST
    history, events = saves(history, [None] * FIRST_REST)
    assert (history.rest, set(events)) == (0, {""})


def test_each_try_that_fails_doubles_the_rest() -> None:
    """One save is enough then, and the rest has an upper bound."""
    history, _ = saves(History(), [SIZE] * POOR_SAVES)
    rests = []
    for _ in range(8):
        history, _ = saves(history, [None] * history.rest)
        history, event = advance(history, "run/next", SIZE, SIZE)
        assert event == "off"
        rests.append(history.rest)
    assert rests[:3] == [2 * FIRST_REST, 4 * FIRST_REST, 8 * FIRST_REST]
    assert rests[-1] == LONGEST_REST


def test_it_is_back_at_once() -> None:
    """A try that pays ends it, is told once, and the next poor saves count from the beginning."""
    history, _ = saves(History(), [SIZE] * POOR_SAVES)
    history, _ = saves(history, [None] * history.rest)
    history, events = saves(history, [50, 50])
    assert events == ["on", ""]
    assert (history.poor, history.next_rest) == (0, FIRST_REST)


def test_exactly_the_limit_pays() -> None:
    """Nine tenths sent is one tenth reused."""
    _, events = saves(History(), [900] * 10)
    assert set(events) == {""}
