"""`fused` in graphs: an exported program keeps the operator whole, and compilers take it apart."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from diffdeploy.exclusive import without_warnings
from diffdeploy.exporters.aoti import scratch_for_all_programs
from diffdeploy.ops import diff_attention
from diffdeploy.ops.target import traced_for
from tests.support.operator_inputs import side_by_side

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Operator(nn.Module):
    """Behind a cache with padding where there is a mask."""

    lam: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lam", torch.tensor(0.4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return diff_attention(q, k, v, self.lam, causal=True, attn_mask=mask, impl="fused")


def sides(queries: int, keys: int, width: int = 64, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = [(batch, 8, queries, width), (batch, 4, keys, width), (batch, 2, keys, 2 * width)]
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE, torch.float16) for shape in shapes)
    return q, side_by_side(k), v


def padding(keys: int, batch: int = 2) -> Tensor:
    mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool, device=DEVICE)
    mask[0, ..., : keys // 2] = False
    return mask


def exported(queries: int, keys: int, width: int = 64) -> torch.export.ExportedProgram:
    length, key_length = torch.export.Dim("S", min=2, max=4096), torch.export.Dim("T", min=2, max=8192)
    shapes = ({2: length}, {2: key_length}, {2: key_length}, {3: key_length})
    with traced_for("cuda"):
        return torch.export.export(
            Operator().to(DEVICE), (*sides(queries, keys, width), padding(keys)), dynamic_shapes=shapes, strict=False
        )


@pytest.mark.triton
def test_an_exported_program_keeps_the_operator_whole() -> None:
    program = exported(20, 40)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("diffdeploy.fused_attention.default") == 1
    assert not any("scaled_dot_product" in target for target in called)


@pytest.mark.triton
@pytest.mark.parametrize("group_size", [1, 2, 4, 16])
def test_of_the_kernels_in_a_graph_one_runs_for_each_number_of_queries(group_size: int) -> None:
    """What a graph holds for a number that is a symbol, asked with numbers."""
    from diffdeploy.ops.kernels.call import Call

    axes = [DimDynamic.STATIC] * 2 + [DimDynamic.DYNAMIC, DimDynamic.STATIC]
    dynamic: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(axes)
    tensors = (torch.empty(2, 2 * group_size, 20, 64), torch.empty(2, 1, 40, 128), torch.empty(2, 1, 40, 128))
    with FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False) as mode:
        q, k, v = (mode.from_tensor(side, symbolic_context=dynamic) for side in tensors)
        of_any = Call(q, k, v, q.new_ones(()), None, None, True, None, False, 0.1, None, 1.0, True)
        calls = of_any.by_length()
    assert [call.decodes for call in calls] == [*[True] * (len(calls) - 1), False]
    # The tile for one query is as small as it would be if there were no others.
    assert calls[0].tile.rows == replace(of_any, q=torch.empty(2, 2 * group_size, 1, 64)).tile.rows or group_size > 8
    for length in range(1, 40):
        queries = torch.empty(2, 2 * group_size, length, 64)
        running = [call for call in calls if replace(call, q=queries).programs(7)]
        assert len(running) == 1
        assert replace(running[0], q=queries).programs(7) == 7
        assert running[0].decodes == (length <= 16)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("width", [64, 128])
def test_torch_compile(width: int, dynamic: bool) -> None:
    torch._dynamo.reset()
    operator = Operator().cuda()
    compiled = torch.compile(operator, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        sizes = ((100, 333), (1, 300), (130, 350), (1, 301), (3, 301), (9, 301))
        for queries, keys in sizes if dynamic else sizes[:2]:
            inputs = (*sides(queries, keys, width), padding(keys))
            torch.testing.assert_close(compiled(*inputs), operator(*inputs), rtol=0, atol=2e-3)


# Reads a package as a user without this package does.
READER = """
import sys
import torch
assert "diffdeploy" not in sys.modules
package = torch._inductor.aoti_load_package(sys.argv[1])
for path in sys.argv[2:]:
    *inputs, expected = torch.load(path, weights_only=True)
    output = package(*inputs)
    # A graph for any length holds the kernel for any length, whose sums of a few queries differ in the last bit.
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-3)
    print("right", tuple(expected.shape))
"""


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("width", [64, 128])
def test_an_aot_inductor_package_needs_nothing_of_this_project(width: int, tmp_path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    program = exported(100, 200, width)
    with without_warnings(), scratch_for_all_programs():  # torch warns of its own workings
        package = aoti_compile_and_package(program, package_path=str(tmp_path / "operator.pt2"))
    operator, files = Operator().cuda(), []
    for queries, keys in ((100, 200), (37, 300), (130, 130), (1, 700), (2, 500), (9, 500), (17, 500)):
        inputs = (*sides(queries, keys, width), padding(keys))
        files.append(tmp_path / f"{queries}.pt")
        torch.save([*inputs, operator(*inputs)], files[-1])
    done = subprocess.run(
        [sys.executable, "-c", READER, package, *map(str, files)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == len(files)
