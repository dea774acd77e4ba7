"""torch tensors bit by bit, where torch is installed."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest

from dtr.checkpoint.format import tensors, tree
from dtr.checkpoint.format.structure import Structures
from dtr.checkpoint.format.tree import TREE
from dtr.checkpoint.staging.device import Cuda
from dtr.errors import UnsupportedLeaf
from tests.unit.test_tree import round_trip

torch = pytest.importorskip("torch", reason="torch is an extra: pip install dtr[torch]")
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

DTYPES = [
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64", "bfloat16",
    "complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip


def bits(tensor: Any) -> bytes:
    size = tensor.element_size()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
        size //= 2
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return bytes(tensor.contiguous().view(integers).numpy().tobytes())


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and a.requires_grad == b.requires_grad and bits(a) == bits(b)


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_layout(dtype: str, readonly: bool) -> None:
    """Random bits in every dtype: contiguous, transposed, strided, 0-d and empty."""
    kind = getattr(torch, dtype)
    count = 24 * torch.empty(0, dtype=kind).element_size()
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (count,), dtype=torch.uint8)
    plain = raw.view(kind).reshape(4, 6)
    state = {"plain": plain, "transposed": plain.T, "strided": plain[::2, 1:5:2], "scalar": plain[0, 0], "empty": plain[:0]}
    back = round_trip(state, readonly=readonly)
    for name, tensor in state.items():
        assert same(tensor, back[name]), name


def test_a_module_and_its_optimizer() -> None:
    """state_dict() of both, and the Parameters themselves, keep type, order and requires_grad."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    model[1].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "parameters": dict(model.named_parameters())}
    back = round_trip(state)
    assert type(back["model"]) is collections.OrderedDict
    assert list(back["model"]) == list(state["model"])
    assert all(same(tensor, back["model"][name]) for name, tensor in state["model"].items())
    assert all(same(tensor, back["parameters"][name]) for name, tensor in state["parameters"].items())
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    other.load_state_dict(back["model"])
    torch.optim.AdamW(other.parameters()).load_state_dict(back["optimizer"])
    assert same(other[0].weight.detach(), model[0].weight.detach())


def test_a_conjugate_and_a_negative_view() -> None:
    """Views whose bits are not their values are resolved."""
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    back = round_trip({"conj": tensor.conj(), "imag": tensor.conj().imag})
    assert back["conj"].tolist() == [1 - 2j, 3 + 4j]
    assert back["imag"].tolist() == [-2.0, 4.0]


def test_tied_weights() -> None:
    """One storage under two names, as Parameters and as tensors of a state_dict: stored once, one storage again."""
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    for state in (model.state_dict(), dict(model.named_parameters(remove_duplicate=False))):
        assert len(state) == 2
        assert len(tree.flatten(state)[1]) == 1
        for readonly in (False, True):
            back = list(round_trip(state, readonly=readonly).values())
            assert all(same(one, other) for one, other in zip(back, state.values(), strict=True))
            assert back[0].untyped_storage().data_ptr() == back[1].untyped_storage().data_ptr()
            with torch.no_grad():
                back[0][:] = 7
            assert bool((back[1] == 7).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "complex32", "complex128"])
def test_a_flat_buffer_and_its_views(dtype: str) -> None:
    """What optimizers do: one buffer, parameters as windows of it, one of them transposed; beside it or without it."""
    buffer = torch.randint(0, 256, (64 * 16,), dtype=torch.uint8).view(getattr(torch, dtype))
    views = {"a": buffer[:12].view(3, 4), "b": buffer[8:24].view(4, 4).T, "c": buffer[20:32:2]}
    for state in ({"buffer": buffer, **views}, views):
        assert len(tree.flatten(state)[1]) == 1
        back = round_trip(state)
        assert all(same(state[name], back[name]) for name in state)
        assert len({tensor.untyped_storage().data_ptr() for tensor in back.values()}) == 1


def test_an_array_and_a_tensor_share_memory() -> None:
    """torch.from_numpy: two kinds of value, one tensor in the file, and in memory again."""
    array = np.arange(6, dtype=np.float32)
    back = round_trip({"array": array, "tensor": torch.from_numpy(array), "half": torch.from_numpy(array)[3:]})
    back["array"][:] = 9
    assert back["tensor"].tolist() == [9.0] * 6
    assert back["half"].tolist() == [9.0] * 3


def test_a_kept_layout_writes_the_same_tensors() -> None:
    """The second save of a structure, with Parameters, bfloat16, conjugate views and ties: bit by bit as the first would."""
    known = Structures()
    for seed in range(4):
        torch.manual_seed(seed)
        w = torch.randn(4, 6)
        pair = torch.randn(3, dtype=torch.complex64)
        state = {
            "w": torch.nn.Parameter(w), "tied": w, "bf": torch.randn(5, 3).bfloat16().T, "c": pair, "conj": pair.conj(),
            "neg": pair.conj().imag, "f8": torch.randn(7).to(torch.float8_e5m2), "grad": torch.randn(2, requires_grad=True), "step": seed,
        }  # fmt: skip
        laid = known.lay_out(state, {})
        buffer = bytearray(laid.size_bytes)
        assert laid.copy_into(buffer, Cuda()) is None
        part = tensors.read(buffer)
        back = tree.unflatten(tree.decode(part.metadata[TREE]), part.tensors)
        for name in ("w", "tied", "bf", "c", "f8"):
            assert same(back[name], state[name]), name
        assert back["conj"].tolist() == state["conj"].tolist()
        assert back["neg"].tolist() == state["neg"].tolist()
        assert back["grad"].tolist() == state["grad"].tolist()
        assert list(part.tensors).count("tied") == 0
    assert len(known._known) == 1


def test_restored_tensors_can_be_trained() -> None:
    """They are writable, and do not share memory with what was saved."""
    tensor = torch.ones(3, requires_grad=True)
    back = round_trip([tensor])[0]
    back += 1
    assert tensor.tolist() == [1, 1, 1]
    assert back.tolist() == [2, 2, 2]
    assert back.requires_grad is False  # of a plain tensor: a Parameter keeps it


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.eye(2).to_sparse(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "quantized"),
        (lambda: torch.empty(2, device="meta"), "meta device"),
        (lambda: torch.Size([1]), "Size"),
        (lambda: torch.nn.Linear(1, 1), "Linear"),
        (lambda: torch.float32, "dtype"),
        (torch.Generator, "Generator"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_has_no_plain_bytes(make: Any, said: str) -> None:
    """Refused by name, with its path."""
    with pytest.raises(UnsupportedLeaf, match=said) as caught:
        round_trip({"a": [make()]})
    assert caught.value.path == 'state["a"][0]'
