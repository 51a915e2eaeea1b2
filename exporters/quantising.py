"""Quantised weights in the life of an export: what is stored, what is computed with, and what is lost by it."""

import math
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffdeploy.arrays import Array, to_array, to_tensor
from diffdeploy.bundle import Bundle, cast_weights, dequantised, frozen_module, quantised, with_own_head
from diffdeploy.errors import InputError, VerificationError
from diffdeploy.formats import ExportOptions
from diffdeploy.runtime.text import TOKENIZER, Tokenizer
from diffdeploy.verify import WINDOW, Loss, measure_loss

if TYPE_CHECKING:
    from torch import Tensor

    from diffdeploy.checkpoints import Checkpoint, ModelCheckpoint

__all__ = ["ShippedWeights", "check_quantisation", "loss_of", "to_quantise"]

# On every machine, and among the files that the sample was not trained on.
_TEXT = "filecmp.py"


@dataclass(frozen=True)
class ShippedWeights:
    """The weights of a bundle.

    Attributes:
        original: cast to the dtype of the graph.
        stored: as the weights file has them.
        computed: what the artifact computes with: the original ones, or the numbers that quantised ones stand for.
    """

    original: "Mapping[str, Tensor]"
    stored: Mapping[str, Array]
    computed: "Mapping[str, Tensor]"

    @classmethod
    def of(cls, checkpoint: "Checkpoint | ModelCheckpoint", options: ExportOptions) -> "ShippedWeights":
        """Cast the weights of a checkpoint, and quantise them if that was asked for.

        Raises:
            InputError: a weight is too large for the dtype.
            UnavailableError: there is nothing to quantise with.
        """
        original = cast_weights(checkpoint.weights, options.dtype)
        stored = {name: to_array(tensor) for name, tensor in original.items()}
        if (quantisation := options.quantisation) is None:
            return cls(original, stored, original)
        stored = quantised(stored, quantisation)
        numbers = dequantised(stored, checkpoint.config, quantisation)
        return cls(original, stored, {name: to_tensor(array) for name, array in numbers.items()})


def check_quantisation(checkpoint: "Checkpoint | ModelCheckpoint", options: ExportOptions) -> None:
    """Refuse options of quantised weights that have none, and a loss that cannot be measured.

    Raises:
        InputError: one was given.
    """
    asked: dict[str, object] = {"text": options.text, "max kl": options.max_kl, "min agreement": options.min_agreement}
    given = [name for name, value in asked.items() if value is not None]
    others = {"block size": options.block_size is not None, "quantise head": options.quantise_head}
    alone = [*(name for name, is_given in others.items() if is_given), *given]
    if options.weights is None and alone:
        raise InputError(f"{alone[0]} is of quantised weights, and there are none; give --weights int8 or int4")
    if given and TOKENIZER not in _companions(checkpoint):
        raise InputError(
            f"{given[0]} is of a text, and there is no {TOKENIZER} beside the checkpoint to read one with; leave it out"
        )
    if options.max_kl is not None and not 0 <= options.max_kl < math.inf:
        raise InputError(f"max kl is {options.max_kl}; accepted is a number of nats from 0 on")
    if options.min_agreement is not None and not 0 <= options.min_agreement <= 1:
        raise InputError(f"min agreement is {options.min_agreement}; accepted is a share, 0 to 1")
    if options.text is not None:
        _read(options.text)


def _companions(checkpoint: "Checkpoint | ModelCheckpoint") -> set[str]:
    return {companion.name for companion in checkpoint.companions}


def to_quantise(checkpoint: "Checkpoint | ModelCheckpoint", options: ExportOptions) -> "Checkpoint | ModelCheckpoint":
    """The checkpoint, with a head of its own where that is to be quantised."""
    if not options.quantise_head:
        return checkpoint
    config, weights = with_own_head(checkpoint.config, checkpoint.weights)
    return replace(checkpoint, config=config, weights=weights)  # type: ignore[arg-type]


def loss_of(
    bundle: Bundle,
    weights: ShippedWeights,
    options: ExportOptions,
    progress: Callable[[int, int, str], None] | None = None,
) -> Loss | None:
    """What quantised weights lose; ``None`` where none are, or where no tokenizer came with the checkpoint.

    Raises:
        InputError: the text has less than two tokens, or one that the model does not know.
        VerificationError: more than was asked for.
    """
    if options.weights is None or TOKENIZER not in bundle.manifest.files:
        return None
    import torch

    from diffdeploy.modules import DiffTransformer

    config, dtype = bundle.manifest.config, getattr(torch, bundle.manifest.graph.dtype)
    text, name = _read(options.text)
    tokens = Tokenizer(bundle).encode(text)
    if len(tokens) < 2:  # noqa: PLR2004 - one to begin with and one to predict
        raise InputError(f"{name} has {len(tokens)} tokens, too few for a loss; give another --text")
    original, computed = (
        frozen_module(config, each, impl="auto", max_positions=WINDOW, dtype=dtype)
        for each in (weights.original, weights.computed)
    )
    assert isinstance(original, DiffTransformer)
    assert isinstance(computed, DiffTransformer)
    loss = measure_loss(original, computed, tokens, text.encode(), name, progress)
    if (excess := loss.excess(options.max_kl, options.min_agreement)) is not None:
        raise VerificationError(f"the quantised weights lose too much and were not kept: {excess}; {loss.summary}")
    return loss


def _read(path: Path | None) -> tuple[str, str]:
    """The text to measure on, and its name."""
    source = Path(sysconfig.get_paths()["stdlib"]) / _TEXT if path is None else path
    try:
        return source.read_text(encoding="utf-8"), source.name
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read as text ({error}); give another --text") from error
