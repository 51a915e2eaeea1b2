"""Every check must be able to fail: blocks with one fault each are exported beside right weights, and are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffdeploy.checkpoints import Checkpoint
from diffdeploy.config import DiffAttentionConfig, GqaLayout, RopeConfig, lambda_init_at
from diffdeploy.exporters import ExportOptions, base, export_bundle
from diffdeploy.modules import DiffAttention
from diffdeploy.ops import Impl, api
from diffdeploy.ops.masks import Visibility
from diffdeploy.ops.sdpa import two_call
from diffdeploy.verify import RejectedError, Report

OPTIONS = ExportOptions(max_batch_size=4, max_sequence_length=70)
Operator = Callable[[Tensor, Tensor, Tensor, Tensor, Visibility, GqaLayout], Tensor]


def report_of_rejection(checkpoint: Checkpoint, tmp_path: Path) -> Report:
    """Export, see that it is refused and that nothing is left, and give the report."""
    with pytest.raises(RejectedError) as rejected:
        export_bundle(checkpoint, tmp_path / "out", OPTIONS)
    assert list(tmp_path.iterdir()) == []
    return rejected.value.report


def failed_cases(report: Report) -> int:
    return sum(not case.passed for case in report.cases)


def swapped_streams(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, seen: Visibility, layout: GqaLayout) -> Tensor:
    return two_call(_swap_pairs(q), _swap_pairs(k), v, lam, seen, layout)


def swapped_key_streams(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, seen: Visibility, layout: GqaLayout) -> Tensor:
    return two_call(q, _swap_pairs(k), v, lam, seen, layout)


def wrong_gqa_map(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, seen: Visibility, layout: GqaLayout) -> Tensor:
    """Head ``i`` reads key/value head ``i % h_kv``."""
    groups = q.shape[1] // k.shape[1]
    k = k.reshape(k.shape[0], -1, 2, *k.shape[2:]).repeat(1, groups, 1, 1, 1).flatten(1, 2)
    return two_call(q, k, v.repeat(1, groups, 1, 1), lam, seen, layout)


def sees_one_future_key(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, seen: Visibility, layout: GqaLayout) -> Tensor:
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril(1)
    signal, noise = (
        torch.nn.functional.scaled_dot_product_attention(
            q[:, s::2],
            k[:, s::2].repeat_interleave(groups, dim=1),
            v.repeat_interleave(groups, dim=1),
            attn_mask=mask,
        )
        for s in (0, 1)
    )
    return signal - lam * noise


def nan_at_length_one(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, seen: Visibility, layout: GqaLayout) -> Tensor:
    others = torch.ones(q.shape[2]).sum() - 1
    return two_call(q, k, v, lam, seen, layout) * (others / others)


def _swap_pairs(heads: Tensor) -> Tensor:
    return heads.reshape(heads.shape[0], -1, 2, *heads.shape[2:]).flip(2).flatten(1, 2)


@pytest.mark.parametrize(
    "operator",
    [swapped_streams, swapped_key_streams, wrong_gqa_map, sees_one_future_key, nan_at_length_one],
    ids=lambda operator: operator.__name__,
)
def test_faults_in_the_operator(
    operator: Operator, sample: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(api._IMPLEMENTATIONS, Impl.TWO_CALL, operator)
    report = report_of_rejection(sample, tmp_path)
    failed = [case.id for case in report.cases if not case.passed]
    if operator is nan_at_length_one:
        assert failed
        assert all("-S1-" in case for case in failed)
    else:
        assert len(failed) > len(report.cases) / 2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("missing_output_factor", lambda config: replace(config, output_scale=1.0)),
        ("wrong_eps", lambda config: replace(config, norm_eps=1e-6)),
        ("wrong_depth", lambda config: _at_depth(config, 2)),
        ("half_rope", lambda config: replace(config, rope=RopeConfig(style="half", theta=config.rope.theta))),
        ("wrong_theta", lambda config: replace(config, rope=RopeConfig(style="interleaved", theta=10_500.0))),
        ("no_rope", lambda config: replace(config, rope=None)),
        ("not_causal", lambda config: replace(config, causal=False)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faults_in_the_config(
    name: str,
    change: Callable[[DiffAttentionConfig], DiffAttentionConfig],
    sample: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(sample.config, DiffAttentionConfig)
    faulty = change(sample.config)
    build = base._block
    monkeypatch.setattr(
        base, "_block", lambda found, weights, options: build(replace(found, config=faulty), weights, options)
    )
    assert failed_cases(report_of_rejection(sample, tmp_path)) > 0


def _at_depth(config: DiffAttentionConfig, depth: int) -> DiffAttentionConfig:
    value = lambda_init_at(depth)
    return replace(config, lambda_init=value, output_scale=1 - value)


def test_lambda_of_the_wrong_sign(sample: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def negate(block: DiffAttention) -> None:
        assert block._frozen_lambda is not None
        block._frozen_lambda *= -1

    report = _report_with(negate, sample, tmp_path, monkeypatch)
    assert failed_cases(report) > len(report.cases) / 2
    assert [check.name for check in report.contract if not check.passed] == ["lambda"]


def test_one_weight_off_by_a_thousandth(sample: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nudge(block: DiffAttention) -> None:
        block.v_proj.weight = torch.nn.Parameter(block.v_proj.weight.clone(), requires_grad=False)
        block.v_proj.weight[5, 7] *= 1.001

    report = _report_with(nudge, sample, tmp_path, monkeypatch)
    assert [check.detail for check in report.contract if not check.passed] == [
        "v_proj.weight is not in the graph bit for bit"
    ]


def _report_with(
    spoil: Callable[[DiffAttention], None], sample: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Report:
    build = base._block

    def spoiled(found: Checkpoint, weights: dict[str, Tensor], options: ExportOptions) -> DiffAttention:
        block = build(found, weights, options)
        assert isinstance(block, DiffAttention)
        spoil(block)
        return block

    monkeypatch.setattr(base, "_block", spoiled)
    return report_of_rejection(sample, tmp_path)
