"""The contract of ``model.onnx``: two attentions, dynamic axes, the bundle's weights bit for bit, nothing to fold."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffdeploy.bundle import Bundle, Manifest
from diffdeploy.config import LAMBDA_VECTORS, DiffAttentionConfig
from diffdeploy.verify.oracle import lambda_value, rope_tables
from diffdeploy.verify.report import Check, GraphFacts

if TYPE_CHECKING:
    import onnx

__all__ = ["checks", "facts"]

Array = np.ndarray[Any, np.dtype[Any]]

_FIRST_OPSET_WITH_ATTENTION = 23


def facts(bundle: Bundle) -> GraphFacts:
    """See `diffdeploy.verify.contracts.facts`."""
    import onnx

    model = onnx.load(bundle.path / "model.onnx", load_external_data=False)
    return GraphFacts(
        variant=bundle.manifest.graph.variant,
        attention_ops=sum(_attention_counts(model)),
        opset=_opset(model),
        inputs=[value.name for value in model.graph.input],
        outputs=[value.name for value in model.graph.output],
    )


def checks(bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
    """See `diffdeploy.verify.contracts.checks`."""
    import onnx

    path = bundle.path / "model.onnx"
    model = onnx.load(path)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    manifest = bundle.manifest
    return [
        _is_valid(path),
        _standard_operators(model, manifest),
        _attention_operators(model),
        _interface(model, manifest),
        _nothing_to_fold(model),
        _weights(constants, weights),
        _lambda(constants, manifest, weights),
        _rope_tables(constants, manifest),
        _no_traces(model),
    ]


def _check(name: str, problems: list[str], fine: str) -> Check:
    return Check(name=name, passed=not problems, detail="; ".join(problems) if problems else fine)


def _opset(model: "onnx.ModelProto") -> int | None:
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)


def _attention_counts(model: "onnx.ModelProto") -> tuple[int, int]:
    """Fused attentions, and softmaxes that stand for decomposed ones."""
    counts = Counter(node.op_type for node in model.graph.node)
    return counts["Attention"], counts["Softmax"] + counts["LogSoftmax"]


def _is_valid(path: Path) -> Check:
    import onnx

    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return Check(name="valid", passed=False, detail=str(error).strip().splitlines()[0])
    return Check(name="valid", passed=True, detail="accepted by onnx.checker with full shape inference")


def _standard_operators(model: "onnx.ModelProto", manifest: Manifest) -> Check:
    domains = {node.domain for node in model.graph.node} | {entry.domain for entry in model.opset_import}
    problems = [f"operators of domain {domain!r}" for domain in sorted(domains - {"", "ai.onnx"})]
    if model.functions:
        problems.append(f"{len(model.functions)} local functions")
    if _opset(model) != manifest.options["opset"]:
        problems.append(f"opset {_opset(model)}, but the manifest says {manifest.options['opset']}")
    return _check("operators", problems, f"standard domain only, opset {_opset(model)}")


def _attention_operators(model: "onnx.ModelProto") -> Check:
    fused, softmaxes = _attention_counts(model)
    expected = (2, 0) if (_opset(model) or 0) >= _FIRST_OPSET_WITH_ATTENTION else (0, 2)
    found = f"{fused} Attention and {softmaxes} Softmax nodes"
    problems = [] if (fused, softmaxes) == expected else [f"{found}; expected {expected[0]} and {expected[1]}"]
    return _check("attention", problems, found)


def _interface(model: "onnx.ModelProto", manifest: Manifest) -> Check:
    import onnx

    problems = []
    for kind, values, specs in (
        ("input", model.graph.input, manifest.graph.inputs),
        ("output", model.graph.output, manifest.graph.outputs),
    ):
        names = [value.name for value in values]
        if names != list(specs):
            problems.append(f"{kind}s are {names}, declared are {list(specs)}")
            continue
        for value, spec in zip(values, specs.values(), strict=True):
            tensor = value.type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
            shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
            if (dtype, shape) != (spec.dtype, list(spec.shape)):
                problems.append(f"{value.name} is {dtype} {shape}, declared is {spec.dtype} {list(spec.shape)}")
    return _check("interface", problems, "names, dtypes and dynamic axes as declared")


def _nothing_to_fold(model: "onnx.ModelProto") -> Check:
    """Every node must depend on an input; what does not should have been computed at export."""
    dependent = {value.name for value in model.graph.input}
    foldable = []
    for node in model.graph.node:  # in topological order, as the standard demands
        if dependent.intersection(node.input):
            dependent.update(node.output)
        else:
            foldable.append(f"{node.op_type} {node.name} does not depend on the input")
    used = {name for node in model.graph.node for name in node.input}
    unused = [f"constant {t.name} is not used" for t in model.graph.initializer if t.name not in used]
    return _check("folded", foldable + unused, "every node depends on the input, every constant is used")


def _weights(constants: Mapping[str, Array], weights: Mapping[str, Array]) -> Check:
    """Each weight stands in the graph once, bit for bit, as it is or transposed."""
    left = dict(constants)
    problems = []
    for name, weight in weights.items():
        if name in LAMBDA_VECTORS:
            continue
        match = next((key for key, constant in left.items() if _same_bits(constant, weight)), None)
        if match is None:
            problems.append(f"{name} is not in the graph bit for bit")
        else:
            del left[match]
    return _check("weights", problems, "bit-identical to weights.safetensors")


def _same_bits(constant: Array, weight: Array) -> bool:
    """Whether a constant is the weight; a norm that runs in fp32 holds its fp16 weight widened, which loses nothing."""
    if constant.dtype == np.float32 and weight.dtype == np.float16:
        weight = weight.astype(np.float32)
    if constant.dtype != weight.dtype:
        return False
    forms = (weight, weight.T) if weight.ndim == 2 else (weight,)
    return any(constant.shape == form.shape and constant.tobytes() == form.tobytes() for form in forms)


def _lambda(constants: Mapping[str, Array], manifest: Manifest, weights: Mapping[str, Array]) -> Check:
    if not isinstance(manifest.config, DiffAttentionConfig):
        return _check("lambda", [], "one per token and head")
    expected = lambda_value(manifest.config, weights)
    # A few roundings of fp32 in exp(.) - exp(.) + lambda_init, then one to the dtype of the graph.
    scalars = {name: c for name, c in constants.items() if c.size == 1 and c.dtype.kind == "f"}
    near = [
        name
        for name, constant in scalars.items()
        if abs(float(constant.reshape(())) - expected)
        <= np.finfo(constant.dtype).eps * abs(expected) + 8 * np.finfo(np.float32).eps * (1 + abs(expected))
    ]
    problems = [] if near else [f"no constant of the graph is lambda, {expected:.7g}"]
    return _check("lambda", problems, f"folded to one constant, {expected:.7g}")


def _rope_tables(constants: Mapping[str, Array], manifest: Manifest) -> Check:
    rope, spec = manifest.config.rope, manifest.graph
    if rope is None:
        return _check("rope", [], "none")
    length = spec.axes["sequence_length"].max
    dtype = np.dtype(spec.inputs["hidden_states"].dtype)
    problems = []
    for name, table in zip(("cosine", "sine"), rope_tables(rope, manifest.config.head_dim, length), strict=True):
        tolerance = float(np.finfo(dtype).eps)
        if not any(
            c.dtype == dtype and c.shape == table.shape and np.abs(c - table).max() <= tolerance
            for c in constants.values()
        ):
            problems.append(f"no constant of the graph is the {name} table of {length} positions")
    return _check("rope", problems, f"tables of {length} positions, theta {rope.theta:g}")


def _strings(model: "onnx.ModelProto") -> Iterator[str]:
    graph = model.graph
    yield from (graph.name, model.producer_name, model.domain)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        yield value.name
        if hasattr(value, "external_data"):
            yield from (entry.value for entry in value.external_data)
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)
        for attribute in node.attribute:
            yield from (text.decode(errors="replace") for text in (attribute.s, *attribute.strings))


def _no_traces(model: "onnx.ModelProto") -> Check:
    graph = model.graph
    parts = (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer)
    problems = [f"metadata or a doc string on {part.name or 'the graph'}" for part in parts[1:] if _annotated(part)]
    if _annotated(model):
        problems.append("metadata or a doc string on the model")
    problems += [f"{text!r} looks like a path" for text in _strings(model) if "/" in text or "\\" in text]
    return _check("traces", problems, "no path, metadata or doc string")


def _annotated(part: Any) -> bool:
    return bool(part.doc_string) or bool(getattr(part, "metadata_props", ()))
