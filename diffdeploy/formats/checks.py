"""Checks that the contracts of several formats share: bit-identical weights, lambda and rotary tables."""

from collections.abc import Mapping, Sequence

import numpy as np

from diffdeploy.arrays import Array, epsilon, to_array
from diffdeploy.bundle import Bundle, Manifest, eager_module
from diffdeploy.config import LAMBDA_VECTORS, POLYNORM_EPS, DecoderConfig, is_lambda_vector
from diffdeploy.exact import lambda_of_heads, rope_tables
from diffdeploy.formats.artifact import ArtifactFacts, Check

__all__ = [
    "attentions",
    "declared_facts",
    "lambda_constant",
    "make_check",
    "norm_epsilons",
    "other_torch",
    "rope_constants",
    "state_checks",
    "weights_bit_for_bit",
]


_BYTES_OF_HALF = 2

# Maximum size of a weight whose numbers an exporter may fold into separate constants, such as PolyNorm's factors.
_TAKEN_APART = 3

# Formats that store a number in float32 round it by 6e-8 at most.
_RELATIVE_ERROR = 1e-6

# Allowed error of exp(.) - exp(.) + lambda_init, in fp32 epsilons; correct blocks are off by up to 5, whatever the size
# of their vectors.
_ROUNDINGS_OF_LAMBDA = 8


def make_check(name: str, problems: list[str], fine: str) -> Check:
    """Create a check that passes if there are no problems."""
    return Check(name=name, passed=not problems, detail="; ".join(problems) if problems else fine)


def declared_facts(bundle: Bundle, attention_ops: int, opset: int | None = None) -> ArtifactFacts:
    """Facts of an artifact whose interface is the one declared in the manifest."""
    spec = bundle.manifest.graph.of_artifact()
    return ArtifactFacts(
        variant=spec.variant,
        attention_ops=attention_ops,
        opset=opset,
        inputs=list(spec.inputs),
        outputs=list(spec.outputs),
    )


def attentions(bundle: Bundle) -> int:
    """Number of fused attentions in the graph of a bundle, according to the implementation it was traced with."""
    from diffdeploy.ops import Impl
    from diffdeploy.ops.registry import implementation

    of_block = implementation(Impl(bundle.manifest.options.attention_impl)).num_attentions
    return of_block * len(bundle.manifest.config.blocks)


def state_checks(bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
    """Checks of the parameters and buffers of a block that is rebuilt whenever its bundle is loaded."""
    block = eager_module(bundle, impl=bundle.manifest.options.attention_impl)
    state = {name: to_array(tensor) for name, tensor in (*block.named_parameters(), *block.named_buffers())}
    return [
        weights_bit_for_bit(state, weights),
        lambda_constant(state, bundle.manifest, weights),
        rope_constants(state, bundle.manifest),
    ]


def weights_bit_for_bit(
    constants: Mapping[str, Array], weights: Mapping[str, Array], stream_width: int | None = None
) -> Check:
    """Check that the graph contains each weight bit for bit, possibly transposed; equal weights may share a constant.

    Args:
        constants: constants of the graph.
        weights: canonical weights in the artifact's dtype.
        stream_width: width ``d``, if the graph may store the rows ``[heads, 2, d]`` of queries and keys by stream.
    """
    # A constant that holds one weight cannot hold another one, unless the two are equal: exporters store equal
    # constants once, such as the norms of a model that are all 1.
    left: dict[str, Array] = dict(constants)
    found: list[Array] = []
    problems = []
    for name, weight in weights.items():
        if is_lambda_vector(name) or _take(left, weight):
            found.append(weight)
            continue
        if any(_equal(other, weight) for other in found):
            continue
        if weight.size <= _TAKEN_APART and all(_is_held(constants, number) for number in weight.reshape(-1)):
            continue
        paired = stream_width is not None and name.startswith(("q_proj", "k_proj"))
        if not paired or not all(_take(left, stream) for stream in _by_stream(weight, stream_width)):
            problems.append(f"{name} is not in the graph bit for bit")
    return make_check("weights", problems, "bit-identical to weights.safetensors")


def _is_held(constants: Mapping[str, Array], number: Array) -> bool:
    """True if some constant is this number; several weights may share one."""
    one = np.asarray(number).reshape(1)
    return any(constant.size == 1 and _same_bits(constant.reshape(1), one) for constant in constants.values())


def _by_stream(weight: Array, width: int | None) -> list[Array]:
    assert width is not None
    pairs = weight.reshape(-1, 2, width, *weight.shape[1:])
    return [pairs[:, stream].reshape(-1, *weight.shape[1:]) for stream in (0, 1)]


def _equal(one: Array, other: Array) -> bool:
    """True if two arrays are bit-identical: NaN equals itself, and 0 differs from -0."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bits, other_bits = (np.atleast_1d(array).view(f"u{one.dtype.itemsize}") for array in (one, other))
    # A model has many weights of one shape, and most pairs differ in the first row.
    return np.array_equal(bits[:1], other_bits[:1]) and np.array_equal(bits, other_bits)


def _take(constants: dict[str, Array], weight: Array) -> bool:
    """True if a weight is among the constants; the constant is removed, since each holds one weight."""
    match = next((key for key, constant in constants.items() if _same_bits(constant, weight)), None)
    return match is not None and constants.pop(match) is not None


def _same_bits(constant: Array, weight: Array) -> bool:
    """True if a constant holds the weight; a norm in fp32 holds half-precision weights, widened without loss."""
    if constant.dtype == np.float32 and weight.dtype.itemsize == _BYTES_OF_HALF:
        weight = weight.astype(np.float32)
    # Matrix products in ONNX take the weight on the right, and torch's exporter folds the transposition into it.
    forms = (weight, weight.T) if weight.ndim == 2 else (weight,)
    return any(_equal(constant, form) for form in forms)


def lambda_constant(constants: Mapping[str, Array], manifest: Manifest, weights: Mapping[str, Array]) -> Check:
    """Check that lambda is a constant of the artifact, one number or one per head; blocks of version 2 compute it."""
    blocks = manifest.config.blocks
    if manifest.config.attention.lambda_kind == "token":
        return make_check("lambda", [], "one per token and head")
    problems, shown = [], []
    for prefix, config in blocks.items():
        own = {name: weights[prefix + name] for name in config.weight_shapes() if name in LAMBDA_VECTORS}
        expected = lambda_of_heads(config, own)[: 1 if config.constant_lambda else None]
        shown.append(", ".join(f"{number:.7g}" for number in expected))
        # Optimisers remove a multiplication by 1. The verification cases would detect another factor.
        left_out = (expected.astype(manifest.graph.dtype) == 1).all()
        if not left_out and not any(_is_lambda(constant, expected) for constant in constants.values()):
            problems.append(f"no constant of the graph is lambda{' of ' * bool(prefix)}{prefix[:-1]}, {shown[-1]}")
    return make_check("lambda", problems, f"folded to constants: {'; '.join(shown)}")


def _is_lambda(constant: Array, expected: Array) -> bool:
    if constant.size != expected.size or not _is_floating(constant):
        return False
    # Allows a few fp32 roundings in exp(.) - exp(.) + lambda_init, then one rounding to the dtype of the graph.
    size = np.abs(expected)
    allowed = epsilon(constant.dtype) * size + _ROUNDINGS_OF_LAMBDA * epsilon("float32") * (1 + size)
    return bool((np.abs(constant.astype(np.float64).reshape(-1) - expected) <= allowed).all())


def other_torch(version: str, manifest: Manifest) -> list[str]:
    """Problem to report if the version of torch that wrote the artifact is not the one in the manifest."""
    said = manifest.environment.packages.get("torch", "none")
    # The part after the plus is ignored, since a build and its distribution may differ in it.
    same = version.partition("+")[0] == said.partition("+")[0]
    return [] if same else [f"torch {version} wrote it, but the manifest says {said}"]


def norm_epsilons(found: Sequence[float], manifest: Manifest) -> Check:
    """Check that norms that are single operators of the graph have the epsilons of the config.

    Args:
        found: epsilon of each norm in the order of the graph: those of queries and keys, then that of the heads.
        manifest: manifest of the bundle.
    """
    config = manifest.config
    expected: list[float | None]
    if isinstance(config, DecoderConfig):
        found, expected = sorted(found), list(sorted(_epsilons_of(config)) if found else [])
        if len(found) != len(expected):
            return make_check("epsilon", [f"{len(found)} norms, but the layers have {len(expected)}"], "")
    else:
        num_heads = 1 if found and config.has_norm else 0
        expected = [config.qk_norm_eps] * (len(found) - num_heads) + [config.norm_eps] * num_heads
    problems = [
        f"the epsilon of a norm is {given:.7g}, but should be {wanted}"
        for given, wanted in zip(found, expected, strict=True)
        if wanted is None or not np.isclose(given, wanted, rtol=_RELATIVE_ERROR, atol=0.0)
    ]
    said = ", ".join(f"{eps:.7g}" for eps in dict.fromkeys(found))
    return make_check("epsilon", problems, said or "no norm is a single operator")


def _epsilons_of(config: DecoderConfig) -> list[float]:
    """Epsilons of all norms of a decoder: around its blocks, inside them, in PolyNorm, and after the last layer."""
    found = [config.norm_eps]
    for layer in config.layers:
        found += [config.norm_eps] * 2
        found += [] if layer.attention.qk_norm_eps is None else [layer.attention.qk_norm_eps] * 2
        found += [] if layer.attention.norm_eps is None else [layer.attention.norm_eps]
        found += [POLYNORM_EPS] * 3 if layer.mlp.kind == "polynorm" else []
    return found


def _is_floating(constant: Array) -> bool:
    return constant.dtype.kind == "f" or constant.dtype.name == "bfloat16"


def rope_constants(constants: Mapping[str, Array], manifest: Manifest) -> Check:
    """Check that the artifact contains the rotary tables for all declared positions."""
    attention, spec = manifest.config.attention, manifest.graph
    rope = attention.rope
    if rope is None:
        return make_check("rope", [], "none")
    length = spec.axes["sequence_length"].max
    dtype = np.dtype(spec.dtype)
    problems = []
    for name, table in zip(("cosine", "sine"), rope_tables(rope, attention.head_dim, length), strict=True):
        # Both tables are rounded from fp64, which changes numbers up to 1 by at most half of this tolerance.
        tolerance = epsilon(dtype)
        if not any(
            c.dtype == dtype and c.shape == table.shape and np.abs(c - table).max() <= tolerance
            for c in constants.values()
        ):
            problems.append(f"no constant of the graph is the {name} table of {length} positions")
    return make_check("rope", problems, f"tables of {length} positions, theta {rope.theta:g}")
