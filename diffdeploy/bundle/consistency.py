"""Checks of a manifest against itself and the weights, since its digests do not prove that its content is sound."""

from pathlib import Path
from typing import Any

from diffdeploy.bundle.manifest import Manifest
from diffdeploy.bundle.quantised import HEAD, stored_tensors
from diffdeploy.config import DecoderConfig
from diffdeploy.errors import InputError, IntegrityError
from diffdeploy.graphs import DType, GraphSpec, graph_spec

__all__ = ["require_consistent"]

# More rows and positions than any model has; tables of this many positions can still be computed.
_MOST = {"batch_size": 2**20, "sequence_length": 2**24}
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}


def require_consistent(manifest: Manifest, weights: Path) -> None:
    """Check that the graph is one that the block can have, and that the file holds exactly the weights of that block.

    Args:
        manifest: manifest of a bundle.
        weights: its weights file, of which only the header is read.

    Raises:
        IntegrityError: the manifest contradicts itself or the weights.
    """
    spec = manifest.graph
    for axis, most in _MOST.items():
        given = spec.axes[axis].max if axis in spec.axes else 0
        if not 1 <= given <= most:
            raise IntegrityError(f"manifest.json has {given} as the maximum of {axis}; accepted: 1 to {most}")
    try:
        implied = graph_spec(
            spec.variant,
            manifest.config,
            dtype=_dtype(spec),
            max_batch_size=spec.axes["batch_size"].max,
            max_sequence_length=spec.axes["sequence_length"].max,
            padding=spec.padding,
            cache=spec.cache,
            logits=spec.logits if spec.main_output in spec.outputs else "all",
        )
    except InputError as error:
        raise IntegrityError(f"manifest.json does not describe a graph: {error}") from error
    # Backends match tensors by their order, which an equality test of dictionaries ignores.
    ordered = (list(spec.inputs), list(spec.outputs)) == (list(implied.inputs), list(implied.outputs))
    if not ordered or spec not in (implied, _with_streams_apart(implied, manifest)):
        raise IntegrityError(
            f"manifest.json has a graph that its block does not have: {_first_difference(spec, implied)}"
        )
    _require_weights(manifest, weights)
    _require_source(manifest)


def _require_source(manifest: Manifest) -> None:
    """Check that the records of the export and of the checkpoint are plausible; the checkpoint is not read again."""
    if manifest.options.seed < 0:
        raise IntegrityError(f"manifest.json has the seed {manifest.options.seed}; accepted: 0 or more")
    source = manifest.provenance
    if isinstance(manifest.config, DecoderConfig) and source.layer is not None:
        raise IntegrityError(f"manifest.json has layer {source.layer}, but a whole model has no single layer")
    # Compared as text, since a key may contain more digits than Python converts to a number.
    numbers = {part.lstrip("0") for key in source.keys for part in key.split(".") if part.isdecimal()}
    if source.layer is not None and str(source.layer).lstrip("0") not in numbers:
        raise IntegrityError(f"manifest.json has layer {source.layer}, which no key of its weights contains")
    if (asked := source.options.get("layer", source.layer)) != source.layer:
        raise IntegrityError(f"manifest.json has layer {source.layer}, but layer {asked} was requested")


def _dtype(spec: GraphSpec) -> DType:
    """Dtype of a graph, whatever else is wrong with it."""
    output = spec.outputs.get(spec.main_output)
    return "float32" if output is None or output.dtype == "int64" else output.dtype


def _with_streams_apart(spec: GraphSpec, manifest: Manifest) -> GraphSpec:
    """Convert a graph to its form in earlier versions, where the cache has a head for each key stream."""
    config, heads = manifest.config.attention, manifest.config.attention.num_key_streams

    def earlier(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            name: tensor.model_copy(update={"shape": ("batch_size", heads, tensor.shape[2], config.head_dim)})
            if name in ("past_key_values.key", "present.key")
            else tensor
            for name, tensor in tensors.items()
        }

    return spec.model_copy(update={"inputs": earlier(spec.inputs), "outputs": earlier(spec.outputs)})


def _first_difference(spec: GraphSpec, implied: GraphSpec) -> str:
    given, wanted = spec.model_dump(mode="json"), implied.model_dump(mode="json")
    for part in given:
        if given[part] == wanted[part] and list(given[part]) == list(wanted[part]):
            continue
        names = dict.fromkeys([*wanted[part], *given[part]])
        name = next((each for each in names if given[part].get(each) != wanted[part].get(each)), None)
        if name is None:
            return f"the order of its {part} is {', '.join(given[part])}"
        return f"{name} of its {part} is {given[part].get(name)}, but should be {wanted[part].get(name)}"
    return "its shapes differ"


def _require_weights(manifest: Manifest, path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    quantisation = manifest.options.quantisation
    if quantisation is not None and quantisation.head and HEAD not in manifest.config.weight_shapes():
        raise IntegrityError("manifest.json has a quantised head, but the head of its model is the embedding")
    expected = stored_tensors(manifest.config, quantisation, manifest.graph.dtype)
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if odd := sorted(names ^ expected.keys()):
                where = "lacks" if odd[0] in expected else "also holds"
                raise IntegrityError(
                    f"{path} {where} {odd[0]}: its weights are not those of the block in manifest.json"
                )
            for name, (dtype, shape) in expected.items():
                found = file.get_slice(name)
                wanted = (list(shape), _DTYPES[dtype])
                given = (list(found.get_shape()), str(found.get_dtype()))
                if given != wanted:
                    was, due = (f"{kind} {sizes}" for sizes, kind in (given, wanted))
                    raise IntegrityError(f"{name} in {path} is {was}; the block in manifest.json has {due}")
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error
