"""onnxruntime-genai as an engine, whose model directories are ONNX bundles of models."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import TypeAdapter

from diffdeploy.engines.base import Engine, EngineRequest, EngineRound, Subject, answer_of
from diffdeploy.errors import DiffDeployError, InputError
from diffdeploy.formats.onnx.genai import GENAI_CONFIG

__all__ = ["GenaiEngine"]


class GenaiEngine(Engine):
    """onnxruntime-genai, for ONNX bundles of either flavor."""

    name = "genai"
    extra = "genai"
    distributions = ("onnxruntime-genai",)
    tested: ClassVar[Mapping[str, str]] = {
        "0.18.0": "with onnxruntime 1.32.0, x86-64, Python 3.11: float32 and float16, both flavors"
    }

    def open(self, path: Path) -> Subject:
        """Open the model in a bundle.

        Raises:
            InputError: the directory is not a bundle that the engine can run.
            IntegrityError: the bundle is not what was exported.
        """
        from diffdeploy.arrays import to_tensor
        from diffdeploy.bundle import is_bundle, open_bundle, read_weights, special_tokens
        from diffdeploy.config import DecoderConfig

        if not is_bundle(path):
            raise InputError(f"{path} is not a bundle, which genai needs; diffdeploy export --format onnx makes one")
        bundle = open_bundle(path)
        manifest = bundle.manifest
        config = manifest.config
        if GENAI_CONFIG not in manifest.files or not isinstance(config, DecoderConfig):
            raise InputError(
                f"{path} has no {GENAI_CONFIG}, which ONNX exports of whole models have if keys and values have the "
                "same width"
            )
        weights = {name: to_tensor(array) for name, array in read_weights(bundle).items()}
        longest = manifest.graph.axes["total_sequence_length"].max
        padding = special_tokens(path, manifest).fill
        return Subject(
            config=config,
            weights=weights,
            dtype=manifest.graph.dtype,
            max_length=longest,
            padding=padding,
            quantisation=manifest.options.quantised_activations,
        )

    def run(self, request: EngineRequest) -> list[EngineRound]:
        """Run the engine: each prompt separately, then all as a batch, padded on the right.

        Raises:
            InputError: more than one rank is requested.
            DiffDeployError: the engine failed.
        """
        if request.tensor_parallel_size != 1:
            raise InputError(
                f"--tensor-parallel-size is {request.tensor_parallel_size}, but genai runs a model in one process"
            )
        answer, said = answer_of("diffdeploy.engines.genai_worker", request)
        if answer is None:
            raise DiffDeployError(f"onnxruntime-genai did not run: {said[-1] if said else 'it wrote no message'}")
        return TypeAdapter(list[EngineRound]).validate_json(answer)
