"""Benchmarks of whole models: prefill and decode of bundles, of the eager model, and of transformers."""

from diffdeploy.bench.models.request import ModelBenchRequest, holds_models, prepare_models
from diffdeploy.bench.models.results import ModelReport, ModelRow, read_model_report
from diffdeploy.bench.models.run import ModelBench

__all__ = [
    "ModelBench",
    "ModelBenchRequest",
    "ModelReport",
    "ModelRow",
    "holds_models",
    "prepare_models",
    "read_model_report",
]
