"""Deployment of a bundle as a model in a repository of Triton Inference Server.

Layout: https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_repository.md; configuration:
``docs/user_guide/model_configuration.md`` of that repository, in the text form of ``model_config.proto``.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from diffdeploy.bundle import Bundle
from diffdeploy.errors import InputError
from diffdeploy.formats import TritonBackend, format_names, require_format
from diffdeploy.graphs import TensorSpec
from diffdeploy.staging import staged_directory

__all__ = ["CONFIG", "deploy_to_triton"]

CONFIG = "config.pbtxt"
_VERSION = "1"
# Names that need no escaping in folders and addresses.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64"}


def deploy_to_triton(bundle: Bundle, repository: Path, *, name: str, force: bool = False) -> Path:
    """Write a model into a repository, completely or not at all; other models in it are unchanged.

    Args:
        bundle: an opened bundle.
        repository: directory of models, created if it does not exist.
        name: name of the model.
        force: true to replace a model of that name.

    Returns:
        Directory of the model.

    Raises:
        InputError: Triton has no backend for the bundle's format, or the name or location is not accepted.
        UnavailableError: the disk is full.
    """
    manifest = bundle.manifest
    if manifest.graph.cache == "in-place":
        raise InputError(f"{bundle.path} has an in-place cache, but Triton keeps no buffers between requests")
    backend = require_format(manifest.format).triton
    if backend is None:
        accepted = [each for each in format_names() if require_format(each).triton is not None]
        raise InputError(
            f"{bundle.path} has format {manifest.format}, for which Triton has no backend; accepted: "
            f"{', '.join(accepted)}"
        )
    if not _NAME.fullmatch(name):
        raise InputError(f"name is {name!r}; accepted: letters, digits, and _ . - after the first character")
    model = repository / name
    with staged_directory(model, marker=CONFIG, what="Triton model", force=force) as staging:
        (staging / _VERSION).mkdir()
        for file in manifest.files:
            if any(fnmatchcase(file, pattern) for pattern in backend.files):
                shutil.copyfile(bundle.path / file, staging / _VERSION / file)
        (staging / CONFIG).write_text("".join(f"{line}\n" for line in _config(bundle, backend, name)), "utf-8")
    return model


def _config(bundle: Bundle, backend: TritonBackend, name: str) -> Iterator[str]:
    manifest = bundle.manifest
    spec = manifest.graph
    for package, least in (manifest.requires or {}).items():
        yield f"# Computed correctly by {package} {least} and newer."
    yield f'name: "{name}"'
    yield f'platform: "{backend.platform}"'
    yield f'backend: "{backend.backend}"'
    yield f"max_batch_size: {spec.axes['batch_size'].max if backend.batches else 0}"
    for kind, prefix, tensors in (("input", "INPUT", spec.inputs), ("output", "OUTPUT", spec.outputs)):
        yield from _tensors(kind, prefix, tensors, backend)
    if backend.batches:
        # Joins requests whose other axes have equal sizes, which is the default unless ragged batches are enabled.
        yield "dynamic_batching { }"
    if manifest.options.device is not None:
        # The artifact is compiled for one kind of device, but by default Triton uses a GPU if there is one.
        yield f"instance_group [ {{ kind: {'KIND_CPU' if manifest.options.device == 'cpu' else 'KIND_GPU'} }} ]"


def _tensors(kind: str, prefix: str, tensors: Mapping[str, TensorSpec], backend: TritonBackend) -> Iterator[str]:
    for position, (name, tensor) in enumerate(tensors.items()):
        # The first axis of every tensor is the batch, which is not repeated here.
        axes = tensor.shape[1:] if backend.batches else tensor.shape
        dims = ", ".join(str(-1 if isinstance(axis, str) else axis) for axis in axes)
        if backend.by_position:
            yield f"# {name}"
        said = f"{prefix}__{position}" if backend.by_position else name
        yield f'{kind} {{ name: "{said}" data_type: {_TYPES[tensor.dtype]} dims: [ {dims} ] }}'
