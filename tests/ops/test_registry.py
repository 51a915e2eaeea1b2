"""Implementations enter themselves: what auto takes, what an explicit choice raises, and what an import costs."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffdeploy.errors import DiffDeployError, InputError, UnavailableError
from diffdeploy.ops import Impl, diff_attention, registry
from diffdeploy.ops.registry import Implementation, cheapest, implementation
from diffdeploy.ops.request import Keys, Request
from tests.support.operator_inputs import random_inputs, side_by_side

LAMBDA = torch.tensor(0.4)


class Sizeless(Request):
    """A request in a trace, where a comparison of a size would become a guard."""

    @property
    def length(self) -> int:
        raise AssertionError("a rule looked at the queries")

    @property
    def key_length(self) -> int:
        raise AssertionError("a rule looked at the keys")


def request(
    queries: int, keys: int, held: Keys = Keys.STREAMS, dtype: torch.dtype = torch.float32, heads: int = 4
) -> Request:
    q, k, v = random_inputs(heads, 2, queries, keys, dtype=dtype, shared_keys=held == Keys.SHARED)
    return Request.of(q, side_by_side(k) if held == Keys.PAIRED else k, v, LAMBDA, causal=True)


def test_every_name_is_an_implementation_but_auto() -> None:
    assert [impl for impl in Impl if impl != Impl.AUTO] == sorted(registry._TABLE, key=list(Impl).index)
    with pytest.raises(InputError, match="auto is not an implementation"):
        implementation(Impl.AUTO)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (request(1, 64, Keys.PAIRED), Impl.ROWS),
        (request(1, 64, Keys.PAIRED, torch.bfloat16), Impl.ROWS),
        (request(1, 64, Keys.SHARED), Impl.ROWS),
        (request(64, 64), Impl.CHUNKED),
        (request(64, 64, Keys.PAIRED), Impl.CHUNKED),
        (request(64, 64, Keys.SHARED, torch.bfloat16), Impl.CHUNKED),
        (request(8, 8), Impl.PADDED),
        (request(64, 64, dtype=torch.float16), Impl.STACKED_WIDE),
    ],
    ids=lambda value: value if isinstance(value, str) else f"S{value.length}-T{value.key_length}-{value.keys}",
)
def test_what_auto_takes_on_a_cpu(asked: Request, expected: Impl) -> None:
    assert cheapest(asked).impl == expected


def test_training_keeps_no_probabilities() -> None:
    asked = request(64, 64)
    assert cheapest(replace(asked, q=asked.q.requires_grad_())).impl == Impl.PADDED


@pytest.mark.parametrize(
    ("held", "expected"), [(Keys.STREAMS, Impl.PADDED), (Keys.PAIRED, Impl.ROWS), (Keys.SHARED, Impl.ROWS)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_in_a_trace_no_rule_looks_at_a_size(held: Keys, expected: Impl, dtype: torch.dtype) -> None:
    fields = {name: getattr(request(1, 64, held, dtype), name) for name in Request.__dataclass_fields__}
    assert cheapest(Sizeless(**{**fields, "traced": True})).impl == expected


def test_another_implementation_is_one_more_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes pairs of its own width: auto takes it where it can, and a choice of it says why it cannot."""
    monkeypatch.delitem(registry._TABLE, Impl.FLASH2)
    taken: list[Request] = []

    def supports(asked: Request) -> DiffDeployError | None:
        return None if asked.keys == Keys.PAIRED else UnavailableError(f"this kernel reads pairs, not {asked.keys}")

    @registry.register(Impl.FLASH2, supports=supports, cost=0.01, num_attentions=1)
    def kernel(asked: Request) -> Tensor:
        taken.append(asked)
        return asked.q[:, ::2]

    asked = request(1, 64, Keys.PAIRED)
    diff_attention(asked.q, asked.k, asked.v, LAMBDA, causal=True)
    assert len(taken) == 1
    streams = request(1, 64)
    diff_attention(streams.q, streams.k, streams.v, LAMBDA, causal=True)
    assert len(taken) == 1
    with pytest.raises(UnavailableError, match="reads pairs, not streams"):
        diff_attention(streams.q, streams.k, streams.v, LAMBDA, causal=True, impl="flash2")
    monkeypatch.undo()
    assert isinstance(registry._TABLE[Impl.FLASH2], Implementation)
    assert registry._TABLE[Impl.FLASH2].run is not kernel


def test_names_do_not_import_the_compiler() -> None:
    program = (
        "import sys; import diffdeploy.ops.impl; "
        "print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
