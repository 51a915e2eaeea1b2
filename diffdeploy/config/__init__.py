"""Configs: every size and flag of a block or a model, validated once."""

from diffdeploy.config.block import (
    LAMBDA_VECTORS,
    DiffAttentionConfig,
    GqaLayout,
    LambdaKind,
    is_lambda_vector,
    lambda_init_at,
)
from diffdeploy.config.block_v2 import AnyConfig, DiffAttentionV2Config
from diffdeploy.config.model import POLYNORM_EPS, AnyModel, DecoderConfig, LayerConfig, MlpConfig, MlpKind
from diffdeploy.config.rope import RopeConfig, RopeScaling, RopeStyle

__all__ = [
    "LAMBDA_VECTORS",
    "POLYNORM_EPS",
    "AnyConfig",
    "AnyModel",
    "DecoderConfig",
    "DiffAttentionConfig",
    "DiffAttentionV2Config",
    "GqaLayout",
    "LambdaKind",
    "LayerConfig",
    "MlpConfig",
    "MlpKind",
    "RopeConfig",
    "RopeScaling",
    "RopeStyle",
    "is_lambda_vector",
    "lambda_init_at",
]
