"""Tensors in the memory of a device, on their way into a slot while the trainer goes on.

The copies of one save run on a stream of their own, behind what the trainer had launched when it saved. What the trainer launches
afterwards on its current stream waits for them on the device, not in Python: so it cannot change a tensor before its bytes are safe, and
may go on at once. (Work that it launches on other streams meanwhile is not ordered, as for any copy.) A slot's memory is registered with
CUDA where that works, which is what makes such a copy truly asynchronous and as fast as the bus.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Copy", "Cuda", "Devices", "Pending"]

log = logging.getLogger(__name__)

_PORTABLE: Final = 1  # cudaHostRegisterPortable: for all devices of the process


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Bytes of host memory, and the device's tensor that is to fill them."""

    target: NDArray[np.uint8]
    source: Any


class Pending(Protocol):
    """Copies that are under way."""

    def wait(self) -> None:
        """Return when no copy is under way any more; raises if one failed."""


class Devices(Protocol):
    """What staging asks of the devices; tests have one of their own."""

    def start(self, copies: Sequence[Copy]) -> Pending:
        """Begin the copies: of the tensors as they are when the work launched so far is done."""

    def pin(self, address: int, size_bytes: int) -> bool:
        """Make host memory known to the devices; False if they won't, and copies are merely slower."""

    def unpin(self, address: int) -> None:
        """Before the memory is unmapped."""


class Cuda:
    """torch's CUDA devices. Other devices copy at once, while the trainer waits."""

    def __init__(self) -> None:
        self._streams: dict[Any, Any] = {}

    def start(self, copies: Sequence[Copy]) -> Pending:
        import torch

        by_device: dict[Any, list[Copy]] = {}
        for copy in copies:
            by_device.setdefault(copy.source.device, []).append(copy)
        events = []
        try:
            for device, group in by_device.items():
                if device.type == "cuda":
                    events.append(self._launch(torch, device, group))
                else:
                    for copy in group:
                        _target_of(torch, copy).copy_(copy.source)
        except BaseException:
            _Launched(events, copies).wait()
            raise
        return _Launched(events, copies)

    def _launch(self, torch: Any, device: Any, group: Iterable[Copy]) -> Any:
        current = torch.cuda.current_stream(device)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        side = self._streams[device]
        side.wait_stream(current)
        event = torch.cuda.Event(blocking=True)
        try:
            with torch.cuda.stream(side):
                for copy in group:
                    _target_of(torch, copy).copy_(copy.source, non_blocking=True)
        finally:
            event.record(side)
            current.wait_event(event)
        return event

    def pin(self, address: int, size_bytes: int) -> bool:
        import torch

        code = int(torch.cuda.cudart().cudaHostRegister(address, size_bytes, _PORTABLE))
        if code == 0:
            return True
        log.info("a staging slot cannot be registered with CUDA (error %d); copies from devices are slower", code)
        try:  # a refusal stays CUDA's last error, and would be raised from whatever the trainer launches next
            torch.zeros(1, device="cuda")
        except RuntimeError as exc:
            log.debug("the refusal was: %s", exc)
        return False

    def unpin(self, address: int) -> None:
        import torch

        torch.cuda.cudart().cudaHostUnregister(address)


class _Launched:
    """Holds on to the tensors until their bytes have arrived."""

    __slots__ = ("_copies", "_events")

    def __init__(self, events: Sequence[Any], copies: Sequence[Copy]) -> None:
        self._events, self._copies = events, copies

    def wait(self) -> None:
        for event in self._events:
            event.synchronize()
        self._copies = ()


def _target_of(torch: Any, copy: Copy) -> Any:
    """Host memory as a tensor of the source's dtype and shape."""
    return torch.from_numpy(copy.target).view(copy.source.dtype).view(copy.source.shape)
