"""A language model of bytes: which byte follows the last few. An embedding, one hidden layer, a softmax; numpy only.

Guarantees: the same seed and the same batches give the same weights, bit for bit, on one machine; gradients are exact (a test
compares them with finite differences). All weights lie in one flat array, so that they are averaged and updated in one go.

The model is that of Bengio, Ducharme, Vincent and Jauvin, "A neural probabilistic language model" (2003), with bytes for words and
max(0, x) for tanh; the optimizer is Adam (Kingma and Ba, 2015).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALPHABET", "Adam", "ByteModel", "Shape", "digest", "load", "state_of"]

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

ALPHABET: Final = 256
_PIECE: Final = 1 << 15  # the optimizer works on pieces that stay in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes: the model sees the last ``context`` bytes, each as ``embedding`` numbers, through ``hidden`` units."""

    context: int = 16
    embedding: int = 64
    hidden: int = 2048

    def parts(self) -> dict[str, tuple[int, ...]]:
        """Each array of the model and its shape, in their order in the flat array."""
        return {
            "embedding": (ALPHABET, self.embedding),
            "hidden_weight": (self.context * self.embedding, self.hidden),
            "hidden_bias": (self.hidden,),
            "output_weight": (self.hidden, ALPHABET),
            "output_bias": (ALPHABET,),
        }

    @property
    def parameters(self) -> int:
        """How many numbers there are to learn."""
        return sum(math.prod(part) for part in self.parts().values())

    @property
    def text_bytes(self) -> int:
        """The text of one sample is the context and the byte to predict."""
        return self.context + 1

    def views(self, flat: Floats) -> dict[str, Floats]:
        """The arrays by name, as views of a flat array."""
        found, begin = {}, 0
        for name, part in self.parts().items():
            end = begin + math.prod(part)
            found[name] = flat[begin:end].reshape(part)
            begin = end
        return found


class ByteModel:
    """The weights, and what to do with a batch of samples (uint8, one a row)."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        self.flat: Floats = np.zeros(shape.parameters, dtype=np.float32)
        self.weights = shape.views(self.flat)
        random = np.random.Generator(np.random.PCG64(seed))
        scales = {
            "embedding": 0.5,
            "hidden_weight": 2.0 / math.sqrt(shape.context * shape.embedding),
            "output_weight": 0.1 / math.sqrt(shape.hidden),
        }
        for name, scale in scales.items():
            self.weights[name][...] = random.standard_normal(self.weights[name].shape, dtype=np.float32) * np.float32(scale)

    def gradient(self, samples: Bytes, out: Floats) -> float:
        """Write the gradient of the mean loss over ``samples`` into the flat array ``out``, and return that loss in nats a byte."""
        weights, slopes = self.weights, self.shape.views(out)
        context, wanted = samples[:, :-1], samples[:, -1]
        each = np.arange(len(samples))
        seen: Floats = weights["embedding"][context].reshape(len(samples), -1)
        hidden: Floats = seen @ weights["hidden_weight"] + weights["hidden_bias"]
        np.maximum(hidden, 0.0, out=hidden)
        scores: Floats = hidden @ weights["output_weight"] + weights["output_bias"]
        chances = _softmax(scores)
        loss = -float(np.mean(np.log(chances[each, wanted] + np.float32(1e-30))))

        chances[each, wanted] -= 1.0  # from here on: the slope at the output
        chances /= np.float32(len(samples))
        np.matmul(hidden.T, chances, out=slopes["output_weight"])
        np.sum(chances, axis=0, out=slopes["output_bias"])
        at_hidden = chances @ weights["output_weight"].T
        at_hidden *= hidden > 0.0
        np.matmul(seen.T, at_hidden, out=slopes["hidden_weight"])
        np.sum(at_hidden, axis=0, out=slopes["hidden_bias"])
        at_embedding = (at_hidden @ weights["hidden_weight"].T).reshape(-1, self.shape.embedding)
        slopes["embedding"][...] = 0.0
        np.add.at(slopes["embedding"], context.reshape(-1), at_embedding)
        return loss

    def next_byte(self, context: Bytes) -> Floats:
        """How likely each byte is to follow ``context``, which has the shape's length."""
        weights = self.weights
        hidden = weights["embedding"][context].reshape(1, -1) @ weights["hidden_weight"] + weights["hidden_bias"]
        scores: Floats = np.maximum(hidden, 0.0) @ weights["output_weight"] + weights["output_bias"]
        return _softmax(scores).reshape(-1)


def _softmax(scores: Floats) -> Floats:
    """Rows that sum to 1; overwrites its argument."""
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    return scores


class Adam:
    """The optimizer: two moments of each weight's slope, and how many updates they have seen."""

    def __init__(self, parameters: int, *, rate: float = 0.002, decay: float = 0.9, square_decay: float = 0.99) -> None:
        self.first: Floats = np.zeros(parameters, dtype=np.float32)
        self.second: Floats = np.zeros(parameters, dtype=np.float32)
        self.updates = 0
        self._rate, self._decay, self._square_decay = rate, decay, square_decay
        self._scratch: Floats = np.empty(min(_PIECE, parameters), dtype=np.float32)

    def update(self, flat: Floats, slope: Floats) -> None:
        """Move ``flat`` against ``slope``, in place."""
        self.updates += 1
        rate = self._rate * math.sqrt(1 - self._square_decay**self.updates) / (1 - self._decay**self.updates)
        for begin in range(0, len(flat), _PIECE):
            piece = slice(begin, begin + _PIECE)
            first, second, slopes = self.first[piece], self.second[piece], slope[piece]
            scratch = self._scratch[: len(slopes)]
            first *= np.float32(self._decay)
            first += np.multiply(slopes, np.float32(1 - self._decay), out=scratch)
            second *= np.float32(self._square_decay)
            np.multiply(slopes, slopes, out=scratch)
            scratch *= np.float32(1 - self._square_decay)
            second += scratch
            np.sqrt(second, out=scratch)
            scratch += np.float32(1e-8)
            np.divide(first, scratch, out=scratch)
            scratch *= np.float32(rate)
            flat[piece] -= scratch


def state_of(model: ByteModel, optimizer: Adam) -> dict[str, Any]:
    """All that has to be saved, by name, without a copy."""
    return {
        "model": dict(model.weights),
        "optimizer": {"first": optimizer.first, "second": optimizer.second, "updates": optimizer.updates},
    }


def load(state: Mapping[str, Any], model: ByteModel, optimizer: Adam) -> None:
    """Take over what `state_of` gave; raises KeyError or ValueError if it is of another model."""
    for name, array in model.weights.items():
        array[...] = state["model"][name]
    optimizer.first[...] = state["optimizer"]["first"]
    optimizer.second[...] = state["optimizer"]["second"]
    optimizer.updates = int(state["optimizer"]["updates"])


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 over every bit of what `state_of` gave, with names, types and shapes."""
    total = hashlib.sha256(str(state["optimizer"]["updates"]).encode())
    arrays = {**state["model"], "first": state["optimizer"]["first"], "second": state["optimizer"]["second"]}
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype.str} {array.shape};".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
