"""One call of the kernels: the given tensors, and settings derived from their sizes."""

import itertools
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["Call", "Tile"]

# Maximum number of queries for which keys are always split among programs.
_FEW = 16
# Minimum number of keys for which splitting pays off even for more than `_FEW` queries, if 3/4 of the device would be
# idle otherwise; also the number of queries from which separate programs per stream pay off for wide values.
_LONG = 1024
# Minimum number of queries for which separate programs per stream pay off for narrower values, if the small tiles of
# all heads leave multiprocessors idle.
_LEAST_APART = 512
# Minimum number of rows and of columns of a matrix product.
_LEAST_OF_MATRIX_UNITS = 16
# Both accumulators of a tile fit in the registers up to this width of values.
_WIDEST_TOGETHER = 128
# Maximum number of elements of the partial sums that are read at once.
_MOST_ELEMENTS = 8192
# Bytes of keys and values that stay in the L2 cache; an H100 has 50 MiB.
_CACHED_BYTES = 32 * 2**20
# Number of multiprocessors (an H100's) for graphs that are traced without a device, and for the interpreter.
_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Tile:
    """Compile-time settings of a kernel: queries (``rows``) and keys per tile, warps, and pipeline stages."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Return the settings as keyword arguments of the kernels."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# Measured on an H100 and an H200, bfloat16, 256 to 16,384 positions, see docs/fused.md. Small tiles leave room for a
# second program on a multiprocessor; they are for problems with fewer large tiles than multiprocessors, and for
# masks that slow large tiles down.
_LARGE = Tile(128, 64, 8, 3)
_SMALL, _SMALL_OF_ONE_STREAM, _SMALL_OF_WIDE_VALUES = Tile(64, 64, 4, 3), Tile(64, 128, 4, 2), Tile(64, 64, 4, 2)
# When keys are split, a tile has all rows, up to 64, since every further tile of rows reads the same keys again.
_MOST_ROWS = 64
_SPLIT_KEYS, _SPLIT_KEYS_OF_WIDE_VALUES = 64, 32


@dataclass(frozen=True)
class Call:
    """One call of the operator; shapes as in `diffdeploy.ops.diff_attention`.

    Attributes:
        q: queries ``[B, 2h, S, d]``.
        k: keys, as separate streams, paired or shared.
        v: values ``[B, h_kv, T, e]``.
        lam: lambda, a scalar or broadcastable to ``[B, h, S, 1]``.
        key_padding: boolean ``[B or 1, T]``, ``True`` for visible keys; or ``None``.
        norm: gamma ``[e]`` of the per-head norm, or ``None``.
        causal: true for a causal mask, aligned bottom-right.
        window: number of keys that a query attends to; ``None`` for all.
        legacy: true if streams read keys according to the legacy key map.
        scale: factor of the scores.
        eps: epsilon of the norm, or ``None`` for no norm.
        factor: factor after the norm.
        traced: true if the tensors are placeholders of a trace, without memory.
        least_queries: minimum number of queries for which the kernel runs, in a graph where that number is a symbol.
        most_queries: maximum number of queries, see ``least_queries``; ``None`` for no limit.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lam: Tensor
    key_padding: Tensor | None
    norm: Tensor | None
    causal: bool
    window: int | None
    legacy: bool
    scale: float
    eps: float | None
    factor: float
    traced: bool
    least_queries: int = 0
    most_queries: int | None = None

    @property
    def num_heads(self) -> int:
        """Differential heads ``h``."""
        return self.q.shape[1] // 2

    @property
    def group_size(self) -> int:
        """Heads that read one key/value head, ``g``."""
        return int(self.num_heads // self.v.shape[1])  # a number, even if the number of heads is a symbol

    @property
    def num_rows(self) -> int:
        """Number of rows (queries of half heads) that read one key/value head."""
        return 2 * self.group_size * self.q.shape[2]

    @property
    def most_rows(self) -> int:
        """`num_rows` or, for a kernel in a graph, its maximum."""
        return 2 * self.group_size * self.known_length

    @property
    def known_length(self) -> int:
        """Number of queries or, for a kernel in a graph, its maximum; a symbol if neither is known."""
        return self.q.shape[2] if self.most_queries is None else self.most_queries

    @cached_property
    def decodes(self) -> bool:
        """True if keys are split among programs; false if the length is a symbol: `prefill` supports any length."""
        length, key_length, batch = self.known_length, self.k.shape[2], self.q.shape[0]
        if not isinstance(length, int) or length <= _FEW:
            return isinstance(length, int)
        idle = isinstance(batch * key_length, int) and key_length >= _LONG
        small_tiles = batch * self.num_heads * -(-length // _SMALL.rows)
        return idle and 4 * small_tiles <= _multiprocessors(self.q.device)

    @cached_property
    def wide(self) -> bool:
        """True if the values are too wide for the accumulators of both streams to fit in the registers."""
        return self.widths["BLOCK_E"] > _WIDEST_TOGETHER

    @cached_property
    def apart(self) -> bool:
        """True if each stream has separate programs, which occupies multiprocessors that would otherwise be idle.

        Both results are read again for the subtraction, which does not pay off for many heads of short sequences.
        """
        if self.decodes or not self._has_few_tiles():
            return False
        if self.wide:
            return self.q.shape[2] >= _LONG or self._has_few_tiles(2)
        return self.q.shape[2] >= _LEAST_APART and self._has_few_tiles(2)

    @cached_property
    def tile(self) -> Tile:
        """Tile of this call, one of a short list, so that few kernels are compiled."""
        if self.decodes:
            rows = min(_MOST_ROWS, max(_LEAST_OF_MATRIX_UNITS, _power_of_two(self.most_rows)))
            return Tile(rows, _SPLIT_KEYS_OF_WIDE_VALUES if self.wide else _SPLIT_KEYS, 4, 3)
        # These masks slow large tiles down. Small ones are slow if they must pad values with zeros to fill their block.
        masked = self.window is not None or (self.wide and self.key_padding is not None)
        filled = self.widths["BLOCK_E"] == self.widths["VALUE_WIDTH"]
        if not (masked and filled) and not self._has_few_tiles():
            return _LARGE
        if self.wide:
            return _SMALL_OF_WIDE_VALUES
        return _SMALL_OF_ONE_STREAM if self.apart else _SMALL

    def by_length(self) -> "list[Call]":
        """Calls that each cover a range of query counts, so that exactly one of them runs.

        Each tile size of `split` has a call of its own, and one more call covers all larger numbers of queries.

        There is only one call if the number of queries is known, or if it equals the number of keys: then no cache is
        read, and splitting the keys does not pay off.
        """
        length = self.q.shape[2]
        if isinstance(length, int) or statically_known_true(length == self.k.shape[2]):
            return [self]
        # torch assumes that a symbol is 2 or more, so a call for at most 1 query would never run.
        first = max(2, _LEAST_OF_MATRIX_UNITS // (2 * self.group_size))
        limits = [0, *sorted({first, _FEW}), None]
        return [
            replace(self, least_queries=least + 1 if least else 0, most_queries=most)
            for least, most in itertools.pairwise(limits)
        ]

    def programs(self, count: int) -> int:
        """Return ``count``, or 0 if the kernel does not run for this number of queries."""
        reaches, exceeds = 1, 0
        if self.least_queries:
            reaches = _smaller(1, self.q.shape[2] // self.least_queries)
        if self.most_queries is not None:
            exceeds = _smaller(1, self.q.shape[2] // (self.most_queries + 1))
        return count * (reaches - exceeds)

    def _has_few_tiles(self, times: int = 1) -> bool:
        """True if ``times`` programs per large tile would leave multiprocessors idle; false if sizes are symbols."""
        tiles = self.q.shape[0] * self.num_heads * -(-self.q.shape[2] // _LARGE.rows)
        return isinstance(tiles, int) and times * tiles < _multiprocessors(self.q.device)

    @cached_property
    def tma(self) -> bool:
        """True if tiles of keys and values are loaded by the tensor memory accelerator of compute capability 9.0.

        It needs no registers for addresses, for which wide values leave none; large tiles are faster without it. Rows
        must begin at multiples of 16 bytes.
        """
        if not self.wide or self.tile == _LARGE or self.q.device.type != "cuda":
            return False
        if torch.cuda.get_device_capability(self.q.device) < (9, 0):
            return False
        steps = [*self.key_strides(), *self.v.stride()[:3]]
        if not self.traced:
            steps += [side.data_ptr() // side.element_size() for side in (self.k, self.v)]
        return all(step * self.k.element_size() % 16 == 0 for step in steps)

    def heads_at_once(self) -> int:
        """Number of heads in a group, whose programs run before those of the next group.

        Together, they fill at least two waves. Keys and values of a group stay in the L2 cache, where all of its tiles
        read them. The groups are about equally large.
        """
        elements = self.v.shape[2] * (self.v.shape[3] + (1 if self.shares_keys else 2) * self.q.shape[3])
        cached = self.group_size * _CACHED_BYTES // (elements * self.v.element_size())
        two_waves = -(-2 * _multiprocessors(self.q.device) // -(-self.q.shape[2] // self.tile.rows))
        heads = self.q.shape[0] * self.num_heads
        groups = _larger(1, heads // _larger(_larger(cached, two_waves), 1))
        return -(-heads // groups)

    def pairing(self) -> int:
        """Number of multiprocessors if two programs of a causal problem fit on one, otherwise 0."""
        return _multiprocessors(self.q.device) if self.causal and self.tile.rows < _LARGE.rows else 0

    def num_splits(self) -> int:
        """Number of parts into which keys are split at tile boundaries; no more than are needed to fill the device."""
        batch, kv_heads, key_length, _ = self.v.shape
        others = batch * kv_heads * -(-self.num_rows // self.tile.rows)
        wanted = _larger(1, _multiprocessors(self.q.device) // others)
        tiles = _larger(1, -(-key_length // self.tile.keys))
        return -(-tiles // -(-tiles // wanted))

    def parts_at_once(self, splits: int) -> int:
        """Number of parts that are combined at once."""
        most = _MOST_ELEMENTS // self.widths["BLOCK_E"]
        return min(most, max(_LEAST_OF_MATRIX_UNITS, _power_of_two(splits))) if isinstance(splits, int) else most

    @property
    def shares_keys(self) -> bool:
        """True if both streams read the same keys."""
        return self.k.shape[3] == self.q.shape[3] and self.k.shape[1] == self.v.shape[1]

    def key_strides(self) -> tuple[int, int, int, int]:
        """Strides of the keys: batch, pair of streams, stream and position."""
        k = self.k
        if k.shape[3] != self.q.shape[3]:
            return k.stride(0), k.stride(1), self.q.shape[3], k.stride(2)
        if self.shares_keys:
            return k.stride(0), k.stride(1), 0, k.stride(2)
        return k.stride(0), 2 * k.stride(1), k.stride(1), k.stride(2)

    def input_strides(self) -> tuple[int, ...]:
        """Strides of queries, keys and values, in the order of the kernels' arguments."""
        return (*self.q.stride()[:3], *self.key_strides(), *self.v.stride()[:3])

    def lambdas(self) -> Tensor:
        """Lambda, ``[B, h, S, 1]``, without a copy."""
        return self.lam.expand(self.q.shape[0], self.num_heads, self.q.shape[2], 1)

    def padding(self) -> tuple[Tensor, int]:
        """Padding mask of the keys and its stride; a placeholder if there is none."""
        if self.key_padding is None:
            return self.q, 0
        return self.key_padding, 0 if self.key_padding.shape[0] == 1 else self.key_padding.stride(0)

    def norm_settings(self) -> tuple[Tensor, float]:
        """Gamma and epsilon; placeholders if there are none."""
        return self.q if self.norm is None else self.norm, 0.0 if self.eps is None else self.eps

    @cached_property
    def widths(self) -> dict[str, int]:
        """Widths of a stream and of the values, and the powers of two that hold them."""
        width, value_width = self.q.shape[3], self.v.shape[3]
        return {
            "WIDTH": width,
            "VALUE_WIDTH": value_width,
            "BLOCK_D": max(_LEAST_OF_MATRIX_UNITS, _power_of_two(width)),
            "BLOCK_E": max(_LEAST_OF_MATRIX_UNITS, _power_of_two(value_width)),
        }

    def flags(self) -> dict[str, bool]:
        """Compile-time flags for keys and masks, as keyword arguments of the kernels."""
        return {
            "CAUSAL": self.causal,
            "WINDOW": self.window is not None,
            "PADDING": self.key_padding is not None,
            "LEGACY": self.legacy,
            "SHARED": self.shares_keys,
        }

    def epilogue(self) -> dict[str, bool]:
        """Compile-time flags for the norm after the difference."""
        return {"NORM": self.eps is not None, "GAMMA": self.norm is not None}


def _larger(size: int, other: int) -> int:
    """Larger of two sizes, which may be symbols."""
    larger: int = torch.sym_max(size, other)  # type: ignore[no-untyped-call]
    return larger


def _smaller(size: int, other: int) -> int:
    """Smaller of two sizes, which may be symbols."""
    smaller: int = torch.sym_min(size, other)  # type: ignore[no-untyped-call]
    return smaller


def _power_of_two(size: int) -> int:
    """Smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
