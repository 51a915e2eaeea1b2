"""The contract of ``model.onnx``: two attentions, dynamic axes, the bundle's weights bit for bit, nothing to fold."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, Manifest
from diffdeploy.formats.artifact import ArtifactFacts, Check
from diffdeploy.formats.checks import lambda_constant, make_check, rope_constants, weights_bit_for_bit
from diffdeploy.formats.onnx.external import load_model
from diffdeploy.formats.onnx.names import (
    FIRST_OPSET_WITH_ATTENTION,
    MODEL,
    ORT,
    ORT_ATTENTION,
    ORT_DOMAIN,
    STANDARD,
)

if TYPE_CHECKING:
    import onnx

__all__ = ["checks", "facts"]


def facts(bundle: Bundle) -> ArtifactFacts:
    """See `Format.facts`."""
    # Facts are read from nodes; weights may be gigabytes.
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

    path = bundle.path / MODEL
    model = load_model(bundle.path)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    manifest = bundle.manifest
    stream_width = manifest.config.head_dim if manifest.options.flavor == ORT else None
    return [
        _is_valid(path),
        _standard_operators(model, manifest),
        _attention_operators(model, manifest),
        _interface(model, manifest),
        _nothing_to_fold(model),
        weights_bit_for_bit(constants, weights, stream_width),
        lambda_constant(constants, manifest, weights),
        rope_constants(constants, manifest),
        _no_traces(model),
    ]


def _opset(model: "onnx.ModelProto") -> int | None:
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)


def _attention_counts(model: "onnx.ModelProto") -> tuple[int, int, int]:
    """Attentions of the standard, those of onnxruntime, and softmaxes that stand for decomposed ones."""
    counts = Counter(node.op_type for node in model.graph.node)
    return counts["Attention"], counts[ORT_ATTENTION], counts["Softmax"] + counts["LogSoftmax"]


def _is_valid(path: Path) -> Check:
    import onnx

    try:
        # By its path, since a model above 2 GB is no single message; in full, or types and shapes are not inferred.
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return Check(name="valid", passed=False, detail=str(error).strip().splitlines()[0])
    return Check(name="valid", passed=True, detail="accepted by onnx.checker with full shape inference")


def _standard_operators(model: "onnx.ModelProto", manifest: Manifest) -> Check:
    operators = {(node.domain, node.op_type) for node in model.graph.node}
    domains = {domain for domain, _ in operators} | {entry.domain for entry in model.opset_import}
    own = set() if manifest.options.flavor == STANDARD else {ORT_DOMAIN}
    problems = [f"operators of domain {domain!r}" for domain in sorted(domains - {"", "ai.onnx"} - own)]
    contributed = {name for domain, name in operators if domain == ORT_DOMAIN}
    problems += [f"operator {name} of onnxruntime" for name in sorted(contributed - {ORT_ATTENTION}) if own]
    # Operators in them would escape the counts.
    if model.functions:
        problems.append(f"{len(model.functions)} local functions")
    if _opset(model) != manifest.options.opset:
        problems.append(f"opset {_opset(model)}, but the manifest says {manifest.options.opset}")
    fine = f"{ORT_ATTENTION} of onnxruntime, else the standard domain" if own else "standard domain only"
    return make_check("operators", problems, f"{fine}, opset {_opset(model)}")


def _attention_operators(model: "onnx.ModelProto", manifest: Manifest) -> Check:
    if manifest.options.flavor == ORT:
        # One for each stream.
        expected = (0, 2, 0)
    else:
        expected = (2, 0, 0) if (_opset(model) or 0) >= FIRST_OPSET_WITH_ATTENTION else (0, 0, 2)
    counts = _attention_counts(model)
    found = ", ".join(
        f"{count} {name}" for count, name in zip(counts, ("Attention", ORT_ATTENTION, "Softmax"), strict=True)
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
            problems.append(f"{kind}s are {names}, declared are {list(specs)}")
            continue
        for value, spec in zip(values, specs.values(), strict=True):
            tensor = value.type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
            # A dynamic axis has a name and no value.
            shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
            if (dtype, shape) != (spec.dtype, list(spec.shape)):
                problems.append(f"{value.name} is {dtype} {shape}, declared is {spec.dtype} {list(spec.shape)}")
    return make_check("interface", problems, "names, dtypes and dynamic axes as declared")


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
    return make_check("folded", foldable + unused, "every node depends on the input, every constant is used")


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
    # The names that torch gives to nodes have no slashes, so that one is part of a path.
    problems += [f"{text!r} looks like a path" for text in _strings(model) if "/" in text or "\\" in text]
    return make_check("traces", problems, "no path, metadata or doc string")


def _annotated(part: Any) -> bool:
    return bool(part.doc_string) or bool(getattr(part, "metadata_props", ()))
