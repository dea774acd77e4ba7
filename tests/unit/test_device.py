"""Tensors on a device (a fake one) arrive in the slot after the call: nothing is visible before, all of it is right afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dtr.checkpoint.format import torch_tensors
from dtr.checkpoint.staging.device import Copy, Cuda
from dtr.checkpoint.staging.reclaim import reclaim
from dtr.checkpoint.staging.slots import scan
from dtr.checkpoint.staging.stage import Stage
from dtr.config import Settings
from dtr.errors import CheckpointError
from tests.stages import kinds, put, settings, take
from tests.waiting import eventually

torch = pytest.importorskip("torch", reason="torch is an extra: pip install dtr[torch]")


class FakeDevices:
    """Copies when it is told to, as a stream does; knows what memory was made known to it."""

    def __init__(self) -> None:
        self.go, self.error, self.pins = threading.Event(), None, []  # type: ignore[var-annotated]
        self.refuses = False

    def start(self, copies: Sequence[Copy]) -> Any:
        def wait() -> None:
            assert self.go.wait(30)
            if self.error is not None:
                raise self.error
            for copy in copies:
                torch.from_numpy(copy.target).view(copy.source.dtype).view(copy.source.shape).copy_(copy.source)

        return SimpleNamespace(wait=wait)

    def pin(self, address: int, size_bytes: int) -> bool:
        self.pins.append(address)
        return not self.refuses

    def unpin(self, address: int) -> None:
        self.pins.remove(address)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Addresses of tensors that are taken to be on the device."""
    addresses: set[int] = set()
    monkeypatch.setattr(torch_tensors, "is_here", lambda value: value.data_ptr() not in addresses)
    return addresses


@pytest.fixture
def devices() -> FakeDevices:
    return FakeDevices()


@pytest.fixture
def stage(devices: FakeDevices) -> Iterator[Stage]:
    made = Stage(devices=devices)
    yield made
    devices.go.set()
    made.close()
    assert not devices.pins, "memory is unpinned before it is unmapped"


@pytest.fixture
def quiet(tmp_path: Path) -> Settings:
    return settings(tmp_path)


def state_of(far: set[int], value: float) -> dict[str, Any]:
    """Tensors on the device, two of them one, and a tensor that is here."""
    on_device = {"w": torch.full((40, 50), value), "bf": torch.full((7,), value).bfloat16(), "t": torch.arange(12.0).view(3, 4).T + value}
    on_device["tied"] = on_device["w"]
    far |= {tensor.data_ptr() for tensor in on_device.values()}
    return {"on": on_device, "here": torch.full((5,), value), "step": int(value)}


def test_staged_when_the_device_has_copied(stage: Stage, devices: FakeDevices, far: set[int], quiet: Settings) -> None:
    """Until then the slot is COPYING and held; then it holds every tensor, bit by bit, those of the host as well; twice over."""
    for step in (1, 2, 3):
        devices.go.clear()
        save, arriving = put(stage, quiet, state_of(far, float(step)), step)
        assert not arriving.done()
        assert kinds(quiet) == ["COPYING"]
        assert save.part is None
        devices.go.set()
        assert arriving.result(30) is None
        assert save.part is not None
        back = take(quiet)
        assert back["step"] == step
        assert back["here"].tolist() == [step] * 5
        for name, tensor in state_of(far, float(step))["on"].items():
            assert torch.equal(back["on"][name], tensor), name
        assert back["on"]["w"].untyped_storage().data_ptr() == back["on"]["tied"].untyped_storage().data_ptr()


def test_the_second_save_fills_the_other_slot_meanwhile(stage: Stage, devices: FakeDevices, far: set[int], quiet: Settings) -> None:
    """Two saves on their way at once end in their order."""
    arriving = [put(stage, quiet, state_of(far, float(step)), step)[1] for step in (1, 2)]
    eventually(lambda: kinds(quiet) == ["COPYING", "COPYING"], what="two slots that fill")
    devices.go.set()
    assert [future.result(30) for future in arriving] == [None, None]
    assert sorted(found.record.step for found in scan(quiet.staging) if found.kind == "STAGED" and found.record) == [1, 2]


def test_a_device_that_fails(stage: Stage, devices: FakeDevices, far: set[int], quiet: Settings) -> None:
    """The save fails with what the device said, the slot is free again, and the next save works."""
    devices.error = RuntimeError("an illegal memory access was encountered")
    devices.go.set()
    save, arriving = put(stage, quiet, state_of(far, 1.0))
    with pytest.raises(CheckpointError, match="illegal memory access"):
        arriving.result(30)
    assert save.part is None
    assert kinds(quiet) == []
    devices.error = None
    put(stage, quiet, state_of(far, 2.0))[1].result(30)
    assert take(quiet)["step"] == 2


@pytest.mark.parametrize("refuses", [False, True])
def test_slots_are_pinned_once(stage: Stage, devices: FakeDevices, far: set[int], quiet: Settings, refuses: bool) -> None:
    """Each slot's memory is made known when the first save from a device uses it, the slots made ahead as well; a refusal is no error."""
    devices.refuses = refuses
    put(stage, quiet, {"here": torch.ones(3)})
    assert take(quiet)["here"].tolist() == [1, 1, 1]
    assert devices.pins == []
    devices.go.set()
    for step in range(4):
        put(stage, quiet, state_of(far, float(step)), step)[1].result(30)
        assert take(quiet)["step"] == step
    assert 1 <= len(set(devices.pins)) == len(devices.pins) <= 2
    if refuses:
        devices.pins.clear()


def test_close_waits_for_what_is_on_its_way(devices: FakeDevices, far: set[int], quiet: Settings) -> None:
    """Memory that a device writes to is not unmapped."""
    stage = Stage(devices=devices)
    _, arriving = put(stage, quiet, state_of(far, 1.0))
    closing = threading.Thread(target=stage.close)
    closing.start()
    devices.go.set()
    closing.join(30)
    assert arriving.done()
    assert take(quiet)["step"] == 1
    assert not devices.pins


TRAINER = """
import sys
from dtr.checkpoint.format import torch_tensors
from dtr.checkpoint.staging.stage import Stage
from tests.stages import put, settings
from tests.unit.test_device import FakeDevices, state_of
far, devices = set(), FakeDevices()
torch_tensors.is_here = lambda value: value.data_ptr() not in far
devices.go.set()
stage = Stage(devices=devices)
put(stage, settings(sys.argv[1]), state_of(far, 1.0))[1].result(30)
"""


@pytest.mark.parametrize("name", ["stage.before_arrival", "stage.after_arrival", "stage.before_staged_record", "stage.after_staged_record"])
def test_a_trainer_that_is_killed_meanwhile(tmp_path: Path, name: str) -> None:
    """Before the bytes are there and said to be, the slot is torn; afterwards the part is whole. Nothing else stays."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "DTR_TESTING": "1", "DTR_FAILPOINT": f"{name}=kill"}
    child = subprocess.run([sys.executable, "-c", TRAINER, str(tmp_path)], env=env, timeout=120)
    assert child.returncode == -signal.SIGKILL
    quiet = settings(tmp_path)
    assert kinds(quiet) == (["STAGED"] if name == "stage.after_staged_record" else ["TORN"])
    if name == "stage.after_staged_record":
        assert take(quiet)["on"]["bf"].tolist() == [1.0] * 7
    reclaim(str(tmp_path))
    assert os.listdir(tmp_path) == []


class Recorded:
    """Writes down what is asked of it, by name, as a stream or an event."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self._said = name, said

    def __getattr__(self, word: str) -> Any:
        return lambda *arguments: self._said.append(f"{self.name}.{word}({', '.join(a.name for a in arguments)})")


def test_the_order_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The side stream begins behind the trainer's, and the trainer's goes on behind the copies: nothing is changed under them."""
    said: list[str] = []
    trainer, side, event = (Recorded(name, said) for name in ("trainer", "side", "event"))

    @contextlib.contextmanager
    def on(stream: Recorded) -> Iterator[None]:
        said.append(f"on {stream.name}")
        yield
        said.append("off")

    cuda = SimpleNamespace(
        current_stream=lambda device: trainer, Stream=lambda device: side, Event=lambda blocking: event, stream=on
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", cuda)
    target = np.zeros(8, np.uint8)
    source = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32, shape=(2,))
    filled = []
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, given, non_blocking: (filled.append((self.shape, non_blocking)), said.append("copy"))
    )
    Cuda().start([Copy(target=target, source=source)]).wait()
    assert said == [
        "side.wait_stream(trainer)", "on side", "copy", "off", "event.record(side)", "trainer.wait_event(event)", "event.synchronize()",
    ]  # fmt: skip
    assert filled == [((2,), True)]
