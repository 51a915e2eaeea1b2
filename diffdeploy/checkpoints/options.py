"""Options with which the user states facts that the files of a checkpoint do not contain."""

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
    """Facts that a state dict does not contain. With ``None``, a fact is taken from the keys or from ``config.json``.

    Attributes:
        layout: name of a layout; by default, the layout is recognised automatically.
        layer: 0-based layer to read from a larger state dict.
        prefix: prefix of the block's keys, if numbers do not distinguish the blocks.
        depth: 0-based layer index that sets ``lambda_init``; by default the layout derives it from the key.
        lambda_init: constant part of lambda itself, which overrides the depth.
        output_scale: factor after the norm; ``1 - lambda_init`` by default.
        causal: true if no position attends to later ones; the layout decides by default.
        sliding_window: number of keys that a position attends to, including its own; 0 for all.
        norm: norm of the heads: ``rms``, ``layer`` for a LayerNorm, which subtracts their mean, or ``none``. The layout
            decides by default.
        norm_eps: epsilon of the norm over each head's outputs.
        qk_norm_eps: epsilon of the norms of queries and keys, if the block has them.
        rope: rotary style; ``half-reversed`` is ``half`` with the negative angle, ``none`` means no rotary embedding.
        rope_theta: rotary base.
        gqa_layout: map from query streams to key streams when ``h_kv < h``.
        names: names of a whole model's tensors outside its blocks, as JSON, if they are not those of a known code base;
            see `diffdeploy.checkpoints.skeletons.skeleton_of`.
    """

    # Misspelt names raise an error.
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
    names: str | None = None

    def given(self) -> dict[str, bool | int | float | str]:
        """The options that were given, by name."""
        # Values are compared with None, since layer 0 and depth 0 count as given.
        return {name: value for name, value in asdict(self).items() if value is not None and value != AUTO}

    @classmethod
    def from_given(cls, given: Mapping[str, Any]) -> Self:
        """Invert `given`.

        Raises:
            InputError: there is no option of that name, or its value is not accepted.
        """
        try:
            # Options are validated as JSON: strict mode then rejects a string for a number, but still builds an object
            # from its fields.
            return TypeAdapter(cls).validate_json(json.dumps(dict(given)), strict=True)
        except ValidationError as error:
            name = error.errors()[0]["loc"][0]
            raise InputError(f"{name} is {given.get(str(name))!r}, which is not a valid checkpoint option") from error
