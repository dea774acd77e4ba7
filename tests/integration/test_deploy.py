"""The services of the compose file, run by their own commands and judged by their own health checks, without Docker.

What Docker would map is mapped here: host names to 127.0.0.1, mounted folders to the test's, ports to free ones.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from dtr.stack import server
from tests.servers import free_port
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
STEPS = 60
HEALTHY_WITHIN_S = 120.0


class Containers:
    """The services as processes of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        loaded: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "deploy" / "compose.yaml")
        self.services: dict[str, dict[str, Any]] = loaded["services"]
        self.redis_port, self.flower_port = free_port(), free_port()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("bin", "data", "home", "store"):
            (folder / name).mkdir()
        self._programs()

    def _programs(self) -> None:
        """What the images have on their PATH, by the names that the file uses."""
        binary = server.find(self.folder / "data")
        client = f'PATH=/none exec {sys.executable} -m dtr redis-cli --url redis://127.0.0.1:{self.redis_port}/0 "$@"'
        scripts = {"redis-server": f'exec {binary.path} "$@"', "redis-cli": client, "python": f'exec {sys.executable} "$@"'}
        scripts["dtr"] = f'exec {sys.executable} -m dtr "$@"'
        scripts["celery"] = f'exec {sys.executable} -m celery "$@"'
        for name, body in scripts.items():
            path = self.folder / "bin" / name
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)

    def mapped(self, text: str) -> str:
        """One word of a command or one value of the environment, with what Docker maps replaced."""
        replaced = {
            "redis://redis:6379": f"redis://127.0.0.1:{self.redis_port}",
            "file:///store": f"file://{self.folder / 'store'}",
            "/etc/redis.conf": str(ROOT / "deploy" / "redis.conf"),
            "/opt/dtr/train.py": str(ROOT / "deploy" / "train.py"),
            "0.0.0.0": "127.0.0.1",
            "5555": str(self.flower_port),
        }
        whole = {"/data": str(self.folder / "data"), "/staging": str(self.folder / "staging")}
        for old, new in {**replaced, "$$": "$"}.items():
            text = text.replace(old, new)
        return whole.get(text, text)

    def environment(self, name: str) -> dict[str, str]:
        given = {key: self.mapped(value) for key, value in self.services[name].get("environment", {}).items()}
        return {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", **given}

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def start(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        command = [*map(self.mapped, self.services[name]["command"]), *more]
        if name == "redis":
            command += ["--port", str(self.redis_port)]
        with (self.folder / f"{name}.log").open("wb") as log:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(name),
                cwd=self.folder / "home",
                executable=str(self.folder / "bin" / command[0]),
            )
        self.running[name] = child
        return child

    def healthy(self, name: str) -> bool:
        """What the service's own health check says."""
        kind, *words = self.services[name]["healthcheck"]["test"]
        command = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        command = [self.mapped(word) for word in command]
        assert self.running[name].poll() is None, f"{name} has ended:\n{self.log(name)}"
        done = subprocess.run(command, env=self.environment(name), cwd=self.folder / "home", capture_output=True, timeout=60, check=False)
        return done.returncode == 0

    def start_healthy(self, name: str) -> None:
        for other, condition in self.services[name].get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert other in self.running, f"{name} needs {other} first"
        self.start(name)
        eventually(lambda: self.healthy(name), timeout_s=HEALTHY_WITHIN_S, what=f"the health of {name}")

    def stop(self, name: str) -> int:
        """As `docker compose stop` does: SIGTERM, and SIGKILL when the grace is over; the status."""
        grace_s = int(self.services[name].get("stop_grace_period", "10s").removesuffix("s"))
        child = self.running.pop(name)
        child.terminate()
        try:
            return child.wait(grace_s)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[Containers]:
    made = Containers(tmp_path)
    yield made
    for child in made.running.values():
        child.terminate()
    for child in made.running.values():
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def test_the_composed_services_train_and_commit(containers):
    """Redis, uploader and Flower become healthy, four trainers finish on them, and all end when asked to."""
    for name in ("redis", "uploader", "flower"):
        containers.start_healthy(name)
    trainers = containers.start("trainers", str(STEPS))
    assert eventually(lambda: trainers.poll() is not None, timeout_s=180, what="the end of training") is True
    assert trainers.returncode == 0, containers.log("trainers")
    assert containers.log("trainers").count(f"done after {64 * STEPS} samples") == 4
    containers.running.pop("trainers")
    listed = subprocess.run(
        shlex.split(f"dtr ckpt ls --job {containers.services['trainers']['environment']['DTR_JOB']}"),
        env=containers.environment("trainers"),
        executable=str(containers.folder / "bin" / "dtr"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(STEPS - 1) in listed.stdout
    assert list((containers.folder / "store").rglob("manifest.json"))
    containers.stop("flower")
    assert containers.stop("uploader") == 0
    assert containers.stop("redis") == 0
