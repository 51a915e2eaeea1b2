"""The groups into which ``--help`` sorts the options of the larger commands."""

from collections.abc import Callable, Mapping
from copy import copy
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any, get_args

from typer.models import OptionInfo

from diffdeploy.cli.shared_options import with_parameters

__all__ = ["PANELS", "in_panels"]

_READING = (
    *("layout", "prefix", "names", "depth", "lambda_init", "output_scale", "causal", "sliding_window", "norm"),
    *("norm_eps", "qk_norm_eps", "rope", "rope_theta", "gqa_layout"),
)
_OPEN, _OUTPUT, _HOW_RUN = "What the checkpoint leaves open", "Result", "How it runs"
_TRUST = "Trust"

# Names of parameters, by command and group, in the order in which help shows them.
PANELS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "export": {
        "What is exported": ("format_name", "layer", "graph", "logits", "cache"),
        "How it is exported": (
            *("dtype", "device", "max_batch_size", "max_sequence_length", "opset", "onnx_flavor", "attention_impl"),
        ),
        "Quantised weights": (
            *("weights", "block_size", "activations", "quantise_head", "text", "max_kl", "min_agreement"),
        ),
        "Checks": ("runtime", "seed", "cases", "no_verify"),
        _OUTPUT: ("output", "force", "as_json", "quiet"),
        _OPEN: _READING,
    },
    "convert": {_OUTPUT: ("target", "output", "force", "as_json", "quiet"), _OPEN: _READING},
    "generate": {
        "Prompt": ("prompt", "prompt_file", "input_ids", "chat"),
        "Length": ("max_new_tokens", "min_new_tokens", "stop"),
        "Sampling": ("temperature", "top_k", "top_p", "repetition_penalty", "seed"),
        _HOW_RUN: ("device", "threads", "recompile"),
        _TRUST: ("trust", "public_key"),
        _OUTPUT: ("as_json", "quiet"),
    },
    "verify": {
        "What is verified": ("engine", "tensor_parallel_size", "checkpoint", "golden", "self_test", "from_report", "k"),
        "Inputs": ("cases", "seed", "load_inputs", "save_inputs"),
        _HOW_RUN: ("device", "runtime", "recompile"),
        _TRUST: ("trust", "public_key"),
        _OUTPUT: ("save_report", "junit", "html", "warn_only", "as_json", "quiet"),
    },
    "run": {
        "Files": ("inputs", "outputs", "force"),
        _HOW_RUN: ("device", "threads", "runtime", "recompile"),
        _TRUST: ("trust", "public_key"),
        _OUTPUT: ("as_json",),
    },
    "bench": {
        "What is measured": ("impl", "format_names", "graph", "baseline", "layer"),
        "Sizes": ("seq", "batch"),
        "A random block": ("embed_dim", "num_heads", "num_kv_heads", "head_dim"),
        "Run settings": ("dtype", "device", "threads", "rounds"),
        _TRUST: ("trust", "public_key"),
        _OUTPUT: ("csv", "plot", "save", "compare", "as_json", "quiet"),
        _OPEN: _READING,
    },
}


def in_panels(command: Callable[..., int]) -> Callable[..., int]:
    """Sort the options of a command into the groups of `PANELS`; a command that is not listed stays unchanged."""
    titles = {name: title for title, names in PANELS.get(command.__name__, {}).items() for name in names}
    if not titles:
        return command

    @wraps(command)
    def run_command(*arguments: Any, **options: Any) -> int:
        return command(*arguments, **options)

    # Groups are shown in the order of their first options.
    order = list(titles)
    parameters = sorted(
        (_titled(parameter, titles.get(parameter.name)) for parameter in signature(command).parameters.values()),
        key=lambda parameter: order.index(parameter.name) if parameter.name in titles else -1,
    )
    return with_parameters(run_command, parameters)


def _titled(parameter: Parameter, title: str | None) -> Parameter:
    if title is None:
        return parameter
    kind, *said = get_args(parameter.annotation)
    for number, info in enumerate(said):
        if isinstance(info, OptionInfo):
            # A copy, since several commands share some options.
            said[number] = copy(info)
            said[number].rich_help_panel = title
    # Keyword-only, since the options are in a different order than in the command.
    annotation = Annotated[(kind, *said)]  # type: ignore[valid-type]
    return parameter.replace(annotation=annotation, kind=Parameter.KEYWORD_ONLY)
