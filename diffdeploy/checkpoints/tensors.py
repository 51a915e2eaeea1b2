"""The tensors of one block: the keys under its prefix that its layout names, read only on request."""

import torch
from torch import Tensor

from diffdeploy.checkpoints.fields import listed
from diffdeploy.checkpoints.files import TensorFile
from diffdeploy.checkpoints.layouts import Layout, Source
from diffdeploy.errors import InputError

__all__ = ["BlockTensors"]

# Other dtypes of safetensors (fp8, integers) need scales that are stored elsewhere in the checkpoint.
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# Groups of optional tensors that a block has together or not at all; no code base builds a block with part of a group.
_TOGETHER = (("q_proj.bias", "k_proj.bias", "v_proj.bias"), ("q_norm.weight", "k_norm.weight"))


class BlockTensors:
    """One block of a file, seen through its layout.

    Args:
        file: tensors of the checkpoint.
        prefix: prefix of the block.
        layout: layout of the block.

    Raises:
        InputError: one of several optional tensors that belong together is missing.

    Attributes:
        names: keys without the prefix, including those that the layout does not know.
        sources: source of each canonical weight that this block has.
    """

    def __init__(self, file: TensorFile, prefix: str, layout: Layout) -> None:
        self.file, self.prefix = file, prefix
        keys = file.keys()
        self.names = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        self.sources: dict[str, Source] = {
            **layout.sources,
            **{name: source for name, source in layout.optional.items() if source.key in self.names},
        }
        self._require_whole_groups(layout)
        self._irrelevant = layout.irrelevant
        self._numbers = layout.numbers

    def _require_whole_groups(self, layout: Layout) -> None:
        for group in _TOGETHER:
            known = [name for name in group if name in layout.optional]
            absent = [layout.optional[name].key for name in known if name not in self.sources]
            if absent and len(absent) < len(known):
                found = listed(self.key(name) for name in known if name in self.sources)
                missing = listed(self.prefix + key for key in dict.fromkeys(absent))
                raise InputError(f"{self.file.path} has {found}, but lacks {missing}; a block has all of these or none")

    @property
    def unread(self) -> list[str]:
        """Keys under the prefix that the layout neither reads nor ignores on purpose."""
        needless = {self.prefix + name for name in self._irrelevant}
        return sorted({self.prefix + name for name in self.names}.difference(self.keys, needless))

    def require_all_read(self, layout: Layout) -> None:
        """Check that no tensor of the block would be dropped.

        Raises:
            InputError: the layout does not know a tensor.
        """
        if unread := self.unread:
            raise InputError(
                f"layout {layout.name} does not know {listed(unread)}, and the block would compute something else "
                "without these tensors; give another --layout, or remove them if nothing uses them"
            )

    @property
    def keys(self) -> list[str]:
        """List of the keys that contain the block."""
        # A packed projection is the source of three weights, but has one key.
        names = [*(source.key for source in self.sources.values()), *self._numbers.values()]
        return list(dict.fromkeys(self.prefix + name for name in names))

    def number(self, fact: str) -> float | None:
        """A fact that the layout stores as a tensor, or ``None`` if it does not; see `Layout.numbers`.

        Raises:
            InputError: the tensor is not a single number.
        """
        if fact not in self._numbers:
            return None
        tensor = self.get(self._numbers[fact])
        if tensor.numel() != 1:
            raise InputError(f"{self.prefix}{self._numbers[fact]} has shape {list(tensor.shape)}; accepted: []")
        return float(tensor)

    def key(self, name: str) -> str:
        """Key that contains a canonical weight."""
        return self.prefix + self.sources[name].key

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Shape of the tensor that contains a canonical weight.

        Raises:
            InputError: the tensor has another rank, or no elements.
        """
        shape = self.file.shape(self.key(name))
        if len(shape) != rank or 0 in shape:
            raise InputError(f"{self.key(name)} has shape {list(shape)}; accepted: a rank of {rank}")
        return shape

    def get(self, name: str) -> Tensor:
        """Read a tensor by its key without the prefix.

        Raises:
            InputError: the tensor cannot be deployed.
        """
        key = self.prefix + name
        tensor = self.file.get(key)
        if tensor.dtype not in _DTYPES:
            raise InputError(f"{key} has dtype {tensor.dtype}; accepted: fp64, fp32, fp16 and bf16")
        # Every error budget of the verification would be NaN, and would therefore detect nothing.
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{key} holds NaN or infinity; such a block cannot be deployed")
        return tensor

    def require_shapes(self, canonical: dict[str, tuple[int, ...]], noise_repeat: int = 1) -> None:
        """Compare each tensor with the shapes of the canonical weights that it contains.

        Args:
            canonical: canonical shapes by name.
            noise_repeat: number of heads that share one noise query in the file.

        Raises:
            InputError: a shape does not fit the others.
        """
        expected: dict[str, list[int]] = {}
        for name, source in self.sources.items():
            shape = [] if source.scalar else list(canonical[name])
            if name.startswith("q_proj"):
                shape[0] = shape[0] // (2 * noise_repeat) * (noise_repeat + 1)
            # The rows of q, k and v add up to those of the packed tensor.
            if source.order and source.key in expected:
                expected[source.key][0] += shape[0]
            else:
                expected[source.key] = shape
        for name, wanted in expected.items():
            given = list(self.file.shape(self.prefix + name))
            if given != wanted:
                raise InputError(f"{self.prefix}{name} has shape {given}; accepted: {wanted}, to match other shapes")
