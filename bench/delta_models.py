"""Small models that really learn, in numpy, one for each way in which little of a large state changes between two saves.

Each has ``state()``, what a trainer would save, and ``train()``, which does a few optimizer steps by gradients of a loss on random data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["MODELS", "Model"]

Array = NDArray[Any]  # of float32
MIB: Final = 1 << 20
_WIDTH: Final = 1024
_LAYER_BYTES: Final = 4 * _WIDTH * _WIDTH
_BATCH: Final = 8
_RANK: Final = 8


class Model(Protocol):
    """What a case needs."""

    def state(self) -> dict[str, Any]:
        """The state, as it is saved."""

    def train(self) -> float:
        """A few steps; the last loss."""


class _Adam:
    """The optimizer of some of a model's arrays, which it changes in place."""

    def __init__(self, params: dict[str, Array]) -> None:
        self._params = params
        self.m = {name: np.zeros_like(array) for name, array in params.items()}
        self.v = {name: np.zeros_like(array) for name, array in params.items()}
        self.step = 0

    def apply(self, gradients: dict[str, Array], rate: float = 1e-3) -> None:
        self.step += 1
        for name, gradient in gradients.items():
            self.m[name] *= 0.9
            self.m[name] += 0.1 * gradient
            self.v[name] *= 0.999
            self.v[name] += 0.001 * gradient * gradient
            step = rate / (1 - 0.9**self.step)
            self._params[name] -= step * self.m[name] / (np.sqrt(self.v[name] / (1 - 0.999**self.step)) + 1e-8)

    def state(self) -> dict[str, Any]:
        return {"m": self.m, "v": self.v, "step": self.step}


class Layers:
    """A stack of tanh layers.

    ``trained``: the share of the layers whose weights learn; ``adapters``: a low-rank one beside every weight learns instead.
    """

    def __init__(self, size_bytes: int, seed: int, *, trained: float = 1.0, adapters: bool = False, width: int = _WIDTH) -> None:
        self._chooser = np.random.default_rng(seed)
        per_layer = 4 * width * width
        count = max(2, round(size_bytes / (per_layer * (1 + 2 * trained * (not adapters)))))
        self._width = width
        self.weights = {f"layers.{n}.weight": self._random(width, width) for n in range(count)}
        self.lora: dict[str, Array] = {}
        learning = dict(list(self.weights.items())[count - max(1, round(count * trained)) :])
        if adapters:
            for n in range(count):
                self.lora[f"layers.{n}.a"], self.lora[f"layers.{n}.b"] = self._random(_RANK, width), np.zeros((width, _RANK), np.float32)
            learning = self.lora
        self._learning = learning
        self._adam = _Adam(learning)
        self._x, self._y = self._random(_BATCH, width) * 30, self._random(_BATCH, width) * 10

    def _random(self, *shape: int) -> Array:
        return self._chooser.standard_normal(shape, np.float32) / np.float32(np.sqrt(self._width))

    def state(self) -> dict[str, Any]:
        return {"model": {**self.weights, **self.lora}, "optimizer": self._adam.state()}

    def train(self) -> float:
        loss = 0.0
        for _ in range(2):
            inputs = self._forward()
            difference = inputs[-1] - self._y
            loss = float((difference * difference).mean())
            self._adam.apply(self._gradients(inputs, difference / difference.size))
        return loss

    def _forward(self) -> list[Array]:
        inputs = [self._x]
        for n in range(len(self.weights)):
            inputs.append(np.tanh(inputs[-1] @ self._weight(n).T))
        return inputs

    def _weight(self, n: int) -> Array:
        weight = self.weights[f"layers.{n}.weight"]
        return weight + self.lora[f"layers.{n}.b"] @ self.lora[f"layers.{n}.a"] if self.lora else weight

    def _gradients(self, inputs: Sequence[Array], upward: Array) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for n in reversed(range(len(self.weights))):
            inner = upward * (1 - inputs[n + 1] ** 2)
            if self.lora:
                a, b = self.lora[f"layers.{n}.a"], self.lora[f"layers.{n}.b"]
                found[f"layers.{n}.b"] = inner.T @ (inputs[n] @ a.T)
                found[f"layers.{n}.a"] = (inner @ b).T @ inputs[n]
            elif f"layers.{n}.weight" in self._learning:
                found[f"layers.{n}.weight"] = inner.T @ inputs[n]
            else:
                break  # nothing below learns
            upward = inner @ self._weight(n)
        return found


class Embedding:
    """A table whose rows are ordered by how often they occur; between two saves a Zipf sample of them learns by row-wise Adagrad."""

    def __init__(self, size_bytes: int, seed: int, *, columns: int = 256, tokens: int = 2048) -> None:
        self._chooser = np.random.default_rng(seed)
        rows = max(1024, size_bytes // (4 * columns + 4))
        self.table = self._chooser.standard_normal((rows, columns), np.float32)
        self.squares = np.zeros(rows, np.float32)
        self._target = self._chooser.standard_normal(columns, np.float32)
        self._tokens = tokens

    def state(self) -> dict[str, Any]:
        return {"embedding": self.table, "optimizer": {"squares": self.squares}}

    def train(self) -> float:
        rows = np.unique(np.minimum(self._chooser.zipf(1.5, self._tokens), len(self.table)) - 1)
        gradients = self.table[rows] - self._target
        self.squares[rows] += (gradients * gradients).mean(axis=1)
        self.table[rows] -= 0.1 * gradients / np.sqrt(self.squares[rows])[:, None]
        return float((gradients * gradients).mean())


def _lora(size_bytes: int, seed: int) -> Model:
    return Layers(size_bytes, seed, adapters=True, width=_fitting(size_bytes))


def _frozen(size_bytes: int, seed: int) -> Model:
    return Layers(size_bytes, seed, trained=0.03, width=_fitting(size_bytes))


def _full(size_bytes: int, seed: int) -> Model:
    return Layers(size_bytes, seed, width=_fitting(size_bytes))


def _fitting(size_bytes: int) -> int:
    """Layers of 4 MiB, or smaller ones where the state has no room for a few of these."""
    return _WIDTH if size_bytes >= 16 * _LAYER_BYTES else 256


MODELS: Final = {"lora": _lora, "frozen": _frozen, "embedding": Embedding, "full": _full}
