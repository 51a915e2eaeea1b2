"""Safetensors files of checkpoints, named as in transformers' ``save_pretrained``, and an index for several files."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from torch import Tensor

from diffdeploy.arrays import to_array

__all__ = ["INDEX", "write_shards"]

INDEX = "model.safetensors.index.json"
# Size of one file. A shard is in memory twice while it is written, so this limits the memory for writing.
_SHARD_BYTES = 2 * 2**30


def write_shards(tensors: Iterable[tuple[str, Tensor]], directory: Path, *, max_bytes: int = _SHARD_BYTES) -> list[str]:
    """Write tensors in the given order, with one shard in memory at a time.

    Args:
        tensors: names and tensors, which may be created on the fly.
        directory: an existing directory.
        max_bytes: maximum size of the tensors in one file; a larger tensor gets its own file.

    Returns:
        Names of the files with weights.
    """
    shards: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}
    for key, tensor in tensors:
        if held and sum(map(_size, held.values())) + _size(tensor) > max_bytes:
            shards.append(_write(held, directory / _numbered(len(shards))))
            held = {}
        held[key] = tensor
    shards.append(_write(held, directory / _numbered(len(shards))))
    if len(shards) == 1:
        (directory / _numbered(0)).rename(directory / "model.safetensors")
        return ["model.safetensors"]
    names = [_numbered(number, len(shards)) for number in range(len(shards))]
    for number, name in enumerate(names):
        (directory / _numbered(number)).rename(directory / name)
    total = sum(sum(sizes.values()) for sizes in shards)
    weight_map = {key: name for name, sizes in zip(names, shards, strict=True) for key in sizes}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def _numbered(number: int, count: int | None = None) -> str:
    """Name of a shard; the number of shards is known once all are written."""
    return f"model-{number + 1:05d}" + ("" if count is None else f"-of-{count:05d}") + ".safetensors"


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write(tensors: Mapping[str, Tensor], path: Path) -> dict[str, int]:
    """Write one file and return the sizes of its tensors in bytes."""
    arrays = {key: np.ascontiguousarray(to_array(tensor)) for key, tensor in tensors.items()}
    # Tensors are serialised first, since the file writer of safetensors hides the reason when a disk is full. Versions
    # of transformers before 5 refuse files that do not name the framework that wrote them.
    path.write_bytes(safetensors.numpy.save(arrays, metadata={"format": "pt"}))
    return {key: _size(tensor) for key, tensor in tensors.items()}
