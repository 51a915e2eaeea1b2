"""Settings of a block that its tensors do not determine: from the user's options, ``config.json`` or the layout."""

from collections.abc import Callable, Sequence
from typing import cast

from diffdeploy.checkpoints.detect import Found
from diffdeploy.checkpoints.fields import Fields, shortened, typed_field
from diffdeploy.checkpoints.layouts.base import UnknownThetaError, UnknownWindowError
from diffdeploy.checkpoints.options import CheckpointOptions
from diffdeploy.checkpoints.sizes import Sizes
from diffdeploy.config import GqaLayout, RopeConfig, RopeStyle, lambda_init_at
from diffdeploy.errors import InputError

__all__ = ["BlockSettings", "require"]

# The norm's epsilon in sources that do not store it in a config, and the default of those that do.
_NORM_EPS = 1e-5

# Base for calls in which its value has no effect; it is above 1, as yarn requires.
_ANY_THETA = 10_000.0

_ROPE = "--rope interleaved|half|half-reversed|none"

_MISSING = {
    "--causal or --no-causal": "the keys do not show whether the block attends to later positions",
    "--norm-eps": "the epsilon of the norm is not in the weights, so it cannot be guessed (most code bases use 1e-5)",
    "--output-scale": "without a norm, nothing shows by which factor the heads are multiplied (1 for none; in the "
    "paper, the factor after the norm is 1 - lambda_init)",
    "--depth": "lambda_init depends on the layer index, which neither the keys nor the weights contain",
    _ROPE: "the weights are the same for every rotary style, so it cannot be guessed, and there is no config.json "
    "next to them that states it",
    "--rope-theta": "the base of the rotary frequencies is not in the weights, so it cannot be guessed (the paper's "
    "models use 10000)",
    "--sliding-window": "layers of this code base have a window, and no config.json next to the weights states it (0 "
    "for none)",
    "--gqa-layout": "with fewer key/value heads than heads, Microsoft's naive and flash modules read different key "
    "streams with the same weights, so it cannot be guessed; give canonical (flash) or legacy (naive, and every "
    "variant of multihead-sdpadiff, which --layout sdpadiff implies)",
}


def require(missing: Sequence[str]) -> None:
    """Raise an error if options are missing.

    Args:
        missing: options that the block requires and that were not given.

    Raises:
        InputError: at least one option is missing; the message names every one.
    """
    if not missing:
        return
    if len(missing) == 1:
        raise InputError(f"{missing[0]} is missing: {_MISSING[missing[0]]}")
    reasons = "; ".join(f"{option}, since {_MISSING[option]}" for option in missing)
    raise InputError(f"{len(missing)} options are missing: {reasons}")


class BlockSettings:
    """Settings of one block; each is ``None`` if nothing states it, so that `summarise` can show that.

    Args:
        fields: fields of config.json.
        found: layout of the block, and others with the same keys.
        prefix: prefix of the block, one of ``found.blocks``.
        options: the user's options, which override everything else.
        stored: function that reads a number from the tensors if the layout stores it; see `BlockTensors.number`.
        has_norm_weight: true if the block has a weight for the norm of the heads.
    """

    def __init__(
        self,
        fields: Fields,
        found: Found,
        prefix: str,
        options: CheckpointOptions,
        stored: Callable[[str], float | None],
        *,
        has_norm_weight: bool = False,
    ) -> None:
        self.fields, self.layout, self.prefix, self.options = fields, found.layout, prefix, options
        self.layer, self._stored, self._has_norm_weight = found.blocks[prefix], stored, has_norm_weight
        self._others_fit = bool(found.also)

    def depth(self) -> int | None:
        """Layer index that sets ``lambda_init``."""
        for depth in (self.options.depth, typed_field(self.fields, "depth", int)):
            if depth is not None:
                if depth < 0:
                    raise InputError(f"depth is {depth}; accepted: a 0-based layer index")
                return int(depth)
        # This depth is not restricted as above: Motif's layer 0 has depth -1 in its own code.
        return None if self.layer is None else self.layer + self.layout.depth_offset

    def lambda_init(self) -> float | None:
        """Constant part of lambda, from the option, from a layout with one value for all layers, or from the depth."""
        given = self.options.lambda_init
        if self.layout.lambda_kind == "fixed" and (given, self.options.depth) != (None, None):
            raise InputError(
                f"lambda is {self.layout.lambda_init:g} in layout {self.layout.name}; give neither --depth "
                "nor --lambda-init"
            )
        if given is None and self.options.depth is None:
            stored = self._stored("lambda_init")
            given = self.layout.lambda_init if stored is None else stored
        if given is not None:
            return given
        depth = self.depth()
        return None if depth is None else lambda_init_at(depth)

    def softmax_scale(self) -> float | None:
        """Factor of the scores, if the block stores it."""
        return self._stored("softmax_scale")

    def has_norm(self) -> bool:
        """True if heads are normalised.

        Raises:
            InputError: ``--norm`` contradicts the layout or the tensors.
        """
        norm, layout = self.options.norm, self.layout
        if layout.norm == "none":
            if norm not in (None, "none"):
                raise InputError(f"--norm is {norm}, but blocks of layout {layout.name} have no norm")
            return False
        if norm == "none" and self._has_norm_weight:
            raise InputError(
                f"--norm is none, but the block has {self.prefix}{layout.norm_weight.key}, the weight of a norm"
            )
        return self._has_norm_weight or (norm != "none" if layout.norm == "rms" else norm is not None)

    def output_scale(self, lambda_init: float | None) -> float | None:
        """Factor after the norm; ``None`` if nothing states it."""
        given = self.layout.output_scale if self.options.output_scale is None else self.options.output_scale
        if given is not None or not self.has_norm():
            return given
        return None if lambda_init is None else 1 - lambda_init

    def causal(self) -> bool | None:
        """True if positions do not attend to later ones."""
        if self.options.causal is not None:
            return self.options.causal
        by_prefix = self.layout.causal_by_prefix.items()
        return next((causal for name, causal in by_prefix if self.prefix.startswith(name)), self.layout.causal)

    def max_positions(self) -> int | None:
        """Maximum number of positions of the model."""
        length = typed_field(self.fields, "max_position_embeddings", int)
        if length is not None and length < 1:
            raise InputError(f"max_position_embeddings in config.json is {length}; accepted: 1 or more")
        return length

    def rope_style(self) -> str | None:
        """Rotary style: ``interleaved``, ``half``, ``half-reversed`` or ``none``."""
        if self.options.rope is not None:
            return self.options.rope
        if self.layout.rope is not None:
            # The layout determines the style, whatever the base is.
            found = self.layout.rope(self.fields, self.options.rope_theta or _ANY_THETA)
            return "none" if found is None else found.style + ("-reversed" if self.layout.turns_back else "")
        stored = self._own_rope().get("style")
        return None if stored is None else str(stored)

    def rope_theta(self) -> float | None:
        """Rotary base."""
        if self.options.rope_theta is not None:
            return self.options.rope_theta
        if self.layout.rope is None:
            return typed_field(self._own_rope(), "theta", float)
        try:
            found = self.layout.rope(self.fields, None)
        except UnknownThetaError:
            return None
        return None if found is None else found.theta

    def _own_rope(self) -> Fields:
        """Rotary embedding in diffdeploy's own config.json: an object, or the name of a style."""
        stored = self.fields.get("rope")
        if isinstance(stored, dict):
            return stored
        if stored is not None and not isinstance(stored, str):
            raise InputError(f"rope in config.json is {shortened(stored)}; accepted: a JSON object or a style")
        return {} if stored is None else {"style": stored}

    def rope(self, missing: list[str]) -> RopeConfig | None:
        """Rotary embedding; ``None`` if the block has none, or if a required setting is missing.

        Args:
            missing: list to which the missing options are appended.
        """
        if self.layout.rope is not None and self.options.rope is None:
            try:
                # The embedding is taken as a whole, including its scaling, which no option can state.
                return self.layout.rope(self.fields, self.options.rope_theta)
            except UnknownThetaError:
                missing.append("--rope-theta")
                return None
        style, theta = self.rope_style(), self.rope_theta()
        if style == "none":
            return None
        missing += [_ROPE] if style is None else []
        missing += ["--rope-theta"] if theta is None else []
        if style is None or theta is None:
            return None
        return RopeConfig(style=cast(RopeStyle, style.removesuffix("-reversed")), theta=float(theta))

    def turns_back(self) -> bool:
        """True if the rotary embedding rotates by the negative angle."""
        return (self.rope_style() or "").endswith("-reversed")

    def defaults(self) -> dict[str, str]:
        """Fields that the file leaves to the source's own config class, with the default and the name of that class."""
        absent = {name: value for name, value in self.layout.class_defaults.items() if not self._says(name)}
        return {name: f"{value:g}, the default of {self.layout.config_class}" for name, value in absent.items()}

    def _says(self, name: str) -> bool:
        nested = self.fields.get("rope_parameters")
        given = getattr(self.options, "norm_eps" if name == self.layout.norm_eps_field else name, None)
        return given is not None or name in self.fields or (isinstance(nested, dict) and name in nested)

    def gqa_layout(self, sizes: Sizes) -> GqaLayout | None:
        """Key map; the canonical one if both maps are the same."""
        chosen = self.options.gqa_layout or cast(GqaLayout | None, typed_field(self.fields, "gqa_layout", str))
        if chosen is None and sizes.num_heads == sizes.num_kv_heads:
            return "canonical"
        # If several layouts have these keys, the key map of the first would be a guess.
        return chosen or (None if self._others_fit else self.layout.gqa_layout)

    def norm_eps(self) -> float:
        """Epsilon of the norm over each head's outputs."""
        if self.options.norm_eps is not None:
            return self.options.norm_eps
        eps = typed_field(self.fields, self.layout.norm_eps_field, float)
        return float(self.layout.class_defaults.get(self.layout.norm_eps_field, _NORM_EPS) if eps is None else eps)

    def qk_norm_eps(self) -> float | None:
        """Epsilon of the norms of queries and keys; ``None`` for a layout without such norms."""
        return self.layout.qk_norm_eps if self.options.qk_norm_eps is None else self.options.qk_norm_eps

    def sliding_window(self, missing: list[str]) -> int | None:
        """Number of keys that a position attends to; ``None`` for all, or if the window is unknown.

        Args:
            missing: list to which the missing option is appended.
        """
        if self.options.sliding_window is not None:
            return self.options.sliding_window or None
        try:
            return self.layout.sliding_window(self.fields, self.layer)
        except UnknownWindowError:
            missing.append("--sliding-window")
            return None
