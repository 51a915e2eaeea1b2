"""The Triton kernels, on a CUDA device or in Triton's interpreter, and what `fused` refuses without either."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffdeploy.errors import DiffDeployError, InputError, UnavailableError
from diffdeploy.ops import Impl, diff_attention
from diffdeploy.ops.registry import cheapest
from diffdeploy.ops.request import HeadNorm, Request
from diffdeploy.ops.target import traced_for
from tests.support.fused_cases import case_of, check, random_case
from tests.support.operator_inputs import HEADS, masks, random_inputs
from tests.support.pairwise import pairwise
from tests.support.paths import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter has no products of bfloat16.
DTYPES = ["float16", "bfloat16"] if DEVICE == "cuda" else ["float16"]
GUARD = 4096


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Buffers come filled with NaN, inside of larger ones of which nothing but they may be written."""
    from diffdeploy.ops.kernels import operator

    surroundings: list[tuple[Tensor, int]] = []

    def poison(buffer: Tensor) -> Tensor:
        whole = torch.full((buffer.numel() + 2 * GUARD,), float("nan"), dtype=buffer.dtype, device=buffer.device)
        surroundings.append((whole, buffer.numel()))
        return whole[GUARD : GUARD + buffer.numel()].view(buffer.shape)

    output_buffer, scratch = operator.output_buffer, operator.scratch
    monkeypatch.setattr(operator, "output_buffer", lambda call: poison(output_buffer(call)))
    monkeypatch.setattr(operator, "scratch", lambda call: tuple(poison(part) for part in scratch(call)))
    yield
    assert surroundings
    for whole, size in surroundings:
        assert whole[:GUARD].isnan().all()
        assert whole[GUARD + size :].isnan().all()


def as_on_a_small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiprocessor is busy with few heads, so that tiles are large and keys are not split."""
    monkeypatch.setattr("diffdeploy.ops.kernels.call._multiprocessors", lambda device: 1)


@pytest.mark.triton
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(30))
def test_random_shapes(seed: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if seed % 2:
        as_on_a_small_device(monkeypatch)
    case = random_case(seed, dtype)
    check(case, case.run(DEVICE, "fused"), DEVICE)


@pytest.mark.triton
@pytest.mark.usefixtures("_poisoned")
@pairwise(
    layout=["canonical", "legacy"],
    form=["streams", "paired", "shared"],
    head_counts=HEADS,
    queries=[1, 3, 40],
    widths=[(16, 32), (64, 144)],
)
def test_every_form_of_keys(
    layout: str, form: str, head_counts: tuple[int, int], queries: int, widths: tuple[int, int]
) -> None:
    """In both key maps, for few and for many queries, with streams together and apart."""
    case = case_of(*head_counts, queries, 45, "float16", widths=widths, form=form, gqa_layout=layout)
    check(case, case.run(DEVICE, "fused"), DEVICE)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("seed", range(1000, 1500))
def test_many_random_shapes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if seed % 3 == 0:
        as_on_a_small_device(monkeypatch)
    case = random_case(seed, "bfloat16" if seed % 2 else "float16")
    check(case, case.run(DEVICE, "fused"), DEVICE)


def inputs(heads: int, kv_heads: int, queries: int, keys: int, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads + queries + keys)
    shapes = [(2, 2 * heads, queries, width), (2, 2 * kv_heads, keys, width), (2, kv_heads, keys, 2 * width)]
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE, torch.float16) for shape in shapes)
    return q, k, v


@pytest.mark.triton
@pytest.mark.parametrize("queries", [1, 3, 70])
def test_a_hidden_key_is_not_seen_whatever_its_score(queries: int) -> None:
    """Hidden keys have scores of 3e5 and more, and NaN."""
    q, k, v = inputs(4, 2, queries, 90)
    mask = torch.ones(2, 1, 1, 90, dtype=torch.bool, device=DEVICE)
    mask[..., 20:40] = False
    q = 90 * q.sign()
    outputs = []
    for hidden in (0.0, 600.0, float("nan")):
        k[:, :, 20:40] = hidden * q[:, ::2, -1:].sign()
        outputs.append(diff_attention(q, k, v, torch.tensor(0.4), causal=True, attn_mask=mask, impl="fused"))
    assert torch.isfinite(outputs[0]).all()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.triton
@pytest.mark.parametrize(("queries", "scores"), [(1, 3e5), (4, 3e5), (40, 3e5)], ids=str)
def test_large_scores(queries: int, scores: float) -> None:
    """The largest score decides alone, and no weight overflows."""
    q, k, v = inputs(2, 2, queries, 50)
    q, k = q.sign() * (scores / 8) ** 0.5, k.sign() * (scores / 8) ** 0.5
    actual = diff_attention(q, k, v, torch.tensor(0.4), causal=True, impl="fused")
    settings: dict[str, Any] = {"causal": True, "impl": "naive"}
    expected = diff_attention(q.double(), k.double(), v.double(), torch.tensor(0.4).half().double(), **settings)
    assert (actual - expected).abs().max() <= 8 * torch.finfo(torch.float16).eps * expected.abs().max()


@pytest.mark.triton
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(("queries", "keys"), [(70, 20), (5, 2), (16, 1)], ids=str)
def test_queries_before_all_keys_are_zero(queries: int, keys: int) -> None:
    output = diff_attention(*inputs(4, 2, queries, keys), torch.tensor(0.4), causal=True, impl="fused")
    assert (output[:, :, : queries - keys] == 0).all()
    assert (output[:, :, queries - keys :].abs().sum(-1) > 0).all()


@pytest.mark.triton
@pytest.mark.parametrize("queries", [2, 40])
def test_rows_without_any_key_are_zero(queries: int) -> None:
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    sides = inputs(4, 2, queries, 40)
    output = diff_attention(*sides, torch.tensor(0.4), causal=False, attn_mask=mask, impl="fused")
    assert (output[1] == 0).all()
    assert (output[0].abs().sum(-1) > 0).all()
    q, k, v = sides
    none = diff_attention(q, k[:, :, :0], v[:, :, :0], torch.tensor(0.4), causal=False, impl="fused")
    assert torch.equal(none, torch.zeros_like(none))


@pytest.mark.triton
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("width", [24, 64, 128])
@pytest.mark.parametrize("small", [False, True], ids=["", "small-device"])
def test_the_norm_of_the_heads(
    small: bool, width: int, gamma: bool, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the exact difference, where the block's own norm is on a rounded one."""
    if small:
        as_on_a_small_device(monkeypatch)
    case = case_of(4, 2, queries, 40, "float16", widths=(width, 2 * width))
    q, k, v, lam = (side.to(DEVICE, torch.float16) for side in (case.q, case.k, case.v, case.lam))
    weight = torch.linspace(0.5, 1.5, 2 * width, device=DEVICE).half() if gamma else None
    norm = HeadNorm(eps=1e-5, weight=weight, factor=0.8)
    actual = diff_attention(q, k, v, lam, causal=True, norm=norm, impl="fused").cpu()
    exact = case.formula()
    exact = 0.8 * exact / np.sqrt(np.square(exact).mean(-1, keepdims=True) + 1e-5)
    exact = exact if weight is None else exact * weight.double().cpu().numpy()
    # Rounding of the output; where streams are not together, also that of one or both, which the norm enlarges.
    assert np.abs(actual.double().numpy() - exact).max() <= 4 * torch.finfo(torch.float16).eps * np.abs(exact).max()


@pytest.mark.triton
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("at_once", [1, 3, 7, 8])
def test_groups_of_heads(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that divide the heads and groups that do not; of each, every tile of every head is computed."""
    q, k, v = inputs(4, 2, 150, 150)
    expected = diff_attention(q, k, v, torch.tensor(0.4), causal=True, impl="fused")
    monkeypatch.setattr("diffdeploy.ops.kernels.call.Call.heads_at_once", lambda call: at_once)
    assert torch.equal(diff_attention(q, k, v, torch.tensor(0.4), causal=True, impl="fused"), expected)


@pytest.mark.triton
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["streams", "paired", "shared"])
@pytest.mark.parametrize("queries", [40, 150])
def test_streams_apart_for_values_that_are_not_wide(
    queries: int, form: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffdeploy.ops.kernels import operator

    apart = []

    def subtract(*given: Any) -> None:
        apart.append(given)
        unchanged(*given)

    unchanged = operator._subtract
    monkeypatch.setattr("diffdeploy.ops.kernels.call._LEAST_APART", 1)
    monkeypatch.setattr(operator, "_subtract", subtract)
    case = case_of(4, 2, queries, 170, dtype, widths=(32, 64), form=form)
    check(case, case.run(DEVICE, "fused"), DEVICE)
    assert len(apart) == 1


@pytest.mark.triton
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("multiprocessors", [17, 23, 24])
@pytest.mark.parametrize("width", [32, 128])
def test_programs_that_share_a_multiprocessor(
    width: int, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order programs come, every tile of every head and stream is computed."""
    q, k, v = inputs(4, 2, 150, 150, width)
    # 24 programs, or 48 if the streams are apart: all of them in one wave, some of them second on a multiprocessor.
    monkeypatch.setattr("diffdeploy.ops.kernels.call._multiprocessors", lambda device: multiprocessors)
    output = diff_attention(q, k, v, torch.tensor(0.4), causal=True, impl="fused")
    monkeypatch.setattr("diffdeploy.ops.kernels.call.Call.pairing", lambda call: 0)
    assert torch.equal(diff_attention(q, k, v, torch.tensor(0.4), causal=True, impl="fused"), output)


@pytest.mark.triton
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 300])
def test_a_chunk_behind_many_keys_is_split(window: int | None, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a tile of the kernel has."""
    case = case_of(2, 1, 20, 1100, dtype, form="paired", batch=1, sliding_window=window)
    monkeypatch.setattr("diffdeploy.ops.kernels.operator._attend_tiles", None)
    check(case, case.run(DEVICE, "fused"), DEVICE)


@pytest.mark.triton
def test_strides_of_any_kind() -> None:
    q, k, v = inputs(4, 2, 20, 40)
    expected = diff_attention(q, k, v, torch.tensor(0.4), causal=True, impl="fused")
    for axis in (1, 3):
        q, k, v = (side.transpose(2, axis).contiguous().transpose(2, axis) for side in (q, k, v))
        assert torch.equal(diff_attention(q, k, v, torch.tensor(0.4), causal=True, impl="fused"), expected)
    assert expected.transpose(1, 2).is_contiguous()  # what joins the heads copies nothing


@pytest.mark.triton
@pytest.mark.parametrize("queries", [1, 130])
def test_rows_too_far_apart_for_offsets_of_32_bits(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_small_device(monkeypatch)
    q, k, v = inputs(4, 1, queries, 130)
    expected = diff_attention(q, k, v, torch.tensor(0.4), causal=True, impl="fused")
    step = 2**24 + 2**18
    storage = torch.empty(130 * step, dtype=q.dtype, device=DEVICE)  # on the CPU, pages never written take no memory
    far = []
    for place, side in enumerate((q, k, v)):
        _, heads, _, width = side.shape
        strides = (heads * width, width, step, 1)
        far.append(storage.as_strided(side.shape, strides, place * 2**20).copy_(side))
    actual = diff_attention(far[0], far[1], far[2], torch.tensor(0.4), causal=True, impl="fused")
    assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("queries", [1, 20])
def test_more_heads_than_an_axis_of_programs_has(queries: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(35_000, 4, queries, 16), (35_000, 4, 20, 16), (35_000, 2, 20, 32)]
    q, k, v = (torch.randn(shape, generator=generator, device="cuda").half() for shape in shapes)
    lam = torch.tensor(0.4)
    actual = diff_attention(q, k, v, lam, causal=True, impl="fused")
    expected = diff_attention(q.float(), k.float(), v.float(), lam.half().float(), causal=True, impl="naive")
    assert (actual - expected).abs().max() <= 4 * torch.finfo(torch.float16).eps * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("queries", [1, 16, 17])
@pytest.mark.parametrize("width", [64, 128])
def test_a_long_cache(width: int, queries: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, 16, queries, width), (1, 2, 70_001, 2 * width), (1, 2, 70_001, 2 * width)]
    q, k, v = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes)
    lam = torch.tensor(0.4)
    actual = diff_attention(q, k, v, lam, causal=True, impl="fused")
    exact = diff_attention(q.double(), k.double(), v.double(), lam.bfloat16().double(), causal=True, impl="naive")
    plain = diff_attention(q, k, v, lam, causal=True, impl="two_call")
    error, other = ((output - exact).square().mean().sqrt() for output in (actual, plain))
    assert error <= 1.5 * other


def request_of(changes: dict[str, Any]) -> Request:
    """A request that `fused` takes on CUDA, but for the changes."""
    sizes: dict[str, Any] = {"width": 16, "value_width": 32, "dtype": torch.float16, "requires_grad": False}
    settings = {name: value for name, value in changes.items() if name not in sizes}
    sizes |= changes
    q, k, v = (
        torch.zeros(2, heads, 5, width, dtype=sizes["dtype"])
        for heads, width in ((8, sizes["width"]), (4, sizes["width"]), (2, sizes["value_width"]))
    )
    q.requires_grad_(sizes["requires_grad"])
    return Request.of(q, k, v, torch.tensor(0.4), **{"causal": True, **settings})


# By the rows of the second table of docs/fused.md.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float32, float64": ({"dtype": torch.float32}, "runs in float16 and bfloat16, but .* are float32"),
    "streams wider than 128": ({"width": 136, "value_width": 256}, "these are 136 and 256 wide"),
    "values wider than 256": ({"width": 64, "value_width": 264}, "these are 64 and 264 wide"),
    "additive masks": ({"attn_mask": torch.zeros(2, 1, 1, 5)}, r"one is torch.float32 \[2, 1, 1, 5\]"),
    "a separate mask for each query": ({"attn_mask": masks(5, 5, 4)["full"]}, r"one is torch.bool \[2, 1, 5, 5\]"),
    "a separate mask for each head": ({"attn_mask": masks(5, 5, 4)["per_head"]}, r"one is torch.bool \[1, 4, 5, 5\]"),
    "a scale of 0 or less": ({"scale": -1.0}, "needs a positive scale, but this one is -1.0"),
    "gradients": ({"requires_grad": True}, "computes no gradients"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_is_refused_goes_to_another_implementation(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffdeploy.ops.fused._HAS_TRITON", True)
    changes, message = REFUSED[row]
    asked = request_of(changes)

    def run(impl: str) -> Tensor:
        mask, scale = asked.attn_mask, asked.scale
        return diff_attention(asked.q, asked.k, asked.v, asked.lam, causal=True, attn_mask=mask, scale=scale, impl=impl)

    with traced_for("cuda"), pytest.raises(InputError, match=message):
        run("fused")
    assert torch.equal(run("auto"), asked.q.new_zeros(2, 4, 5, asked.value_width))


def test_the_page_has_a_row_for_each() -> None:
    page = (ROOT / "docs" / "fused.md").read_text()
    table = page.split("| refused |")[1].split("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == [*REFUSED, "CPUs", "a machine without triton", "devices with less than 160 KiB of shared memory"]


def test_machines_that_cannot_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = random_inputs(4, 2, 5, 5, dtype=torch.float16)
    with pytest.raises(UnavailableError, match="fused runs on CUDA only, but the tensors are on cpu"):
        diff_attention(q, k, v, torch.tensor(0.4), causal=True, impl="fused")
    monkeypatch.setattr("diffdeploy.ops.fused._HAS_TRITON", False)
    with traced_for("cuda"), pytest.raises(UnavailableError, match="fused needs the package triton"):
        diff_attention(q, k, v, torch.tensor(0.4), causal=True, impl="fused")


@pytest.mark.gpu
def test_devices_with_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffdeploy.ops.fused._SHARED_MEMORY_BYTES", 2**30)
    with pytest.raises(UnavailableError, match="needs 1048576 KiB of shared memory per block"):
        diff_attention(*inputs(4, 2, 5, 5), torch.tensor(0.4), causal=True, impl="fused")


@pytest.mark.gpu
@pytest.mark.triton
def test_auto_takes_it_on_hopper_where_it_can() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("measured on devices of compute capability 9 alone")
    q, k, v = inputs(4, 2, 5, 5)
    asked = Request.of(q, k, v, torch.tensor(0.4), causal=True)
    assert cheapest(asked).impl == Impl.FUSED
    assert cheapest(replace(asked, traced=True)).impl != Impl.FUSED
    assert cheapest(Request.of(q.float(), k.float(), v.float(), torch.tensor(0.4), causal=True)).impl != Impl.FUSED


@pytest.mark.triton
def test_a_window_needs_causality() -> None:
    with pytest.raises(DiffDeployError, match="requires causal attention"):
        diff_attention(*inputs(4, 2, 5, 5), torch.tensor(0.4), causal=False, sliding_window=2, impl=Impl.FUSED)


def test_an_import_brings_no_kernels() -> None:
    program = (
        "import sys; import diffdeploy.ops, diffdeploy.modules; "
        "print([name for name in ('triton', 'diffdeploy.ops.kernels') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "[]"
