"""Rotary position embedding: the pairs of channels that are rotated, and their frequencies."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from diffdeploy.config.requirement import require

__all__ = ["RopeConfig", "RopeScaling", "RopeStyle"]

RopeStyle = Literal["interleaved", "half"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary frequencies for longer sequences; fields are named as in transformers' configs.

    Attributes:
        kind: ``linear`` divides all frequencies by ``factor``. ``llama3`` divides those whose wavelength is above
            ``original_max_position_embeddings / low_freq_factor``, keeps those below
            ``original_max_position_embeddings / high_freq_factor``, and interpolates in between. ``yarn``
            (arXiv 2309.00071) divides those with at most ``beta_slow`` turns in ``original_max_position_embeddings``,
            keeps those with at least ``beta_fast``, interpolates by channel in between, and multiplies cosines and
            sines by `attention_scaling`.
        factor: divisor of the frequencies, at least 1.
        low_freq_factor: divisor that sets the upper wavelength limit (``llama3`` only).
        high_freq_factor: divisor that sets the lower wavelength limit (``llama3`` only).
        original_max_position_embeddings: sequence length the model was trained for (``llama3`` and ``yarn``).
        beta_fast: number of turns of the last channel that is kept (``yarn`` only).
        beta_slow: number of turns of the first channel that is divided (``yarn`` only).
        attention_factor: factor of cosines and sines (``yarn`` only); ``0.1 ln(factor) + 1`` by default.
        truncate: true if the boundaries between channels are rounded to whole numbers (``yarn`` only).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    # Llama 3.1's values, for configs that omit them.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    # The paper's values.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        require(self.kind in ("linear", "llama3", "yarn"), "rope scaling", self.kind, "linear, llama3 or yarn")
        require(math.isfinite(self.factor) and self.factor >= 1, "rope scaling factor", self.factor, "1 or more")
        require(
            # Frequencies in between are interpolated over the difference of the two factors.
            self.high_freq_factor > self.low_freq_factor > 0,
            "high_freq_factor",
            self.high_freq_factor,
            f"above low_freq_factor ({self.low_freq_factor})",
        )
        fast, factor = self.beta_fast, self.attention_factor
        require(
            fast >= self.beta_slow > 0, "beta_fast", fast, f"at least beta_slow ({self.beta_slow}), which is above 0"
        )
        length = self.original_max_position_embeddings
        require(length >= 1, "original_max_position_embeddings", length, "1 or more")
        positive = factor is None or (math.isfinite(factor) and factor > 0)
        require(positive, "attention_factor", factor, "a positive number")

    @property
    def attention_scaling(self) -> float:
        """Factor of cosines and sines; scores grow by its square (arXiv 2309.00071, equation 22)."""
        if self.kind != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of the query and key heads.

    Attributes:
        style: ``interleaved`` rotates the pairs ``(x[2j], x[2j+1])``, ``half`` the pairs ``(x[j], x[j + r/2])``.
        theta: base of the geometric frequency series ``theta ** (-2j / r)``.
        scaling: change of that series; ``None`` for none.
        rotary_dim: number ``r`` of leading channels of a stream that are rotated; ``None`` for all ``d``.
    """

    style: RopeStyle
    theta: float
    scaling: RopeScaling | None = None
    rotary_dim: int | None = None

    def __post_init__(self) -> None:
        width = self.rotary_dim
        require(width is None or (width > 0 and width % 2 == 0), "rope.rotary_dim", width, "a positive even number")
        require(self.style in get_args(RopeStyle), "rope.style", self.style, "interleaved or half")
        require(math.isfinite(self.theta) and self.theta > 0, "rope.theta", self.theta, "a positive number")
        # The boundaries between channels are logarithms to this base.
        is_base = self.scaling is None or self.scaling.kind != "yarn" or self.theta > 1
        require(is_base, "rope.theta", self.theta, "above 1, with yarn")

    def width(self, head_dim: int) -> int:
        """Number ``r`` of rotated channels in a stream of width ``head_dim``."""
        return head_dim if self.rotary_dim is None else self.rotary_dim
