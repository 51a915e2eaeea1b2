"""Translation of requests in the Open Inference Protocol to arrays and back, without importing a server.

Specification: https://github.com/kserve/open-inference-protocol, "inference_rest", version 2.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, get_type_hints

import numpy as np
from pydantic import ConfigDict, ValidationError, create_model

from diffdeploy.arrays import Array
from diffdeploy.errors import InputError
from diffdeploy.graphs import GraphSpec, TensorSpec
from diffdeploy.runtime import Runtime
from diffdeploy.runtime.generation import GenerationOptions

__all__ = ["Served", "TensorMetadata", "WireTensor", "datatype_of"]

# bfloat16 is missing: the protocol cannot encode it in JSON, and neither server knows its name.
_DATATYPES = {"float32": "FP32", "float16": "FP16", "int64": "INT64"}
_TEXT = "BYTES"

# Names of request parameters that servers and clients add for their own use.
_OF_TRANSPORT = ("binary_data_output", "content_type", "headers")
_NEW_TOKENS = "max_new_tokens"


class TensorMetadata(NamedTuple):
    """Description of an input or output in the protocol.

    Attributes:
        name: name of the tensor.
        datatype: datatype of the protocol, such as ``FP32``.
        shape: sizes of the axes, -1 for any size.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class WireTensor:
    """An input in a request.

    Attributes:
        name: name of the tensor.
        datatype: datatype of the protocol, such as ``FP32``.
        shape: sizes of the axes.
        data: elements in row-major order, nested or flat.
    """

    name: str
    datatype: str
    shape: Sequence[int]
    data: Any


def datatype_of(array: Array) -> str:
    """Datatype of the protocol for an array's dtype; arrays of objects hold text."""
    return _TEXT if array.dtype == object else _DATATYPES[array.dtype.name]


class Served:
    """A bundle that answers requests; calls from several threads are safe.

    Args:
        runtime: an opened bundle.

    Attributes:
        path: directory of the bundle.
        platform: platform in the metadata.
        inputs: inputs of the graph.
        outputs: outputs of the graph.

    Raises:
        InputError: the protocol cannot represent the bundle's dtype.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        spec = runtime.spec
        if spec.dtype not in _DATATYPES:
            raise InputError(
                f"{runtime.bundle.path} is in {spec.dtype}, which the Open Inference Protocol cannot represent; "
                "accepted: float32 and float16"
            )
        self.path = runtime.bundle.path
        self.platform = f"diffdeploy_{runtime.bundle.manifest.format}"
        self.inputs = _metadata(spec.inputs)
        self.outputs = _metadata(spec.outputs)

    def answer(
        self,
        inputs: Sequence[WireTensor],
        parameters: Mapping[str, Any] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Answer a request.

        A model generates tokens if ``max_new_tokens`` is among the parameters, or ``text`` among the inputs. Prompts
        are ``input_ids`` ``[B, S]``, padded on the left, with an ``attention_mask`` if there is padding, or ``text``
        ``[B]``. Other parameters are those of `GenerationOptions`. The output ``output_ids``
        ``[B, S + new]`` contains prompts and new tokens. If the bundle has a tokenizer, the output ``text`` ``[B]``
        contains the new text. Any other request runs the graph.

        Args:
            inputs: input tensors with unique names.
            parameters: parameters of the request.
            outputs: names of the requested outputs; all of them by default.

        Raises:
            InputError: the request is invalid, and the message says what is accepted.
            DiffDeployError: the backend failed.
        """
        given = {tensor.name: tensor for tensor in inputs}
        if len(given) < len(inputs):
            raise InputError(f"inputs are {[tensor.name for tensor in inputs]}; each may be given once")
        options = {name: value for name, value in (parameters or {}).items() if name not in _OF_TRANSPORT}
        if self._runtime.spec.variant == "model" and (_NEW_TOKENS in options or "text" in given):
            found = _generated(self._runtime, given, options)
        else:
            found = self._runtime(**_graph_inputs(self._runtime.spec, given))
        if outputs is None:
            return found
        if unknown := [name for name in outputs if name not in found]:
            raise InputError(f"output {unknown[0]!r} is requested; accepted: {', '.join(found)}")
        return {name: found[name] for name in outputs}

    def close(self) -> None:
        """Release the backend."""
        self._runtime.close()


def _metadata(tensors: Mapping[str, TensorSpec]) -> tuple[TensorMetadata, ...]:
    return tuple(
        TensorMetadata(
            name, _DATATYPES[tensor.dtype], tuple(-1 if isinstance(axis, str) else axis for axis in tensor.shape)
        )
        for name, tensor in tensors.items()
    )


def _graph_inputs(spec: GraphSpec, given: Mapping[str, WireTensor]) -> dict[str, Array]:
    if given.keys() != spec.inputs.keys():
        raise InputError(f"inputs are {sorted(given)}; accepted: {sorted(spec.inputs)}")
    return {name: _array(tensor, spec.inputs[name].dtype) for name, tensor in given.items()}


def _array(tensor: WireTensor, dtype: str) -> Array:
    """Elements of a tensor in a dtype, which must represent all of them without change."""
    if tensor.datatype != _DATATYPES[dtype]:
        raise InputError(f"{tensor.name} has datatype {tensor.datatype}; accepted: {_DATATYPES[dtype]}")
    try:
        elements = np.asarray(tensor.data)
    # Raised for rows of different lengths.
    except ValueError:
        _refuse_elements(tensor)
    if elements.size != _size(tensor):
        raise InputError(f"{tensor.name} has {elements.size} elements, but its shape is {list(tensor.shape)}")
    if elements.size and elements.dtype.kind not in ("iu" if dtype == "int64" else "fiu"):
        _refuse_elements(tensor)
    with np.errstate(over="ignore"):
        array = elements.astype(dtype)
    # Integers beyond int64 would wrap around, and other numbers would become infinite.
    if elements.dtype.kind == "u" and dtype == "int64":
        _refuse_elements(tensor)
    if elements.dtype.kind == "f" and np.isinf(array).sum() > np.isinf(elements).sum():
        _refuse_elements(tensor)
    return array.reshape(tensor.shape)


def _size(tensor: WireTensor) -> int:
    # numpy would infer the size of -1.
    if any(size < 0 for size in tensor.shape):
        raise InputError(f"{tensor.name} has shape {list(tensor.shape)}; accepted: sizes of 0 or more")
    return math.prod(tensor.shape)


def _refuse_elements(tensor: WireTensor) -> NoReturn:
    raise InputError(f"{tensor.name} has an element that is not {tensor.datatype}, or rows of different lengths")


def _generated(runtime: Runtime, given: Mapping[str, WireTensor], parameters: Mapping[str, Any]) -> dict[str, Array]:
    if given.keys() not in ({"text"}, {"input_ids"}, {"input_ids", "attention_mask"}):
        raise InputError(
            f"inputs are {sorted(given)}; accepted: text, or input_ids with or without attention_mask, to generate"
        )
    options = _options(parameters)
    mask: Array | None
    if "text" in given:
        ids, mask = _encoded(runtime, given["text"])
    else:
        ids = _array(given["input_ids"], "int64")
        mask = _array(given["attention_mask"], "int64") if "attention_mask" in given else None
    # Checked before a cache for all of them is created.
    if len(ids) > (most := runtime.spec.axes["batch_size"].max):
        raise InputError(f"batch_size is {len(ids)}; accepted: 1 to {most}")
    steps = list(runtime.stream(ids, mask, **options))
    found = {"output_ids": np.concatenate([ids, *(step.tokens[:, None] for step in steps)], axis=1)}
    texts = [step.texts for step in steps if step.texts is not None]
    if texts:
        found["text"] = np.array(["".join(row) for row in zip(*texts, strict=True)], dtype=object)
    return found


# Only types are checked here; the accepted numbers are checked where they are used.
_FIELDS: dict[str, Any] = {
    _NEW_TOKENS: (int, ...),
    **{name: (hint, None) for name, hint in get_type_hints(GenerationOptions).items()},
}
_Options = create_model("_Options", __config__=ConfigDict(extra="forbid", strict=True), **_FIELDS)


def _options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(_Options.model_validate(dict(parameters)).model_dump(exclude_unset=True))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise InputError(f"parameter {name} is not accepted: {first['msg']}") from error


def _encoded(runtime: Runtime, tensor: WireTensor) -> tuple[Array, Array]:
    """Tokens of prompts ``[B, S]``, padded on the left, and their mask."""
    texts = tensor.data
    if tensor.datatype != _TEXT or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"text has datatype {tensor.datatype}; accepted: {_TEXT}, a list of texts")
    if list(tensor.shape) != [len(texts)]:
        raise InputError(f"text has shape {list(tensor.shape)} and {len(texts)} texts; accepted: one axis")
    rows = [runtime.tokenizer.encode(text) for text in texts]
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise InputError(f"text {empty[0]} has no tokens; give at least one")
    longest = max(map(len, rows), default=0)
    ids, mask = np.zeros((2, len(rows), longest), np.int64)
    for row, tokens in enumerate(rows):
        ids[row, longest - len(tokens) :], mask[row, longest - len(tokens) :] = tokens, 1
    return ids, mask
