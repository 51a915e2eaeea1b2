"""What the user says of a checkpoint, where its files cannot."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from diffdeploy.checkpoints.detect import AUTO
from diffdeploy.config import GqaLayout
from diffdeploy.errors import InputError

__all__ = ["CheckpointOptions"]


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """What a state dict cannot say. ``None`` means: take it from the key or from ``config.json``.

    Attributes:
        layout: name of a layout; by default it is recognised.
        layer: 0-based layer to read out of a larger state dict.
        prefix: what the keys of the block begin with, where numbers do not tell blocks apart.
        depth: 0-based layer index that sets ``lambda_init``; by default what the layout makes of the one in the key.
        lambda_init: constant part of lambda itself, in place of what follows from a depth.
        output_scale: factor behind the norm; by default ``1 - lambda_init``.
        causal: whether a position sees none after it; by default as the layout's code base has it.
        sliding_window: keys that a position sees, itself included; 0 for all.
        norm: of the heads: ``rms``; ``layer`` for a LayerNorm, which subtracts their mean; or ``none``. By default as
            the layout has it.
        norm_eps: epsilon of the norm over each head's outputs.
        qk_norm_eps: epsilon of the norms of queries and keys, where the block has them.
        rope: rotary style, ``half-reversed`` for ``half`` by minus the angle, or ``none``.
        rope_theta: rotary base.
        gqa_layout: which key stream a query stream reads when ``h_kv < h``.
    """

    # A misspelt name is not lost in silence.
    __pydantic_config__ = ConfigDict(extra="forbid")

    layout: str | None = None
    layer: int | None = None
    prefix: str | None = None
    depth: int | None = None
    lambda_init: float | None = None
    output_scale: float | None = None
    causal: bool | None = None
    sliding_window: int | None = None
    norm: Literal["rms", "layer", "none"] | None = None
    norm_eps: float | None = None
    qk_norm_eps: float | None = None
    rope: Literal["interleaved", "half", "half-reversed", "none"] | None = None
    rope_theta: float | None = None
    gqa_layout: GqaLayout | None = None

    def given(self) -> dict[str, bool | int | float | str]:
        """Those that are not left open."""
        # Not `if value`: layer 0 and depth 0 are given.
        return {name: value for name, value in asdict(self).items() if value is not None and value != AUTO}

    @classmethod
    def from_given(cls, given: Mapping[str, Any]) -> Self:
        """Inverse of `given`.

        Raises:
            InputError: it has other names or values than options have.
        """
        try:
            # As JSON, where strict means that a text is no number, and an object may still be made of its fields.
            return TypeAdapter(cls).validate_json(json.dumps(dict(given)), strict=True)
        except ValidationError as error:
            name = error.errors()[0]["loc"][0]
            raise InputError(f"{name} is {given.get(str(name))!r}, which is no option of a checkpoint") from error
