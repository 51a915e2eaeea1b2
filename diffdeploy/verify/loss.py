"""The loss that quantisation causes in a model, measured on a text; it is reported but not part of the criterion.

Shape suffixes: B batch (1), S tokens of a window, D model width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffdeploy.records import Record, Rounded

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffdeploy.modules import DiffTransformer

__all__ = ["WINDOW", "Loss", "measure_loss"]

# Number of tokens of a text that attend to each other, as in the training of the sample.
WINDOW = 256


class Loss(Record):
    """The distance of a quantised model from the original one.

    Attributes:
        text: name of the text that it was measured on.
        text_sha256: sha256 of the text in UTF-8.
        num_bytes: length of the text in bytes.
        num_tokens: number of tokens that were predicted, all but the first.
        original_bits_per_byte: cross entropy of the original model.
        bits_per_byte: cross entropy of the quantised model.
        agreement: share of the tokens for which both models have the same most probable token.
        kl: mean Kullback-Leibler divergence of the quantised model's probabilities from the original ones, in nats per
            token.
        layers: root mean square error of each quantised part, by the names in reports; the part is given the input that
            it has in the original model, and the error is relative to what the original part adds to that input.
    """

    text: str
    text_sha256: str
    num_bytes: int
    num_tokens: int
    original_bits_per_byte: Rounded
    bits_per_byte: Rounded
    agreement: Rounded
    kl: Rounded
    layers: dict[str, Rounded]

    @property
    def worst_layer(self) -> str:
        """Name of the part with the largest error."""
        return max(self.layers, key=lambda name: self.layers[name])

    @property
    def summary(self) -> str:
        """All figures in one line."""
        return (
            f"{self.bits_per_byte:.4g} bits per byte, {self.original_bits_per_byte:.4g} before; same top token "
            f"{self.agreement:.2%}, KL {self.kl:.3g} nats; worst layer {self.worst_layer}, off by "
            f"{self.layers[self.worst_layer]:.2%}; {self.num_tokens:,} tokens of {self.text}"
        )

    def excess(self, max_kl: float | None, min_agreement: float | None) -> str | None:
        """Description of the limit that is exceeded, in one clause; ``None`` if there is none."""
        # Written as `not <=`, so that NaN exceeds every limit.
        if max_kl is not None and not self.kl <= max_kl:
            return f"KL is {self.kl:.4g} nats per token, but the limit is {max_kl:g}"
        if min_agreement is not None and not self.agreement >= min_agreement:
            share = f"{self.agreement:.4g} of all tokens"
            return f"the top token is the same for {share}, but the minimum is {min_agreement:g}"
        return None


def measure_loss(
    original: "DiffTransformer",
    quantised: "DiffTransformer",
    tokens: Sequence[int],
    text: bytes,
    name: str,
    progress: Callable[[int, int, str], None] | None = None,
) -> Loss:
    """Compare two eager models on a text, in windows of 256 tokens.

    Args:
        original: model with the original weights.
        quantised: model of the same config with the dequantised weights; the verification proves that the artifact
            computes with these.
        tokens: tokens of the text, at least two.
        text: the text in UTF-8.
        name: name of the text.
        progress: callback that receives the number of windows done, the total number, and the name of the text.
    """
    import hashlib

    import torch

    sums, errors = _Sums(), _Errors(original, quantised)
    # A window begins with the last token of the previous one, so that all tokens but the first are predicted once.
    starts = range(0, len(tokens) - 1, WINDOW - 1)
    with torch.no_grad(), errors.watched():
        for done, start in enumerate(starts):
            if progress is not None:
                progress(done, len(starts), name)
            ids_BS = torch.tensor([tokens[start : start + WINDOW]])
            sums.add(ids_BS[0, 1:], original(ids_BS)[0, :-1], quantised(ids_BS)[0, :-1])
    count = len(tokens) - 1
    bits = len(text) * math.log(2)
    return Loss(
        text=name,
        text_sha256=hashlib.sha256(text).hexdigest(),
        num_bytes=len(text),
        num_tokens=count,
        original_bits_per_byte=sums.original / bits,
        bits_per_byte=sums.quantised / bits,
        agreement=sums.same / count,
        kl=sums.divergence / count,
        layers=errors.relative(),
    )


class _Sums:
    """Sums over all predicted tokens."""

    def __init__(self) -> None:
        self.original = self.quantised = self.divergence = 0.0
        self.same = 0

    def add(self, next_S: "Tensor", original_SV: "Tensor", quantised_SV: "Tensor") -> None:
        # In float64, since the divergence of good weights is a small difference of large sums.
        before, after = original_SV.double().log_softmax(-1), quantised_SV.double().log_softmax(-1)
        self.original -= float(before.gather(1, next_S[:, None]).sum())
        self.quantised -= float(after.gather(1, next_S[:, None]).sum())
        self.divergence += float((before.exp() * (before - after)).sum())
        self.same += int((before.argmax(-1) == after.argmax(-1)).sum())


class _Errors:
    """Errors of each layer and of the head, on their inputs in the original model."""

    def __init__(self, original: "DiffTransformer", quantised: "DiffTransformer") -> None:
        self._parts: dict[str, tuple[nn.Module, nn.Module]] = {
            f"layer{number}": pair for number, pair in enumerate(zip(original.layers, quantised.layers, strict=True))
        }
        if not bool((original.lm_head.weight == quantised.lm_head.weight).all()):
            self._parts["head"] = original.lm_head, quantised.lm_head
        self._squares = {name: [0.0, 0.0] for name in self._parts}

    @contextmanager
    def watched(self) -> "Iterator[None]":
        """Add up the errors for all runs of the original model in the ``with`` block."""
        hooks = [before.register_forward_hook(self._hook(name)) for name, (before, _) in self._parts.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> "Callable[[nn.Module, tuple[Any, ...], Any], None]":
        other, squares = self._parts[name][1], self._squares[name]

        def add(_module: "nn.Module", inputs: tuple[Any, ...], outputs: Any) -> None:
            # A layer also returns its cache, and adds to its input.
            is_layer = isinstance(outputs, tuple)
            found = other(*inputs)
            exact, off = (outputs[0], found[0]) if is_layer else (outputs, found)
            added = exact - inputs[0] if is_layer else exact
            squares[0] += float((off - exact).double().square().sum())
            squares[1] += float(added.double().square().sum())

        return add

    def relative(self) -> dict[str, float]:
        """Root mean square error of each part, relative to the root mean square of what the part adds to its input."""
        return {name: math.sqrt(error / size) if size else 0.0 for name, (error, size) in self._squares.items()}
