"""Tensors from checkpoint files. Pickled objects are rejected and never executed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from diffdeploy.checkpoints.fields import listed, read_json_object
from diffdeploy.checkpoints.hub import in_local_cache
from diffdeploy.errors import InputError
from diffdeploy.exclusive import without_warnings

__all__ = ["SAMPLE", "TensorFile", "open_tensors"]

SAMPLE = Path(__file__).parent / "sample"

# File names of transformers' save_pretrained, the current form first, since a directory may contain both.
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Maximum length of a file name in all common file systems (NAME_MAX).
_LONGEST_NAME = 255
# Keys under which Lightning, PyTorch's tutorial and nanoGPT save the weights next to an optimizer.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")


class TensorFile(Protocol):
    """Named tensors that are read on request."""

    path: Path

    def keys(self) -> list[str]:
        """Names of all tensors."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading its data."""
        ...

    def get(self, key: str) -> Tensor:
        """Read one tensor into CPU memory."""
        ...

    def holder(self, key: str) -> Path:
        """Path of the file that contains one tensor."""
        ...


_safe_open: Any = safetensors.safe_open  # its methods have no annotations


class _SafetensorsFile:
    """A ``.safetensors`` file, from which only the requested tensors are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = _safe_open(path, framework="pt")
            self._keys: list[str] = list(self._handle.keys())
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is not a readable safetensors file ({error}); it may be truncated: copy it again"
            ) from error

    def keys(self) -> list[str]:
        return list(self._keys)

    def shape(self, key: str) -> tuple[int, ...]:
        # A slice that is not indexed reads only the header.
        return tuple(self._handle.get_slice(key).get_shape())

    def get(self, key: str) -> Tensor:
        try:
            tensor: Tensor = self._handle.get_tensor(key)
        except Exception as error:
            raise InputError(f"{key} in {self.path} cannot be read ({error}); copy the file again") from error
        return tensor

    def holder(self, key: str) -> Path:  # noqa: ARG002 - all keys are in this file
        return self.path


class _TorchFile:
    """A ``torch.save`` file that contains only tensors and plain containers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        tensors = _state_dict(_load_weights(path))
        # Step counters and arguments, which many files contain next to the weights, are ignored.
        self._tensors = {str(key): value for key, value in tensors.items() if isinstance(value, Tensor)}
        if not self._tensors:
            raise InputError(f"{path} holds no state dict; accepted: a mapping from names to tensors")

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def get(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        # A sparse tensor has no rows to permute, and a tensor on the meta device has no data.
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise InputError(f"{key} in {self.path} is {_kind(tensor)}; accepted: dense tensors with data")
        return tensor

    def holder(self, key: str) -> Path:  # noqa: ARG002 - all keys are in this file
        return self.path


def _kind(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "a tensor without data (meta)"
    return "quantised" if tensor.is_quantized else f"sparse ({str(tensor.layout).removeprefix('torch.')})"


def _load_weights(path: Path) -> Any:
    """Load a ``torch.save`` file, memory-mapped if possible, so that only the tensors that are used are read."""
    # Files written by torch before 1.6 are not zip archives and cannot be mapped.
    for mmap in (True, False):
        try:
            with without_warnings():  # about pickle protocols; the error below explains the refusal better
                # Tensors are loaded onto the CPU, since files saved on a GPU must be readable on machines without one.
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:
            if mmap:
                continue
            raise InputError(
                f"{path} cannot be read as weights only, and pickled objects are never executed; save the state dict "
                "alone, with safetensors.torch.save_file or torch.save(model.state_dict())"
            ) from error
    raise AssertionError("unreachable")


def _state_dict(loaded: Any) -> Mapping[Any, Any]:
    """Find the mapping from names to tensors, which trainers nest in other mappings, sometimes repeatedly."""
    met: set[int] = set()
    while isinstance(loaded, Mapping) and id(loaded) not in met:
        met.add(id(loaded))  # a mapping in a file may contain itself
        inner = next((key for key in _STATE_DICT_KEYS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            return loaded
        loaded = loaded[inner]
    return {}


class _ShardedFile:
    """Several files with an index that maps tensors to files; each file is opened on first use."""

    def __init__(self, index: Path) -> None:
        self.path = index
        weight_map = read_json_object(index, "an index of shards").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index} is not a readable index of shards (it has no weight_map); copy it again")
        self._files = {key: _shard_path(index, name) for key, name in weight_map.items()}
        # All shards are checked now, though most are never opened: a broken download is easier to repair as a whole.
        if missing := sorted({file.name for file in self._files.values() if not file.is_file()}):
            raise InputError(f"{index.parent} lacks the shards {', '.join(missing)}; copy them again")
        self._open: dict[Path, TensorFile] = {}

    def _shard(self, key: str) -> TensorFile:
        file = self._files[key]
        if file not in self._open:
            self._open[file] = _open_file(file)
        # The index of another revision may name tensors that its shards do not contain.
        if key not in set(self._open[file].keys()):
            raise InputError(f"{file} lacks the key {key}, which {self.path.name} locates there; copy it again")
        return self._open[file]

    def keys(self) -> list[str]:
        return list(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shard(key).shape(key)

    def get(self, key: str) -> Tensor:
        return self._shard(key).get(key)

    def holder(self, key: str) -> Path:
        return self._files[key]


def _shard_path(index: Path, name: object) -> Path:
    """Path of a shard.

    Raises:
        InputError: the name is not a file name, or leads to another folder. An index is part of the download, and a
            name with ``..`` could make diffdeploy read any file of this machine.
    """
    if not isinstance(name, str) or not 0 < len(name.encode()) <= _LONGEST_NAME or "\0" in name:
        raise InputError(f"{index} names the shard {str(name)[:40]!r}, which is not a file name; copy it again")
    if Path(name).name != name:
        raise InputError(f"{index} names {name}, which is not in the same folder")
    return index.parent / name


def _open_file(path: Path) -> TensorFile:
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _TorchFile(path)


def open_tensors(path: Path) -> TensorFile:
    """Open a checkpoint: a ``.safetensors`` file, a ``torch.save`` file, an index of shards, or a directory with one.

    If the path does not exist, it may be the name of a repository in the local cache of the Hugging Face hub.

    Raises:
        InputError: nothing was found, there are several candidates, or a file is damaged or contains pickled objects.
    """
    path = in_local_cache(path) or path
    if path.is_dir():
        path = _in_directory(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a .safetensors or .pt file, or a directory with one")
    return _ShardedFile(path) if path.name.endswith(".index.json") else _open_file(path)


def _in_directory(directory: Path) -> Path:
    """Path of the only checkpoint in a directory."""
    for index in _INDICES:
        if (directory / index).is_file():
            return directory / index
    found = [p for suffix in ("*.safetensors", "*.pt", "*.pth", "*.bin") for p in sorted(directory.glob(suffix))]
    # The newest or largest file is not a safe choice: it may be an optimizer state or another epoch.
    if len(found) != 1:
        names = listed(p.name for p in found) or "none"
        raise InputError(f"{directory} must hold one .safetensors or .pt file, but holds {names}; give the path of one")
    return found[0]
