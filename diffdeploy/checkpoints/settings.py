"""What the tensors of a block cannot say: from the user's options, else from ``config.json``, else from the layout."""

from typing import TypeVar, cast

from diffdeploy.checkpoints.detect import Found
from diffdeploy.checkpoints.fields import Fields, typed_field
from diffdeploy.checkpoints.options import CheckpointOptions
from diffdeploy.checkpoints.sizes import Sizes
from diffdeploy.config import GqaLayout, RopeConfig, RopeStyle
from diffdeploy.errors import InputError

__all__ = ["BlockSettings", "required"]

# The norm's epsilon in every source that keeps none in its config, and the default of those that do.
_NORM_EPS = 1e-5

_MISSING = {
    "--depth": "lambda_init depends on the layer index, the keys have none, and the weights do not record it",
    "--rope interleaved|half|none": "the weights are the same for every rotary style, so it cannot be guessed, and "
    "there is no config.json beside them that says it",
    "--rope-theta": "the base of the rotary frequencies is not in the weights, so it cannot be guessed (the paper's "
    "models use 10000)",
    "--gqa-layout": "with fewer key/value heads than heads, Microsoft's naive and flash modules read different key "
    "streams from the same weights, so it cannot be guessed; give canonical (flash) or legacy (naive, and every "
    "variant of multihead-sdpadiff, which --layout sdpadiff says too)",
}

_Value = TypeVar("_Value")


def required(value: _Value | None, option: str) -> _Value:
    """A setting that a block cannot do without.

    Raises:
        InputError: nothing says it; the message names the option that can.
    """
    if value is None:
        raise InputError(f"{option} is missing: {_MISSING[option]}")
    return value


class BlockSettings:
    """The settings of one block; each is ``None`` where nothing says it, so that `summarise` can show that.

    Args:
        fields: of the config.json.
        found: layout of the block, and others with the same keys.
        layer: index in the key, if there is one.
        options: what the user says; it goes before everything else.
    """

    def __init__(self, fields: Fields, found: Found, layer: int | None, options: CheckpointOptions) -> None:
        self.fields, self.layout, self.layer, self.options = fields, found.layout, layer, options
        self._others_fit = bool(found.also)

    def depth(self) -> int | None:
        """Layer index that sets ``lambda_init``."""
        for depth in (self.options.depth, typed_field(self.fields, "depth", int)):
            if depth is not None:
                if depth < 0:
                    raise InputError(f"depth is {depth}; accepted is a 0-based layer index")
                return int(depth)
        # Not checked as above: Motif's layer 0 has depth -1, as its own code has it.
        return None if self.layer is None else self.layer + self.layout.depth_offset

    def rope_style(self) -> str | None:
        """``interleaved``, ``half`` or ``none``."""
        if self.options.rope is not None:
            return self.options.rope
        if self.layout.rope is not None:
            found = self.layout.rope(self.fields)
            return "none" if found is None else found.style
        # In diffdeploy's own config.json the rotary embedding is one object.
        stored = self.fields.get("rope")
        return stored.get("style") if isinstance(stored, dict) else stored

    def rope_theta(self) -> float | None:
        """Rotary base."""
        if self.options.rope_theta is not None:
            return self.options.rope_theta
        stored = self.layout.rope(self.fields) if self.layout.rope is not None else None
        theta = stored.theta if stored is not None else (self.fields.get("rope") or {})
        theta = theta.get("theta") if isinstance(theta, dict) else theta
        return None if theta is None else float(theta)

    def rope(self) -> RopeConfig | None:
        """Rotary embedding; ``None`` where the block has none.

        Raises:
            InputError: nothing says it.
        """
        # As a whole, with its scaling, which no option can say.
        if self.layout.rope is not None and self.options.rope is None and self.options.rope_theta is None:
            return self.layout.rope(self.fields)
        style = required(self.rope_style(), "--rope interleaved|half|none")
        if style == "none":
            return None
        return RopeConfig(style=cast(RopeStyle, style), theta=required(self.rope_theta(), "--rope-theta"))

    def gqa_layout(self, sizes: Sizes) -> GqaLayout | None:
        """Key map, or the canonical one where both are the same."""
        chosen = self.options.gqa_layout or cast(GqaLayout | None, typed_field(self.fields, "gqa_layout", str))
        if chosen is None and sizes.num_heads == sizes.num_kv_heads:
            return "canonical"
        # Where several layouts have these keys, the first one's key map would be a guess.
        return chosen or (None if self._others_fit else self.layout.gqa_layout)

    def norm_eps(self) -> float:
        """Epsilon of the norm."""
        eps = typed_field(self.fields, self.layout.norm_eps_field, float)
        return _NORM_EPS if eps is None else float(eps)

    def sliding_window(self) -> int | None:
        """Keys that a position sees, or ``None`` for all."""
        return self.layout.sliding_window(self.fields, self.layer)
