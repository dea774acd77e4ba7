"""The files for deployment say what the code does: compose, Dockerfile, redis.conf, systemd, packaging, Makefile."""

from __future__ import annotations

import configparser
import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from dtr.config import Settings
from dtr.stack.server import CONFIG_FILE
from dtr.stack.services import Service, flower_service, uploader_service

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe", pure=True).load(DEPLOY / "compose.yaml")
    return loaded


def celery(service: Service) -> list[str]:
    """The service's command as a person would type it."""
    assert service.argv[:3] == (sys.executable, "-m", "celery")
    return ["celery", *service.argv[3:]]


def check_schema(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_compose_is_valid():
    """By the schema of the Compose specification."""
    done = check_schema(DEPLOY / "compose.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_bites(tmp_path):
    """A misspelt key is refused, so the test above means something."""
    broken = tmp_path / "compose.yaml"
    broken.write_text((DEPLOY / "compose.yaml").read_text().replace("shm_size", "shm_sise"))
    assert check_schema(broken).returncode != 0


def test_redis_conf_is_that_of_dtr_up():
    """One truth in two places, since the package cannot read deploy/ and deploy/ must stand alone."""
    assert (DEPLOY / "redis.conf").read_bytes() == CONFIG_FILE.read_bytes()


def test_compose_runs_what_dtr_up_runs(compose):
    """The commands are those of the local stack, but for the addresses inside the network."""
    settings = Settings.load(environ={})
    assert compose["services"]["uploader"]["command"] == celery(uploader_service(settings))
    flower = celery(flower_service(settings))
    port = next(word for word in flower if word.startswith("--port="))
    local = [word.replace("0.0.0.0", "127.0.0.1").replace("--port=5555", port) for word in compose["services"]["flower"]["command"]]
    assert local == flower
    server = compose["services"]["redis"]["command"]
    assert server[:2] == ["redis-server", "/etc/redis.conf"]
    assert set(server[2::2]) == {"--bind", "--protected-mode", "--dir"}, "whatever else is set belongs into redis.conf"
    assert "./redis.conf:/etc/redis.conf:ro" in compose["services"]["redis"]["volumes"]


def test_compose_trains_with_four_workers_that_share_staging(compose):
    """Trainers and uploader see one staging and one store; shared memory is larger than Docker's default."""
    trainers, uploader = compose["services"]["trainers"], compose["services"]["uploader"]
    words = trainers["command"]
    assert words[:2] == ["dtr", "run"]
    assert words[words.index("-n") + 1] == "4"
    assert trainers["volumes"] == uploader["volumes"] == ["staging:/staging", "store:/store"]
    assert compose["volumes"]["staging"]["driver_opts"]["type"] == "tmpfs"
    assert trainers["shm_size"] == "1gb"
    for service in (trainers, uploader, compose["services"]["flower"]):
        assert service["environment"]["DTR_STAGING"] == "/staging"
        assert service["environment"]["DTR_REDIS_URL"] == "redis://redis:6379/0"


def test_every_setting_in_compose_exists(compose):
    """A misspelt variable would stop each container at its start."""
    for name, service in compose["services"].items():
        if "environment" in service:
            Settings.load(environ=service["environment"])
        assert "healthcheck" in service, name


def test_compose_shows_nothing_to_the_outside(compose):
    """Redis has no password there, and Flower has no login: neither is reachable from another machine."""
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:5555:5555"]


def docker_instructions() -> list[list[str]]:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_image_is_not_root_and_keeps_no_cache():
    """The last user is an ordinary one, and no pip leaves its cache in a layer."""
    instructions = docker_instructions()
    assert [words[1] for words in instructions if words[0] == "USER"][-1] == "dtr"
    for words in instructions:
        if words[0] == "RUN" and "pip" in words:
            assert "--no-cache-dir" in words


def test_what_the_image_copies_exists_and_is_sent():
    """.dockerignore sends nothing but what is named there."""
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for words in docker_instructions() if words[0] == "COPY" for source in words[1:-1]}
    assert copied == sent
    assert "pyproject.toml" in copied
    missing = [source for source in copied if not (ROOT / source).exists()]
    assert missing == []


def test_wheels_hold_every_file_of_the_packages():
    """Scripts and settings beside the Python files are package data; one that is forgotten works in a checkout only."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["*"]
    others = [
        path
        for package in ("dtr", "worker_agent", "tasks")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    ]
    assert len(others) > 3
    assert [path for path in others if not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)] == []


def test_systemd_runs_the_uploader_as_dtr_up_does():
    """The same command, an end that lets uploads finish, and a user that is not root."""
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "systemd" / "dtr-uploader.service")
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert [Path(program).name, *words] == celery(uploader_service(Settings.load(environ={})))
    assert int(unit["Service"]["TimeoutStopSec"]) > uploader_service(Settings.load(environ={})).grace_s
    assert unit["Service"]["KillMode"] == "mixed"
    assert unit["Service"]["User"] == "dtr"


def test_make_knows_its_commands():
    """Those that README, CI and people use."""
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):.*## ", text, re.MULTILINE))
    assert {"demo", "test", "check", "bench", "soak", "venv"} <= targets
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == targets


def test_ci_is_a_sound_script():
    """Executable, and free of syntax errors."""
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
