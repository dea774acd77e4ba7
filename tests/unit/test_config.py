"""Settings: where they come from, and what is said when one is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtr.config import LauncherEnvironment, Settings
from dtr.errors import ConfigError


def load(environ: dict[str, str] | None = None, **given: object) -> Settings:
    return Settings.load(environ=environ or {}, **given)


def test_an_argument_beats_the_environment_which_beats_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source is looked at in its turn, per setting."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dtr.toml").write_text('job = "file"\nttl_s = 7\nslots = 3\n')
    found = load({"DTR_JOB": "env", "DTR_TTL_S": "8"}, job="argument")
    assert (found.job, found.ttl_s, found.slots) == ("argument", 8.0, 3)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"DTR_TTL_S": "abc"}, "DTR_TTL_S: ttl_s must be a number from 0.3 to 86400"),
        ({"DTR_TTL_S": ""}, "DTR_TTL_S is empty"),
        ({"DTR_TTL_S": "15s"}, "got '15s'"),
        ({"DTR_TTL": "15"}, "did you mean DTR_TTL_S"),
        ({"DTR_REDIS_ULR": "x"}, "did you mean DTR_REDIS_URL"),
        ({"DTR_SLOTS": "1"}, "slots must be an integer from 2 to 64"),
        ({"DTR_SLOTS": "2.5"}, "slots must be an integer"),
        ({"DTR_SLOT_POLICY": "never"}, "wait, skip or fail"),
        ({"DTR_JOB": "../x"}, "job must"),
        ({"DTR_CONFIG": "/nowhere.toml"}, "there is no file /nowhere.toml"),
    ],
)
def test_a_wrong_variable_is_named(environ: dict[str, str], message: str) -> None:
    """The message names the variable, what it held, and what is expected."""
    with pytest.raises(ConfigError) as caught:
        load(environ)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ttl", [0, -1, 10**9, "15x", float("nan"), True, [5]])
def test_a_ttl_out_of_range_is_refused(ttl: object) -> None:
    """ttl 0, negative, a thousand million, words and NaN are no times to live."""
    with pytest.raises(ConfigError, match="ttl_s"):
        load(ttl_s=ttl)


def test_a_ttl_must_hold_three_beats() -> None:
    """One lost beat must not kill."""
    with pytest.raises(ConfigError, match="at least 3 beats: ttl_s is 2 and beat_interval_s is 1"):
        load(ttl_s=2)


def test_an_unknown_argument_names_the_nearest() -> None:
    """A misspelt keyword is told apart from a setting."""
    with pytest.raises(ConfigError, match="did you mean ttl_s"):
        load(ttl=5)


def test_a_secret_is_never_shown() -> None:
    """A URL in the wrong place is masked in the message."""
    with pytest.raises(ConfigError) as caught:
        load({"DTR_SLOTS": "redis://u:hunter2@h:1/0"})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text", ["ttl_s = ", "[dtr]\nttl_s = 5\n", "job = 5\n", "\x00"])
def test_a_broken_file_is_refused(text: str, tmp_path: Path) -> None:
    """TOML that does not parse, tables and wrong types are named with their file."""
    file = tmp_path / "dtr.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"dtr\.toml"):
        Settings.load(environ={}, config_file=file)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK must be below WORLD_SIZE"),
        ({"RANK": "-1"}, "RANK must be an integer from 0"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be an integer from 1"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE must be an integer from 1, got 'four'"),
        ({"RANK": "²"}, "RANK must be an integer"),
    ],
)
def test_a_wrong_launcher_variable_is_named(environ: dict[str, str], message: str) -> None:
    """RANK and WORLD_SIZE are checked before anything is joined."""
    with pytest.raises(ConfigError, match=message):
        LauncherEnvironment.load(environ)


def test_the_origin_of_each_setting_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same sources, in the same order, as the values themselves."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dtr.toml").write_text('job = "file"\nttl_s = 7\nslots = 3\n')
    found = Settings.origins(environ={"DTR_JOB": "env", "DTR_TTL_S": "8"}, job="argument")
    told = {name: (found[name].kind, found[name].place) for name in ("job", "ttl_s", "slots", "store")}
    assert told == {"job": ("argument", ""), "ttl_s": ("environment", "DTR_TTL_S"), "slots": ("file", "dtr.toml"), "store": ("default", "")}


@pytest.mark.parametrize("word", ["never", "", "WARN"])
def test_a_word_that_is_no_choice_is_refused(word: str) -> None:
    """The message lists the choices."""
    with pytest.raises(ConfigError, match="on_failed_save must be fatal, warn or rpo"):
        load(on_failed_save=word)
