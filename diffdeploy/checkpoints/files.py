"""Tensors from files. Pickled objects are refused, never run."""

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

# As transformers' save_pretrained names them, the present form first: a directory may hold both.
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Of a file in any file system that is in use (NAME_MAX).
_LONGEST_NAME = 255
# Where training scripts put the weights beside an optimizer: Lightning, PyTorch's own tutorial, and nanoGPT's.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")


class TensorFile(Protocol):
    """Named tensors that are read when asked for."""

    path: Path

    def keys(self) -> list[str]:
        """All tensor names."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        ...

    def get(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        ...

    def holder(self, key: str) -> Path:
        """The file that one tensor is in."""
        ...


_safe_open: Any = safetensors.safe_open  # its methods are unannotated


class _SafetensorsFile:
    """A ``.safetensors`` file, of which only the tensors that are asked for are read."""

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
        # A slice that is not indexed reads the header alone.
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
    """A ``torch.save`` file that holds tensors and plain containers only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        tensors = _state_dict(_load_weights(path))
        # Step counters and arguments stand beside the weights in many files, and are no weights.
        self._tensors = {str(key): value for key, value in tensors.items() if isinstance(value, Tensor)}
        if not self._tensors:
            raise InputError(f"{path} holds no state dict; accepted is a mapping from names to tensors")

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def get(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        # A sparse tensor has no rows to permute, and one on the meta device has no numbers.
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise InputError(f"{key} in {self.path} is {_kind(tensor)}; accepted are dense tensors with their numbers")
        return tensor

    def holder(self, key: str) -> Path:  # noqa: ARG002 - all keys are in this file
        return self.path


def _kind(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "a tensor without numbers (meta)"
    return "quantised" if tensor.is_quantized else f"sparse ({str(tensor.layout).removeprefix('torch.')})"


def _load_weights(path: Path) -> Any:
    """What a ``torch.save`` file holds, mapped into memory where it can be, so that only what is used is read."""
    # Files of torch before 1.6 are no archives and cannot be mapped.
    for mmap in (True, False):
        try:
            with without_warnings():  # about pickle protocols, before the refusal that says it better
                # To the CPU: what was saved on a GPU must be readable on a machine without one.
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
    """The mapping from names to tensors, which trainers put inside others, some of them more than once."""
    met: set[int] = set()
    while isinstance(loaded, Mapping) and id(loaded) not in met:
        met.add(id(loaded))  # a file may hold a mapping that contains itself
        inner = next((key for key in _STATE_DICT_KEYS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            return loaded
        loaded = loaded[inner]
    return {}


class _ShardedFile:
    """Several files and the index that says which tensor is in which; each is opened when needed."""

    def __init__(self, index: Path) -> None:
        self.path = index
        weight_map = read_json_object(index, "an index of shards").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index} is not a readable index of shards (it has no weight_map); copy it again")
        self._files = {key: _shard_path(index, name) for key, name in weight_map.items()}
        # All of them now, though most are never opened: a broken download is cheaper to mend as a whole.
        if missing := sorted({file.name for file in self._files.values() if not file.is_file()}):
            raise InputError(f"{index.parent} lacks the shards {', '.join(missing)}; copy them again")
        self._open: dict[Path, TensorFile] = {}

    def _shard(self, key: str) -> TensorFile:
        file = self._files[key]
        if file not in self._open:
            self._open[file] = _open_file(file)
        # An index of another revision names tensors that its shards do not hold.
        if key not in set(self._open[file].keys()):
            raise InputError(f"{file} lacks the key {key}, which {self.path.name} says is there; copy it again")
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
    """Where a shard is.

    Raises:
        InputError: a name that is none, or that leads elsewhere: an index comes with the download, and a name with
            ``..`` would have any file of this machine read.
    """
    if not isinstance(name, str) or not 0 < len(name.encode()) <= _LONGEST_NAME or "\0" in name:
        raise InputError(f"{index} names the shard {str(name)[:40]!r}, which is no file name; copy it again")
    if Path(name).name != name:
        raise InputError(f"{index} names {name}, which is not beside it")
    return index.parent / name


def _open_file(path: Path) -> TensorFile:
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _TorchFile(path)


def open_tensors(path: Path) -> TensorFile:
    """Open a checkpoint: a ``.safetensors`` file, a ``torch.save`` file, an index of shards, or a directory with one.

    What does not exist may be the name of a repository that is in the local cache of the Hugging Face hub.

    Raises:
        InputError: nothing there, several files to choose from, a damaged file, or one with pickled objects.
    """
    path = in_local_cache(path) or path
    if path.is_dir():
        path = _in_directory(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a .safetensors or .pt file, or a directory with one")
    return _ShardedFile(path) if path.name.endswith(".index.json") else _open_file(path)


def _in_directory(directory: Path) -> Path:
    """The one checkpoint in a directory."""
    for index in _INDICES:
        if (directory / index).is_file():
            return directory / index
    found = [p for suffix in ("*.safetensors", "*.pt", "*.pth", "*.bin") for p in sorted(directory.glob(suffix))]
    # Not the newest or the largest of them: beside a model may lie its optimizer, or another epoch.
    if len(found) != 1:
        names = listed(p.name for p in found) or "none"
        raise InputError(f"{directory} must hold one .safetensors or .pt file, but there are: {names}; give the file")
    return found[0]
