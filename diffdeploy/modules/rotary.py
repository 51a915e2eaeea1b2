"""Rotary position embedding with tables that are rounded once."""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from diffdeploy.config import RopeConfig, RopeScaling, RopeStyle
from diffdeploy.errors import InputError

__all__ = ["RotaryEmbedding", "rotate"]


class RotaryEmbedding(nn.Module):
    """Rotates channel pairs of ``[..., S, d]`` by ``position * theta ** (-2j / r)`` (arXiv 2104.09864, equation 34).

    The tables are computed in fp64 and rounded once to the module's dtype, even after ``.to(dtype)``.

    Args:
        config: style and base of the embedding.
        head_dim: width ``d`` of a stream.
        max_positions: number of rows of the tables, and length of the longest sequence that can be embedded.
        device: device of the tables, as for any module.
        dtype: dtype of the tables, as for any module.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: RopeConfig,
        head_dim: int,
        max_positions: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.head_dim, self.max_positions = config, head_dim, max_positions
        placeholder = torch.empty(0, device=device, dtype=dtype)
        self.register_buffer("cos", placeholder, persistent=False)
        self.register_buffer("sin", placeholder, persistent=False)
        self._fill_tables()

    def _fill_tables(self) -> None:
        positions = torch.arange(self.max_positions, dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, _frequencies(self.config, self.config.width(self.head_dim)))
        factor = 1.0 if self.config.scaling is None else self.config.scaling.attention_scaling
        self.cos, self.sin = (angles.cos() * factor).to(self.cos), (angles.sin() * factor).to(self.sin)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._fill_tables()
        return self

    def forward(self, x: Tensor, position_ids: Tensor | None = None, *, offset: int = 0) -> Tensor:
        """Rotate channel pairs by their positions.

        Args:
            x: queries or keys ``[B, H, S, d]``, floating point.
            position_ids: integer positions ``[B, S]``; ``offset .. offset + S - 1`` by default.
            offset: position of the first row.

        Returns:
            The rotated channels, with the same shape and dtype.

        Raises:
            InputError: positions exceed the tables of ``max_positions``, or are not ``[B, S]``.
        """
        cos, sin = self.tables(x.shape[-2], position_ids, offset=offset)
        return rotate(x, cos, sin, self.config.style)

    def tables(self, length: int, position_ids: Tensor | None = None, *, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Look up the cosines and sines of positions, which `rotate` takes.

        Args:
            length: number of positions ``S``.
            position_ids: positions, see `forward`, which also lists the errors.
            offset: position of the first row.

        Returns:
            Cosines and sines, ``[B, 1, S, r/2]`` each, or ``[S, r/2]`` without ``position_ids``.
        """
        if position_ids is not None:
            if position_ids.ndim != 2 or position_ids.shape[1] != length or position_ids.is_floating_point():
                raise InputError(
                    f"position_ids is {position_ids.dtype} {list(position_ids.shape)}; accepted: an integer tensor "
                    f"[B, {length}]"
                )
            return self.cos[position_ids][:, None], self.sin[position_ids][:, None]
        if offset + length > self.max_positions:
            raise InputError(
                f"the sequence ends at position {offset + length}, but the rotary tables hold {self.max_positions}"
            )
        rows = slice(offset, offset + length)
        return self.cos[rows], self.sin[rows]


def _frequencies(config: RopeConfig, width: int) -> Tensor:
    """Frequencies in radians per position, ``[r/2]``, float64."""
    frequencies = config.theta ** -(torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    scaling = config.scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        kept = 1 - _divided(config, scaling, width)
    else:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _divided(config: RopeConfig, scaling: RopeScaling, width: int) -> Tensor:
    """Weight, 0 to 1, of the frequency divided by the factor, for each channel pair (arXiv 2309.00071, section 3.2)."""
    length = scaling.original_max_position_embeddings
    # Index of the pair that makes `turns` turns in the original context; fractional unless boundaries are rounded.
    first, last = (
        width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    length_of_ramp = last - first if last != first else 0.001  # as in transformers; avoids a division by zero
    pairs = torch.arange(width // 2, dtype=torch.float64, device="cpu")
    return ((pairs - first) / length_of_ramp).clamp(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, style: RopeStyle) -> Tensor:
    """Rotate the channel pairs of ``x`` ``[..., S, d]`` by angles given as cosines and sines ``[..., S, r/2]``.

    Channels after the first ``r`` stay unchanged.
    """
    if cos.dtype != x.dtype:  # a cast that changes nothing would be two nodes in a trace
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin, style), x[..., width:]), dim=-1)
    if style == "interleaved":
        first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
