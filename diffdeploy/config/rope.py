"""Rotary position embedding: which pairs of channels turn, and how fast."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from diffdeploy.config.requirement import require

__all__ = ["RopeConfig", "RopeScaling", "RopeStyle"]

RopeStyle = Literal["interleaved", "half"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for longer sequences, by the names of transformers' configs.

    Attributes:
        kind: ``linear`` divides all by ``factor``; ``llama3`` divides those whose wavelength is above
            ``original_max_position_embeddings / low_freq_factor``, keeps those below
            ``original_max_position_embeddings / high_freq_factor``, and goes from one to the other in between.
        factor: at least 1.
        low_freq_factor: of ``llama3``.
        high_freq_factor: of ``llama3``.
        original_max_position_embeddings: of ``llama3``.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    # Llama 3.1's, for configs that leave them out.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        require(self.kind in ("linear", "llama3"), "rope scaling", self.kind, "linear or llama3")
        require(math.isfinite(self.factor) and self.factor >= 1, "rope scaling factor", self.factor, "1 or more")
        require(
            # Their difference is what the frequencies in between are interpolated over.
            self.high_freq_factor > self.low_freq_factor > 0,
            "high_freq_factor",
            self.high_freq_factor,
            f"above low_freq_factor ({self.low_freq_factor})",
        )


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of the query and key heads.

    Attributes:
        style: ``interleaved`` rotates the pairs ``(x[2j], x[2j+1])``, ``half`` the pairs ``(x[j], x[j + d/2])``.
        theta: base of the geometric frequency series ``theta ** (-2j / d)``.
        scaling: change of that series, or ``None``.
    """

    style: RopeStyle
    theta: float
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        require(self.style in get_args(RopeStyle), "rope.style", self.style, "interleaved or half")
        require(math.isfinite(self.theta) and self.theta > 0, "rope.theta", self.theta, "a positive number")
