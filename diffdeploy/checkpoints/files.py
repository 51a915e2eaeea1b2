"""Tensors from files. Pickled objects are refused, never run."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from diffdeploy.errors import InputError
from diffdeploy.exclusive import without_warnings

__all__ = ["SAMPLE", "TensorFile", "open_tensors"]

SAMPLE = Path(__file__).parent / "sample"

# As transformers' save_pretrained names it.
_INDEX = "model.safetensors.index.json"
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
        tensor: Tensor = self._handle.get_tensor(key)
        return tensor

    def holder(self, key: str) -> Path:  # noqa: ARG002 - all keys are in this file
        return self.path


class _ShardedFile:
    """Several ``.safetensors`` files and the index that says which tensor is in which; each is opened when needed."""

    def __init__(self, index: Path) -> None:
        self.path = index
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._files = {str(key): index.parent / str(name) for key, name in weight_map.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index} is not a readable index of shards ({error}); copy it again") from error
        # An index comes with the download: a name with ".." would have any file of this machine read.
        if outside := [file for file in self._files.values() if file.parent != index.parent]:
            raise InputError(f"{index} names {outside[0].name}, which is not beside it")
        # All of them now, though most are never opened: a broken download is cheaper to mend as a whole.
        if missing := sorted({file.name for file in self._files.values() if not file.is_file()}):
            raise InputError(f"{index.parent} lacks the shards {', '.join(missing)}; copy them again")
        self._open: dict[Path, _SafetensorsFile] = {}

    def _shard(self, key: str) -> _SafetensorsFile:
        file = self._files[key]
        if file not in self._open:
            self._open[file] = _SafetensorsFile(file)
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


class _TorchFile:
    """A ``torch.save`` file that holds tensors and plain containers only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with without_warnings():  # about pickle protocols, before the refusal that says it better
                # To the CPU: what was saved on a GPU must be readable on a machine without one.
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        # Beside what unpickling refuses, whatever a file that is no archive of torch makes the reader stumble over.
        except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
            raise InputError(
                f"{path} cannot be read as weights only, and pickled objects are never executed; save the state dict "
                "alone, with safetensors.torch.save_file or torch.save(model.state_dict())"
            ) from error
        # Repeatedly, since some trainers put a wrapper's checkpoint into their own.
        while isinstance(loaded, Mapping) and (inner := next((k for k in _STATE_DICT_KEYS if k in loaded), None)):
            loaded = loaded[inner]
        # Step counters and arguments stand beside the weights in many files, and are no weights.
        tensors = loaded.items() if isinstance(loaded, Mapping) else ()
        self._tensors = {str(key): value for key, value in tensors if isinstance(value, Tensor)}
        if not self._tensors:
            raise InputError(f"{path} holds no state dict; accepted is a mapping from names to tensors")

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def get(self, key: str) -> Tensor:
        return self._tensors[key]

    def holder(self, key: str) -> Path:  # noqa: ARG002 - all keys are in this file
        return self.path


def open_tensors(path: Path) -> TensorFile:
    """Open a checkpoint: a ``.safetensors`` file, a ``torch.save`` file, an index of shards, or a directory with one.

    Raises:
        InputError: nothing there, several files to choose from, a damaged file, or one with pickled objects.
    """
    if path.is_dir() and (path / _INDEX).is_file():
        path = path / _INDEX
    if path.is_dir():
        found = [p for suffix in ("*.safetensors", "*.pt", "*.pth", "*.bin") for p in sorted(path.glob(suffix))]
        # Not the newest or the largest of them: beside a model may lie its optimizer, or another epoch.
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise InputError(f"{path} must hold one .safetensors or .pt file, but there are: {names}; give the file")
        path = found[0]
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a .safetensors or .pt file, or a directory with one")
    if path.name.endswith(".index.json"):
        return _ShardedFile(path)
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _TorchFile(path)
