"""The contract of ``model.onnx``: two attentions, dynamic axes, bit-identical weights, nothing left to fold."""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, Manifest
from diffdeploy.formats.artifact import ArtifactFacts, Check
from diffdeploy.formats.checks import (
    lambda_constant,
    make_check,
    norm_epsilons,
    other_torch,
    rope_constants,
    weights_bit_for_bit,
)
from diffdeploy.formats.onnx.external import load_model
from diffdeploy.formats.onnx.messages import strings, unwritten
from diffdeploy.formats.onnx.names import (
    FIRST_OPSET_WITH_ATTENTION,
    MATMUL_NBITS,
    MODEL,
    ORT,
    ORT_ATTENTION,
    ORT_DOMAIN,
    ORT_ROTARY,
)
from diffdeploy.formats.onnx.nbits import packed_constants, quantised_products

if TYPE_CHECKING:
    import onnx

__all__ = ["checks", "facts"]

_STANDARD_DOMAIN = {"", "ai.onnx"}
# Operators of a softmax, fused or decomposed; lambda is folded, and a sigmoid is a separate operator.
_EXPONENTIALS = ("Softmax", "LogSoftmax", "Exp", "ReduceLogSumExp")
# Additional dtypes: those of sums, of sizes and positions, and of masks.
_ELSE = ("FLOAT", "INT64", "INT32", "BOOL")
# Attributes that set the precision in which an operator computes, which may be lower than that of its tensors.
_COMPUTES_IN = ("stash_type", "softmax_precision")
# Producer name that torch's exporter writes.
_PRODUCER = "pytorch"


def facts(bundle: Bundle) -> ArtifactFacts:
    """See `Format.facts`."""
    # Facts are read from nodes only; weights may take gigabytes.
    model = load_model(bundle.path, weights=False)
    return ArtifactFacts(
        variant=bundle.manifest.graph.variant,
        attention_ops=sum(_attention_counts(model)),
        opset=_opset(model),
        inputs=[value.name for value in model.graph.input],
        outputs=[value.name for value in model.graph.output],
    )


def checks(bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
    """See `Format.contract`."""
    import onnx

    model, manifest = load_model(bundle.path, weights=False), bundle.manifest
    notes, others = unwritten(model)
    structure = [
        _is_valid(bundle.path / MODEL),
        _standard_operators(model, manifest, others),
        _attention_operators(model, manifest),
        _interface(model, manifest),
        _precision(model, manifest),
        _epsilons(model, manifest),
        _nothing_to_fold(model),
        _no_traces(model, manifest, notes),
    ]
    # Read last, since this loads weights from their separate file into the model.
    constants = {t.name: onnx.numpy_helper.to_array(t, str(bundle.path)) for t in model.graph.initializer}
    # The flavor ort writes blocks stream by stream.
    by_stream = manifest.options.flavor == ORT and manifest.graph.variant != "model"
    stream_width = manifest.config.attention.head_dim if by_stream else None
    quantisation = manifest.options.quantisation
    whole = {name: array for name, array in weights.items() if not (quantisation and quantisation.covers(name))}
    return [
        *structure,
        *quantised_products(model, constants, bundle),
        weights_bit_for_bit(constants, whole, stream_width),
        lambda_constant(constants, manifest, weights),
        rope_constants(constants, manifest),
    ]


def _opset(model: "onnx.ModelProto") -> int | None:
    return next((entry.version for entry in model.opset_import if entry.domain in _STANDARD_DOMAIN), None)


def _attention_counts(model: "onnx.ModelProto") -> tuple[int, int, int]:
    """Counts of standard attentions, of onnxruntime's attentions, and of softmaxes from decomposed attentions."""
    counts = Counter(node.op_type for node in model.graph.node)
    return counts["Attention"], counts[ORT_ATTENTION], sum(counts[name] for name in _EXPONENTIALS)


def _is_valid(path: Path) -> Check:
    import onnx

    try:
        # Checked by path, since a model above 2 GB does not fit into one protobuf message. The full check infers types
        # and shapes.
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return Check(name="valid", passed=False, detail=str(error).strip().splitlines()[0])
    return Check(name="valid", passed=True, detail="accepted by onnx.checker with full shape inference")


def _standard_operators(model: "onnx.ModelProto", manifest: Manifest, others: list[str]) -> Check:
    operators = {(node.domain, node.op_type) for node in model.graph.node}
    domains = {domain for domain, _ in operators} | {entry.domain for entry in model.opset_import}
    own = {ORT_DOMAIN} if manifest.options.flavor == ORT else set()
    problems = [f"operators of domain {domain!r}" for domain in sorted(domains - _STANDARD_DOMAIN - own)]
    contributed = {name for domain, name in operators if domain == ORT_DOMAIN}
    allowed = {ORT_ATTENTION} | ({ORT_ROTARY} if manifest.graph.variant == "model" else set())
    allowed |= {MATMUL_NBITS} if manifest.options.quantisation is not None else set()
    problems += [f"operator {name} of onnxruntime" for name in sorted(contributed - allowed) if own]
    # Includes subgraphs and functions, whose operators would escape the counts.
    problems += [f"{other}, which no export writes" for other in others]
    opsets = [entry.version for entry in model.opset_import if entry.domain in _STANDARD_DOMAIN]
    if opsets != [manifest.options.opset]:
        problems.append(f"opset {', '.join(map(str, opsets))}, but the manifest says {manifest.options.opset}")
    fine = (
        f"{' and '.join(sorted(allowed))} of onnxruntime, otherwise standard domain" if own else "standard domain only"
    )
    return make_check("operators", problems, f"{fine}, opset {_opset(model)}")


def _attention_operators(model: "onnx.ModelProto", manifest: Manifest) -> Check:
    if manifest.options.flavor == ORT:
        # A block has one for each stream.
        per_layer = (0, 1 if manifest.graph.variant == "model" else 2, 0)
    else:
        per_layer = (2, 0, 0) if (_opset(model) or 0) >= FIRST_OPSET_WITH_ATTENTION else (0, 0, 2)
    expected = tuple(count * len(manifest.config.blocks) for count in per_layer)
    counts = _attention_counts(model)
    found = ", ".join(
        f"{count} {name}" for count, name in zip(counts, ("Attention", ORT_ATTENTION, "Softmax or Exp"), strict=True)
    )
    wanted = ", ".join(map(str, expected))
    problems = [] if counts == expected else [f"{found} nodes; expected {wanted}"]
    return make_check("attention", problems, f"{found} nodes")


def _interface(model: "onnx.ModelProto", manifest: Manifest) -> Check:
    import onnx

    problems = []
    for kind, values, specs in (
        ("input", model.graph.input, manifest.graph.inputs),
        ("output", model.graph.output, manifest.graph.outputs),
    ):
        names = [value.name for value in values]
        if names != list(specs):
            problems.append(f"{kind}s are {names}, but {list(specs)} are declared")
            continue
        for value, spec in zip(values, specs.values(), strict=True):
            tensor = value.type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
            # A dynamic axis has a name and no value.
            shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
            if (dtype, shape) != (spec.dtype, list(spec.shape)):
                problems.append(f"{value.name} is {dtype} {shape}, but declared as {spec.dtype} {list(spec.shape)}")
    return make_check("interface", problems, "names, dtypes and dynamic axes as declared")


def _nothing_to_fold(model: "onnx.ModelProto") -> Check:
    """Check that every node depends on an input; other nodes should have been computed at export."""
    dependent = {value.name for value in model.graph.input}
    foldable = []
    for node in model.graph.node:  # in topological order, as the standard demands
        if dependent.intersection(node.input):
            dependent.update(node.output)
        else:
            foldable.append(f"{node.op_type} {node.name} does not depend on the input")
    used = {name for node in model.graph.node for name in node.input}
    unused = [f"constant {t.name} is not used" for t in model.graph.initializer if t.name not in used]
    return make_check("folded", foldable + unused, "every node depends on the input, every constant is used")


def _precision(model: "onnx.ModelProto", manifest: Manifest) -> Check:
    """Check that no number is narrower than the dtype of the graph, including intermediate values."""
    import onnx

    types = onnx.TensorProto.DataType
    # Half-precision graphs compute attentions and norms in float32.
    accepted = {types.Value(name) for name in (manifest.graph.dtype.upper().replace("FLOAT32", "FLOAT"), *_ELSE)}
    values = list(model.graph.value_info)
    # A model with inconsistent types is invalid, which another check reports.
    with suppress(onnx.shape_inference.InferenceError):
        # The graph's own declarations of inner types are only claims, so they are inferred again.
        values += onnx.shape_inference.infer_shapes(model).graph.value_info
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    # Another check compares every bit of weights that are quantised on purpose.
    quantised = packed_constants(model) if manifest.options.quantisation is not None else set()
    found |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    problems = [
        f"{name} is {types.Name(kind)}"
        for name, kind in found.items()
        if kind not in accepted and (kind != types.UINT8 or name not in quantised)
    ]
    problems += [
        f"{node.op_type} {node.name} computes in {types.Name(attribute.i)}"
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name in _COMPUTES_IN and attribute.i != types.FLOAT
    ]
    but = f" but {len(quantised)} quantised matrices" if quantised else ""
    return make_check("precision", problems, f"nothing narrower than {manifest.graph.dtype}{but}")


def _epsilons(model: "onnx.ModelProto", manifest: Manifest) -> Check:
    norms = [node for node in model.graph.node if node.op_type == "RMSNormalization"]
    # The standard's default applies without the attribute.
    found = [next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5) for node in norms]
    return norm_epsilons(found, manifest)


def _no_traces(model: "onnx.ModelProto", manifest: Manifest, notes: list[str]) -> Check:
    # torch uses no slashes in node names, so a slash indicates a path.
    problems = notes + [f"{text!r} looks like a path" for text in strings(model) if "/" in text or "\\" in text]
    if model.producer_name != _PRODUCER:
        problems.append(f"it was produced by {model.producer_name!r}, not by {_PRODUCER}")
    problems += other_torch(model.producer_version, manifest)
    return make_check("traces", problems, "no path, metadata or doc string")
