"""The guilty stage: exact values of stages, values found in artifacts, and what outputs alone tell."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from diffdeploy.bundle import WEIGHTS, Bundle, open_bundle
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.config import AnyConfig, DiffAttentionV2Config, RopeConfig
from diffdeploy.exporters import ExportOptions
from diffdeploy.formats import Check, require_format
from diffdeploy.graphs import GraphSpec, Stage, Variant, graph_spec, run_graph
from diffdeploy.locate.locate import by_values, locate
from diffdeploy.locate.matching import Matcher
from diffdeploy.locate.probes import by_probes
from diffdeploy.locate.values import stage_values
from diffdeploy.modules import AttentionBlock, block_class
from diffdeploy.selftest.blocks import attention, heads
from diffdeploy.verify.oracle import oracle
from diffdeploy.verify.sweep import telling_case
from tests.support.blocks import checkpoint_of, make_config, random_weights
from tests.support.bundles import BundleCache

Array = np.ndarray[Any, Any]

CONFIGS: dict[str, AnyConfig] = {
    "interleaved": make_config(),
    "legacy": make_config(gqa_layout="legacy", qkv_bias=True, out_bias=True),
    "window-half": make_config(sliding_window=3, rope=RopeConfig(style="half", theta=50.0), norm_affine=False),
    "full": make_config(causal=False, rope=None, qk_norm_eps=1e-6),
    "v2": DiffAttentionV2Config(embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=6),
}


def spec_of(config: AnyConfig, variant: Variant) -> GraphSpec:
    return graph_spec(variant, config, dtype="float32", max_batch_size=8, max_sequence_length=40)


def weights_of(config: AnyConfig) -> dict[str, Array]:
    return {name: tensor.float().numpy() for name, tensor in random_weights(config).items()}


@pytest.mark.parametrize("variant", ["plain", "masked", "cached"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_stages_are_the_oracles_outputs(name: str, variant: Variant) -> None:
    config = CONFIGS[name]
    spec, weights = spec_of(config, variant), weights_of(config)
    inputs = telling_case(spec, seed=1).inputs(spec)
    values = stage_values(config, weights, inputs, torch.float64)
    expected = oracle(config, weights, inputs)
    np.testing.assert_allclose(values[Stage.OUTPUT_PROJECTION][0][:, 0], expected["output"], rtol=0, atol=1e-12)
    if variant == "cached":
        for value, output in zip(values[Stage.CACHE], ("present.key", "present.value"), strict=True):
            np.testing.assert_allclose(value, expected[output], rtol=0, atol=1e-12)


def test_a_matcher_keeps_nothing_and_names_the_first_deviation() -> None:
    config = CONFIGS["interleaved"]
    spec, weights = spec_of(config, "plain"), weights_of(config)
    inputs = telling_case(spec, seed=1).inputs(spec)
    exact, eager = (stage_values(config, weights, inputs, dtype) for dtype in (torch.float64, torch.float32))
    matcher = Matcher(exact, eager, "float32")
    for stage, values in eager.items():
        for value in values:
            wrong = stage in (Stage.LAMBDA, Stage.DIFFERENCE)
            matcher.offer(f"node of {stage}", value * 1.001 if wrong else value)
    matcher.offer_outputs({"output": eager[Stage.OUTPUT_PROJECTION][0][:, 0]})
    finding = matcher.finding()
    assert (finding.stage, finding.node) == ("lambda", "node of lambda")
    by_stage = {error.stage: error for error in finding.stages}
    assert by_stage["norm"].amplification == pytest.approx(1.0, abs=0.01)
    assert not by_stage["rope"].deviates
    assert (by_stage["lambda"].amplification or 0) > 1000


def test_nan_is_a_deviation() -> None:
    config = CONFIGS["interleaved"]
    spec, weights = spec_of(config, "plain"), weights_of(config)
    inputs = telling_case(spec, seed=1).inputs(spec)
    exact, eager = (stage_values(config, weights, inputs, dtype) for dtype in (torch.float64, torch.float32))
    matcher = Matcher(exact, eager, "float32")
    for values in eager.values():
        for value in values:
            matcher.offer("node", value)
    matcher.offer_outputs({"output": eager[Stage.OUTPUT_PROJECTION][0][:, 0] * float("nan")})
    finding = matcher.finding()
    assert finding.stage == "output projection"
    assert finding.stages[-1].rmse is None


@pytest.mark.parametrize("format_name", ["onnx", "pt2"])
def test_a_right_artifact_has_no_guilty_stage(format_name: str, bundles: BundleCache) -> None:
    config = CONFIGS["interleaved"]
    options = ExportOptions(format=format_name, graph="masked", max_batch_size=8, max_sequence_length=40)
    bundle = open_bundle(bundles.bundle(checkpoint_of(config), options, verify=False))
    inputs = telling_case(bundle.manifest.graph, seed=2).inputs(bundle.manifest.graph)
    shown = require_format(format_name).intermediates(bundle)
    assert shown is not None
    finding = by_values(bundle, Eager(bundle, block_class(config)), inputs, shown)
    assert finding.stage is None
    assert {error.stage for error in finding.stages} >= set(Stage) - {Stage.CACHE}
    assert all(error.amplification is not None and error.amplification < 10 for error in finding.stages)


class Eager:
    """A block that shows nothing but its outputs."""

    def __init__(self, bundle: Bundle, kind: type[AttentionBlock], weights: Mapping[str, Array] | None = None) -> None:
        stored = load_file(bundle.path / WEIGHTS) if weights is None else weights
        self.block = kind.from_weights(
            bundle.manifest.block, {name: torch.from_numpy(array) for name, array in stored.items()}, max_positions=64
        )

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = run_graph(self.block, {name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}


@pytest.fixture(scope="module", params=["plain", "masked", "cached"])
def pt2_bundle(request: pytest.FixtureRequest, sample: Checkpoint, bundles: BundleCache) -> Bundle:
    """A bundle of a trained block, of whose artifact only the outputs are looked at."""
    options = ExportOptions(format="pt2", graph=request.param, max_batch_size=16, max_sequence_length=40)
    return open_bundle(bundles.bundle(sample, options, verify=False))


# What outputs alone can tell, by the faulty block.
TOLD_BY_OUTPUTS = {
    heads.NoiseIsAdded: Stage.LAMBDA,
    heads.LambdaOnSignal: Stage.LAMBDA,
    heads.NormOverHalves: Stage.NORM,
    heads.EpsilonOutside: Stage.NORM,
    heads.FactorBeforeNorm: Stage.NORM,
    heads.HeadsReversed: Stage.OUTPUT_PROJECTION,
    attention.StreamsExchanged: Stage.SIGNAL,
    attention.ScaledByValueWidth: Stage.SIGNAL,
}


@pytest.mark.parametrize("step", TOLD_BY_OUTPUTS, ids=lambda step: step.__name__)
def test_what_outputs_tell_of_a_wrong_step(step: Any, pt2_bundle: Bundle) -> None:
    kind: Any = type(step.__name__, (step, block_class(pt2_bundle.manifest.block)), {})
    finding = by_probes(pt2_bundle, Eager(pt2_bundle, kind))
    assert finding.stage == TOLD_BY_OUTPUTS[step], finding.detail


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("q_proj.weight", Stage.Q_PROJECTION),
        ("k_proj.weight", Stage.K_PROJECTION),
        ("v_proj.weight", Stage.V_PROJECTION),
        ("out_proj.weight", Stage.OUTPUT_PROJECTION),
        ("subln.weight", Stage.NORM),
        ("lambda_q1", Stage.LAMBDA),
    ],
    ids=str,
)
def test_what_outputs_tell_of_a_wrong_weight(name: str, stage: Stage, pt2_bundle: Bundle) -> None:
    weights = load_file(pt2_bundle.path / WEIGHTS)
    generator = np.random.default_rng(0)
    weights[name] = weights[name] + 0.3 * weights[name].std() * generator.standard_normal(
        weights[name].shape, dtype=np.float32
    )
    artifact = Eager(pt2_bundle, block_class(pt2_bundle.manifest.block), weights)
    finding = by_probes(pt2_bundle, artifact)
    assert finding.stage == stage, finding.detail


def test_a_named_constant_is_the_first_evidence(pt2_bundle: Bundle) -> None:
    checks = [
        Check(name="attention", passed=False, detail="3 calls"),
        Check(name="weights", passed=False, detail="k_proj.weight is other; q_proj.weight is other"),
        Check(name="lambda", passed=False, detail="none"),
    ]
    artifact = Eager(pt2_bundle, block_class(pt2_bundle.manifest.block))
    finding = locate(pt2_bundle, artifact, checks, [])
    assert finding is not None
    assert (finding.stage, finding.found_by) == ("q projection", "constants")
    assert locate(pt2_bundle, artifact, checks[:1], []) is None


def test_every_step_is_right_before_one_is_replaced() -> None:
    """`Steps` itself is the block, so that a fault is in the one step that it replaces."""
    from diffdeploy.selftest.blocks.steps import Steps

    for config in CONFIGS.values():
        weights = {name: tensor.float() for name, tensor in random_weights(config).items()}
        kind: Any = type("Right", (Steps, block_class(config)), {})
        x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
        right, steps = (block.from_weights(config, weights)(x, mask) for block in (block_class(config), kind))
        torch.testing.assert_close(steps, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("lambda_q1", Stage.LAMBDA),
        ("subln.weight", Stage.NORM),
        ("out_proj.weight", Stage.OUTPUT_PROJECTION),
        ("v_proj.weight", Stage.V_PROJECTION),
        ("q_proj.weight", None),
    ],
    ids=str,
)
def test_what_outputs_narrower_than_the_heads_tell(name: str, stage: Stage | None, narrow_bundle: Bundle) -> None:
    weights = load_file(narrow_bundle.path / WEIGHTS)
    weights[name] = weights[name] + np.random.default_rng(0).standard_normal(weights[name].shape, dtype=np.float32)
    finding = by_probes(narrow_bundle, Eager(narrow_bundle, block_class(narrow_bundle.manifest.block), weights))
    assert finding.stage == stage, finding.detail


@pytest.fixture(scope="module")
def narrow_bundle(bundles: BundleCache) -> Bundle:
    """A block of width 24, whose joined heads are 48 wide."""
    options = ExportOptions(format="pt2", max_batch_size=16, max_sequence_length=40)
    return open_bundle(bundles.bundle(checkpoint_of(CONFIGS["interleaved"]), options, verify=False))
