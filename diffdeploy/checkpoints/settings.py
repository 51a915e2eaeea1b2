"""What the tensors of a block cannot say: from the user's options, else from ``config.json``, else from the layout."""

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

# The norm's epsilon in every source that keeps none in its config, and the default of those that do.
_NORM_EPS = 1e-5

# Above 1, as yarn needs.
_ANY_THETA = 10_000.0

_ROPE = "--rope interleaved|half|half-reversed|none"

_MISSING = {
    "--causal or --no-causal": "nothing in the keys tells a block that sees later positions from one that does not",
    "--norm-eps": "the epsilon of the norm is not in the weights, so it cannot be guessed (most code bases use 1e-5)",
    "--output-scale": "without a norm, nothing says whether heads have a factor (1 for none; the paper's, behind its "
    "norm, is 1 - lambda_init)",
    "--depth": "lambda_init depends on the layer index, the keys have none, and the weights do not record it",
    _ROPE: "the weights are the same for every rotary style, so it cannot be guessed, and there is no config.json "
    "beside them that says it",
    "--rope-theta": "the base of the rotary frequencies is not in the weights, so it cannot be guessed (the paper's "
    "models use 10000)",
    "--sliding-window": "layers of this code base have a window, and no config.json beside the weights says it (0 for "
    "none)",
    "--gqa-layout": "with fewer key/value heads than heads, Microsoft's naive and flash modules read different key "
    "streams from the same weights, so it cannot be guessed; give canonical (flash) or legacy (naive, and every "
    "variant of multihead-sdpadiff, which --layout sdpadiff says too)",
}


def require(missing: Sequence[str]) -> None:
    """See that nothing is missing.

    Args:
        missing: options that a block cannot do without, and that nobody gave.

    Raises:
        InputError: something is; the message names every option.
    """
    if not missing:
        return
    if len(missing) == 1:
        raise InputError(f"{missing[0]} is missing: {_MISSING[missing[0]]}")
    reasons = "; ".join(f"{option}, since {_MISSING[option]}" for option in missing)
    raise InputError(f"{len(missing)} options are missing: {reasons}")


class BlockSettings:
    """The settings of one block; each is ``None`` where nothing says it, so that `summarise` can show that.

    Args:
        fields: of the config.json.
        found: layout of the block, and others with the same keys.
        prefix: of the block, one of ``found.blocks``.
        options: what the user says; it goes before everything else.
        stored: reads a number from the tensors, where the layout stores it; see `BlockTensors.number`.
        has_norm_weight: whether the block has the weight of the norm of the heads.
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
                    raise InputError(f"depth is {depth}; accepted is a 0-based layer index")
                return int(depth)
        # Not checked as above: Motif's layer 0 has depth -1, as its own code has it.
        return None if self.layer is None else self.layer + self.layout.depth_offset

    def lambda_init(self) -> float | None:
        """Constant part of lambda: as given, as the layout has it in every layer, else by the depth."""
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
        """Factor of the scores, where the block stores it."""
        return self._stored("softmax_scale")

    def has_norm(self) -> bool:
        """Whether heads are normalised.

        Raises:
            InputError: ``--norm`` contradicts the layout or the tensors.
        """
        norm, layout = self.options.norm, self.layout
        if layout.norm == "none":
            if norm not in (None, "none"):
                raise InputError(f"--norm is {norm}, and blocks of layout {layout.name} have no norm")
            return False
        if norm == "none" and self._has_norm_weight:
            raise InputError(
                f"--norm is none, and the block has {self.prefix}{layout.norm_weight.key}, a weight of one"
            )
        return self._has_norm_weight or (norm != "none" if layout.norm == "rms" else norm is not None)

    def output_scale(self, lambda_init: float | None) -> float | None:
        """Factor behind the norm; ``None`` where nothing says it."""
        given = self.layout.output_scale if self.options.output_scale is None else self.options.output_scale
        if given is not None or not self.has_norm():
            return given
        return None if lambda_init is None else 1 - lambda_init

    def causal(self) -> bool | None:
        """Whether positions see none after them."""
        if self.options.causal is not None:
            return self.options.causal
        by_prefix = self.layout.causal_by_prefix.items()
        return next((causal for name, causal in by_prefix if self.prefix.startswith(name)), self.layout.causal)

    def max_positions(self) -> int | None:
        """Positions that the model was made for."""
        length = typed_field(self.fields, "max_position_embeddings", int)
        if length is not None and length < 1:
            raise InputError(f"max_position_embeddings in config.json is {length}; accepted is 1 or more")
        return length

    def rope_style(self) -> str | None:
        """``interleaved``, ``half``, ``half-reversed`` or ``none``."""
        if self.options.rope is not None:
            return self.options.rope
        if self.layout.rope is not None:
            # The style of a layout does not depend on the base.
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
        """The rotary embedding in diffdeploy's own config.json: one object, or the name of a style."""
        stored = self.fields.get("rope")
        if isinstance(stored, dict):
            return stored
        if stored is not None and not isinstance(stored, str):
            raise InputError(f"rope in config.json is {shortened(stored)}; accepted is a JSON object or a style")
        return {} if stored is None else {"style": stored}

    def rope(self, missing: list[str]) -> RopeConfig | None:
        """Rotary embedding; ``None`` where the block has none, and where something is missing that it needs.

        Args:
            missing: takes the options that nothing says.
        """
        if self.layout.rope is not None and self.options.rope is None:
            try:
                # As a whole, with its scaling, which no option can say.
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
        """Whether the rotary embedding turns by minus the angle."""
        return (self.rope_style() or "").endswith("-reversed")

    def defaults(self) -> dict[str, str]:
        """Fields that the file leaves to the source's own config class, with what that class takes, and its name."""
        absent = {name: value for name, value in self.layout.class_defaults.items() if not self._says(name)}
        return {name: f"{value:g}, the default of {self.layout.config_class}" for name, value in absent.items()}

    def _says(self, name: str) -> bool:
        nested = self.fields.get("rope_parameters")
        given = getattr(self.options, "norm_eps" if name == self.layout.norm_eps_field else name, None)
        return given is not None or name in self.fields or (isinstance(nested, dict) and name in nested)

    def gqa_layout(self, sizes: Sizes) -> GqaLayout | None:
        """Key map, or the canonical one where both are the same."""
        chosen = self.options.gqa_layout or cast(GqaLayout | None, typed_field(self.fields, "gqa_layout", str))
        if chosen is None and sizes.num_heads == sizes.num_kv_heads:
            return "canonical"
        # Where several layouts have these keys, the first one's key map would be a guess.
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
        """Keys that a position sees; ``None`` for all, and where nothing says it.

        Args:
            missing: takes the option that nothing says.
        """
        if self.options.sliding_window is not None:
            return self.options.sliding_window or None
        try:
            return self.layout.sliding_window(self.fields, self.layer)
        except UnknownWindowError:
            missing.append("--sliding-window")
            return None
