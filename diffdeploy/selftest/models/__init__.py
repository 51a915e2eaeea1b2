"""Faults of whole models: in one layer, around the layers, in caches, and in generation."""

from diffdeploy.config import DecoderConfig
from diffdeploy.selftest.fault import Fault
from diffdeploy.selftest.models.caches import CACHE_FAULTS
from diffdeploy.selftest.models.computation import computation_faults
from diffdeploy.selftest.models.generation import GENERATION_FAULTS
from diffdeploy.selftest.models.layers import layer_faults

__all__ = ["model_faults"]


def model_faults(config: DecoderConfig) -> list[Fault]:
    """Faults that bundles of a model may have; faults in single layers are spread over its layers."""
    return [*layer_faults(config), *CACHE_FAULTS, *GENERATION_FAULTS, *computation_faults(config)]
