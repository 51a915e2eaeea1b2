"""Quantised weights during an export: those that are stored, those that the artifact computes with, and the loss."""

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
from diffdeploy.verify.activations import quantised_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from diffdeploy.checkpoints import Checkpoint, ModelCheckpoint

__all__ = ["ShippedWeights", "check_quantisation", "loss_of", "to_quantise"]

# A module of Python's standard library: it is on every machine, and the sample model was not trained on it.
_TEXT = "filecmp.py"


@dataclass(frozen=True)
class ShippedWeights:
    """The weights of a bundle in three forms.

    Attributes:
        original: weights cast to the dtype of the graph.
        stored: weights as the weights file contains them.
        computed: weights with which the artifact computes: the original ones, or the dequantised ones.
    """

    original: "Mapping[str, Tensor]"
    stored: Mapping[str, Array]
    computed: "Mapping[str, Tensor]"

    @classmethod
    def of(cls, checkpoint: "Checkpoint | ModelCheckpoint", options: ExportOptions) -> "ShippedWeights":
        """Cast the weights of a checkpoint, and quantise them on request.

        Raises:
            InputError: a weight is out of range for the dtype.
            UnavailableError: the quantiser is not installed.
        """
        original = cast_weights(checkpoint.weights, options.dtype)
        stored = {name: to_array(tensor) for name, tensor in original.items()}
        if (quantisation := options.quantisation) is None:
            return cls(original, stored, original)
        stored = quantised(stored, quantisation)
        numbers = dequantised(stored, checkpoint.config, quantisation)
        return cls(original, stored, {name: to_tensor(array) for name, array in numbers.items()})


def check_quantisation(checkpoint: "Checkpoint | ModelCheckpoint", options: ExportOptions) -> None:
    """Reject quantisation options if nothing is quantised, and loss options if the loss cannot be measured.

    Raises:
        InputError: such an option was given.
    """
    asked: dict[str, object] = {"text": options.text, "max kl": options.max_kl, "min agreement": options.min_agreement}
    given = [name for name, value in asked.items() if value is not None]
    others = {
        "block size": options.block_size is not None,
        "activations": options.activations is not None,
        "quantise head": options.quantise_head,
    }
    alone = [*(name for name, is_given in others.items() if is_given), *given]
    if options.weights is None and alone:
        need = "need" if alone[0] == "activations" else "needs"
        raise InputError(f"{alone[0]} {need} quantised weights, but there are none; give --weights int8 or int4")
    if given and TOKENIZER not in _companions(checkpoint):
        raise InputError(f"{given[0]} needs a tokenizer, but the checkpoint has no {TOKENIZER}; omit it")
    if options.max_kl is not None and not 0 <= options.max_kl < math.inf:
        raise InputError(f"max kl is {options.max_kl}; accepted: a number of nats, 0 or more")
    if options.min_agreement is not None and not 0 <= options.min_agreement <= 1:
        raise InputError(f"min agreement is {options.min_agreement}; accepted: a share, 0 to 1")
    if options.text is not None:
        _read(options.text)


def _companions(checkpoint: "Checkpoint | ModelCheckpoint") -> set[str]:
    return {companion.name for companion in checkpoint.companions}


def to_quantise(checkpoint: "Checkpoint | ModelCheckpoint", options: ExportOptions) -> "Checkpoint | ModelCheckpoint":
    """The checkpoint, with a separate head if the head is to be quantised."""
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
    """Measure the loss from quantised weights; ``None`` without quantisation or without a tokenizer.

    Raises:
        InputError: the text has fewer than two tokens, or one that the model does not know.
        VerificationError: the loss exceeds a limit.
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
    with quantised_inputs(computed, options.quantisation):
        loss = measure_loss(original, computed, tokens, text.encode(), name, progress)
    if (excess := loss.excess(options.max_kl, options.min_agreement)) is not None:
        raise VerificationError(f"the quantised weights lose too much and were not kept: {excess}; {loss.summary}")
    return loss


def _read(path: Path | None) -> tuple[str, str]:
    """Text to measure on, and its name."""
    source = Path(sysconfig.get_paths()["stdlib"]) / _TEXT if path is None else path
    try:
        return source.read_text(encoding="utf-8"), source.name
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read as text ({error}); give another --text") from error
