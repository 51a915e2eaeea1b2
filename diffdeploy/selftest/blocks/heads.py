"""Blocks that are wrong after the attentions: in the difference, the norm or the output projection.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdeploy.config import DiffAttentionConfig
from diffdeploy.graphs import Stage
from diffdeploy.selftest.blocks.entry import faulty
from diffdeploy.selftest.blocks.steps import Steps
from diffdeploy.selftest.conditions import float32, has_norm, lambda_is_not_one, several_heads


@faulty("noise_is_added", "a plus instead of a minus", Stage.DIFFERENCE)
class NoiseIsAdded(Steps):
    """The noise is added instead of subtracted."""

    def difference(self, signal: Tensor, noise: Tensor, lam: Tensor) -> Tensor:
        return signal + lam * noise


@faulty("lambda_on_signal", "``lambda signal - noise``", Stage.LAMBDA, lambda_is_not_one)
class LambdaOnSignal(Steps):
    """The heads are ``lambda signal - noise``."""

    def difference(self, signal: Tensor, noise: Tensor, lam: Tensor) -> Tensor:
        return lam * signal - noise


@faulty("mixed_by_lambda", "``(1 - lambda) signal - lambda noise``", Stage.DIFFERENCE)
class MixedByLambda(Steps):
    """The heads are ``(1 - lambda) signal - lambda noise``."""

    def difference(self, signal: Tensor, noise: Tensor, lam: Tensor) -> Tensor:
        return (1 - lam) * signal - lam * noise


@faulty("difference_reversed", "``lambda noise - signal``", Stage.DIFFERENCE)
class DifferenceReversed(Steps):
    """The heads are ``lambda noise - signal``."""

    def difference(self, signal: Tensor, noise: Tensor, lam: Tensor) -> Tensor:
        return lam * noise - signal


@faulty("negative_part_lost", "negative results of the subtraction become 0", Stage.DIFFERENCE)
class NegativePartLost(Steps):
    """Negative results of the subtraction become 0."""

    def difference(self, signal: Tensor, noise: Tensor, lam: Tensor) -> Tensor:
        return torch.maximum(signal, lam * noise) - lam * noise


def _config(block: Steps) -> DiffAttentionConfig:
    return cast("DiffAttentionConfig", block.config)


def _eps(block: Steps) -> float:
    eps = _config(block).norm_eps
    assert eps is not None  # every fault of the norm requires one
    return eps


def _gamma(block: Steps) -> Tensor | None:
    return cast("torch.nn.RMSNorm", block.subln).weight


@faulty("norm_over_halves", "the norm over half of a head", Stage.NORM, has_norm)
class NormOverHalves(Steps):
    """The norm covers only half of a head at a time."""

    def normalise(self, heads: Tensor) -> Tensor:
        config = _config(self)
        width = config.value_dim // 2
        halves = heads.reshape(*heads.shape[:-1], 2, width)
        normed = F.rms_norm(halves, (width,), None, config.norm_eps).flatten(-2)
        gamma = _gamma(self)
        return (normed if gamma is None else normed * gamma) * config.output_scale


@faulty("norm_over_all_heads", "one norm over all heads together", Stage.NORM, has_norm, several_heads)
class NormOverAllHeads(Steps):
    """One norm covers all heads together."""

    def normalise(self, heads: Tensor) -> Tensor:
        config = _config(self)
        power = heads.square().mean(dim=(1, 3), keepdim=True)
        normed = heads * torch.rsqrt(power + _eps(self))
        gamma = _gamma(self)
        return (normed if gamma is None else normed * gamma) * config.output_scale


@faulty("layer_norm", "the mean is subtracted", Stage.NORM, has_norm)
class LayerNorm(Steps):
    """The norm subtracts the mean."""

    def normalise(self, heads: Tensor) -> Tensor:
        return super().normalise(heads - heads.mean(-1, keepdim=True))


@faulty("norm_missing", "no norm at all", Stage.NORM, has_norm)
class NormMissing(Steps):
    """There is no norm."""

    def normalise(self, heads: Tensor) -> Tensor:
        gamma = _gamma(self)
        return (heads if gamma is None else heads * gamma) * _config(self).output_scale


@faulty("factor_before_norm", "the output factor precedes the norm, which cancels it", Stage.NORM, has_norm)
class FactorBeforeNorm(Steps):
    """The output factor precedes the norm, which cancels it."""

    def normalise(self, heads: Tensor) -> Tensor:
        factor = _config(self).output_scale
        return super().normalise(heads * factor) / factor


@faulty("epsilon_outside", "epsilon added to the root, not under it", Stage.NORM, has_norm)
class EpsilonOutside(Steps):
    """Epsilon is added to the root, not under it."""

    def normalise(self, heads: Tensor) -> Tensor:
        config = _config(self)
        root = heads.square().mean(-1, keepdim=True).sqrt() + _eps(self)
        gamma = _gamma(self)
        return (heads / root if gamma is None else heads / root * gamma) * config.output_scale


@faulty("norm_before_difference", "each attention is normalised separately", Stage.NORM, has_norm)
class NormBeforeDifference(Steps):
    """Each attention is normalised separately."""

    def difference(self, signal: Tensor, noise: Tensor, lam: Tensor) -> Tensor:
        config = _config(self)
        shape = (config.value_dim,)
        return F.rms_norm(signal, shape, None, config.norm_eps) - lam * F.rms_norm(noise, shape, None, config.norm_eps)


@faulty("heads_reversed", "heads are joined in reverse order", Stage.OUTPUT_PROJECTION, several_heads)
class HeadsReversed(Steps):
    """Heads are joined in reverse order."""

    def join(self, heads_BHSe: Tensor) -> Tensor:
        return super().join(heads_BHSe.flip(1))


@faulty("half_precision_projection", "the output projection in float16", Stage.OUTPUT_PROJECTION, float32)
class HalfPrecisionProjection(Steps):
    """The output projection is computed in float16."""

    def project(self, joined: Tensor) -> Tensor:
        bias = None if self.out_proj.bias is None else self.out_proj.bias.half()
        return F.linear(joined.half(), self.out_proj.weight.half(), bias).to(joined.dtype)


@faulty("nan_at_length_one", "a division that is 0 / 0 at length 1", None)
class NanAtLengthOne(Steps):
    """The result is multiplied by 0 / 0 at length 1."""

    def project(self, joined: Tensor) -> Tensor:
        others = torch.ones(joined.shape[1]).sum() - 1
        return super().project(joined) * (others / others)


@faulty("noisy", "a little noise on the output, different in every call", None)
class Noisy(Steps):
    """The output has a little noise, which is different in every call."""

    def project(self, joined: Tensor) -> Tensor:
        output = super().project(joined)
        return output + 1e-4 * torch.rand_like(output)


@faulty("batch_average", "rows of a batch leak into each other", None)
class BatchAverage(Steps):
    """Rows of a batch leak into each other."""

    def project(self, joined: Tensor) -> Tensor:
        output = super().project(joined)
        return output + 1e-3 * (output.mean(dim=0, keepdim=True) - output)
