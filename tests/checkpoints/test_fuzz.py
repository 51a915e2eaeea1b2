"""Files that nobody wrote on purpose: whatever they hold, a checkpoint is read or refused in one sentence.

A fixed sample runs with the other tests; ``make fuzz`` draws new files each time. A checkpoint of a known layout gets
other tensors, another ``config.json`` or other bytes. Reading it must end within seconds, raise nothing but
`InputError`, run no code, and whatever is read must be a block that can be built.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from diffdeploy.checkpoints import CheckpointOptions, list_layers, read_checkpoint, summarise
from diffdeploy.checkpoints.layouts import LAYOUTS
from diffdeploy.errors import InputError
from diffdeploy.modules import block_class
from tests.support.fuzzing import fuzzed, limited_time

_LONGEST_SENTENCE = 1200

OPTIONS = [
    CheckpointOptions(),
    CheckpointOptions(depth=1, rope="half", rope_theta=100.0, gqa_layout="canonical"),
    CheckpointOptions(layer=0, depth=0, rope="none", gqa_layout="legacy", causal=False),
    *(CheckpointOptions(layout=name, depth=2, rope="none", gqa_layout="canonical", causal=True) for name in LAYOUTS),
]

ROWS = {"q_proj.weight": (32, 32), "k_proj.weight": (16, 32), "v_proj.weight": (16, 32)}
VECTORS = {f"lambda_{name}": (4,) for name in ("q1", "k1", "q2", "k2")}
# D 32, h 4, h_kv 2 (4 where all are in one matrix), d 4.
STATES: dict[str, dict[str, tuple[int, ...]]] = {
    "microsoft": {**ROWS, **VECTORS, "out_proj.weight": (32, 32), "subln.weight": (8,)},
    "microsoft-v2": {**ROWS, "o_proj.weight": (32, 16), "lambda_proj.weight": (4, 32)},
    "motif": {**ROWS, **VECTORS, "o_proj.weight": (32, 32), "subln.weight": (8,)},
    "diffllama": {**ROWS, **VECTORS, "o_proj.weight": (32, 32)},
    "timm": {**VECTORS, "qkv.weight": (96, 32), "proj.weight": (32, 32), "sub_norm.weight": (8,)},
    "timm-dual": {"lambda_a": (), "lambda_b": (), "qkv.weight": (96, 32), "proj.weight": (32, 32)},
    "diffclip": {**VECTORS, "diff_norm.weight": (8,), **{f"{n}_proj.weight": (32, 32) for n in ("q", "k", "v", "out")}},
    "axolotl": {**ROWS, **VECTORS, "o_proj.weight": (32, 32), "subln.weight": (8,), "lambda_init": ()},
    "replay": {
        **{f"W_{n}.weight": (32, 32) for n in "qkvo"},
        **dict.fromkeys(VECTORS, (4, 4)),
        "rms_scale": (8,),
        "scaling": (),
    },
    "blagpt-v2": {
        "q_proj.weight": (32, 32),
        "kv_proj.weight": (16, 32),
        "c_proj.weight": (32, 16),
        "lambda_proj.weight": (4, 32),
        "q_norm.weight": (4,),
        "k_norm.weight": (4,),
    },
    "stable-audio": {
        "to_qkv.weight": (160, 32),
        "to_out.weight": (32, 32),
        "q_norm.weight": (32,),
        "k_norm.weight": (32,),
    },
    "phi4flash": {**VECTORS, "Wqkv.weight": (64, 32), "Wqkv.bias": (64,), "out_proj.weight": (32, 32)},
}
FIELDS = [
    *("model_type", "architectures", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "depth"),
    *("num_hidden_layers", "rope_theta", "rope_scaling", "rope_parameters", "rope", "partial_rotary_factor", "causal"),
    *("is_causal", "sliding_window", "use_sliding_window", "window_size", "lambda_init", "rms_norm_eps", "norm_eps"),
    *("attn_rms_norm_eps", "layer_norm_eps", "attention_bias", "use_bias", "qkv_bias", "gqa_layout", "layer_types"),
    *(
        "num_noise_heads",
        "k_ratio",
        "split_heads",
        "sublayer_norm",
        "max_position_embeddings",
        "quantization_config",
        "mb_per_layer",
        "version",
        "dtype",
    ),
]
ROPE_FIELDS = ["rope_type", "type", "factor", "rope_theta", "style", "theta", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings", "partial_rotary_factor", "attention_factor"]  # fmt: skip
NAMES = [*FIELDS, "weight_map", *(name for state in STATES.values() for name in state)]

numbers = st.one_of(
    st.integers(), st.integers(-3, 40), st.floats(), st.sampled_from([10**400, 1e308, 1e-320, -1, 0, 4, 8, 32, 1e-5])
)
words = st.one_of(st.sampled_from([*LAYOUTS, *NAMES, "linear", "llama3", "yarn", "default", "half"]), st.text())
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=12
)
ropes = st.dictionaries(st.sampled_from(ROPE_FIELDS), st.one_of(numbers, words, anything), max_size=6)
configs = st.dictionaries(st.one_of(st.sampled_from(FIELDS), words), st.one_of(anything, ropes), max_size=12)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn]
shapes = st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 32, 33, 64]), max_size=4).map(tuple)
fills = st.sampled_from([0.1, 0.0, float("nan"), float("inf"), 1e38, -3.0])
tensors = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype), shapes, st.sampled_from(DTYPES), fills
)
PREFIXES = ["", "a.", "model.layers.0.self_attn.", "layers.1.0.attn.", "stages.0.blocks.1.attn.", "0.", "x" * 300 + "."]


@st.composite
def states(draw: st.DrawFn) -> dict[str, Tensor]:
    """A block or several, of one or more layouts, with tensors that are missing, added, renamed or replaced."""
    state: dict[str, Tensor] = {}
    for prefix in draw(st.lists(st.sampled_from(PREFIXES), min_size=1, max_size=3, unique=True)):
        layout = draw(st.sampled_from(sorted(STATES)))
        own = {name: torch.full(shape, 0.1) for name, shape in STATES[layout].items()}
        for _ in range(draw(st.integers(0, 3))):
            name = draw(st.sampled_from(sorted(own)))
            match draw(st.sampled_from(["drop", "replace", "rename", "add", "bias", "transpose"])):
                case "drop" if len(own) > 1:
                    del own[name]
                case "rename":
                    own[draw(words)] = own.pop(name)
                case "add":
                    own[draw(words)] = draw(tensors)
                case "bias":
                    own[name.replace("weight", "bias")] = torch.full(own[name].shape[:1], 0.1)
                case "transpose" if own[name].ndim == 2:
                    own[name] = own[name].T.contiguous()
                case _:
                    own[name] = draw(tensors)
        state |= {prefix + name: tensor for name, tensor in own.items()}
    return state


def read_or_refuse(path: Path, options: CheckpointOptions) -> None:
    """Everything that commands do with a checkpoint before they export it."""

    def build() -> None:
        found = read_checkpoint(path, options)
        shapes = found.config.weight_shapes()
        assert {name: tuple(tensor.shape) for name, tensor in found.weights.items()} == shapes
        assert all(torch.isfinite(tensor).all() for tensor in found.weights.values())
        block_class(found.config).from_weights(found.config, found.weights, max_positions=4)

    actions: list[Callable[[], object]] = [
        lambda: list_layers(path, options.layout), lambda: summarise(path, options.layout), build
    ]  # fmt: skip
    for action in actions:
        with limited_time():
            try:
                action()
            except InputError as error:
                sentence = str(error)
                assert sentence
                assert len(sentence) <= _LONGEST_SENTENCE
                assert "\n" not in sentence


def store(folder: Path, state: dict[str, Tensor], name: str) -> Path:
    path = folder / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@fuzzed
@given(
    state=states(),
    config=st.one_of(st.none(), configs),
    name=st.sampled_from(["model.safetensors", "weights.pt"]),
    options=st.sampled_from(OPTIONS),
)
def test_tensors_and_fields(
    state: dict[str, Tensor], config: dict[str, Any] | None, name: str, options: CheckpointOptions
) -> None:
    with TemporaryDirectory() as folder:
        # A surrogate cannot be a name in a file of safetensors.
        state = {key.encode(errors="replace").decode(): tensor for key, tensor in state.items()}
        path = store(Path(folder), state, name)
        if config is not None:
            (Path(folder) / "config.json").write_text(json.dumps(config))
        read_or_refuse(path, options)
        read_or_refuse(Path(folder), options)


@fuzzed
@given(
    layout=st.sampled_from(sorted(STATES)),
    name=st.sampled_from(["model.safetensors", "weights.pt"]),
    cuts=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 40), st.binary(max_size=40)), min_size=1, max_size=4),
)
def test_bytes(layout: str, name: str, cuts: list[tuple[int, int, bytes]]) -> None:
    """Bytes are left out and put in, near the beginning, where headers and names are, more often than elsewhere."""
    with TemporaryDirectory() as folder:
        state = {"layers.0." + key: torch.full(shape, 0.1) for key, shape in STATES[layout].items()}
        path = store(Path(folder), state, name)
        content = path.read_bytes()
        for start, length, new in cuts:
            content = content[:start] + new + content[start + length :]
        path.write_bytes(content)
        read_or_refuse(path, CheckpointOptions(depth=0, rope="none", gqa_layout="canonical"))


@fuzzed
@given(
    index=st.one_of(anything, st.dictionaries(st.just("weight_map"), anything, min_size=1)),
    kind=st.sampled_from(["model.safetensors.index.json", "pytorch_model.bin.index.json"]),
)
def test_indices(index: Any, kind: str) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / kind).write_text(json.dumps(index))
        read_or_refuse(Path(folder), CheckpointOptions())


class _Call:
    """What a pickle would call when it is loaded."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


@fuzzed
@given(depth=st.integers(0, 3), protocol=st.integers(0, 5), how=st.sampled_from(["open", "exec", "mkdir"]))
def test_no_pickle_runs_code(depth: int, protocol: int, how: str) -> None:
    with TemporaryDirectory() as folder:
        mark = Path(folder) / "ran"
        call = {
            "open": _Call(open, str(mark), "w"),
            "exec": _Call(exec, f"import pathlib; pathlib.Path({str(mark)!r}).touch()"),
            "mkdir": _Call(os.mkdir, str(mark)),
        }[how]
        content: object = {"lambda_q1": call}
        for _ in range(depth):
            content = {"model": content}
        path = Path(folder) / "weights.pt"
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        read_or_refuse(path, CheckpointOptions())
        torch.save(content, path)
        read_or_refuse(path, CheckpointOptions())
        assert not mark.exists()


def test_the_sample_reads_what_is_right() -> None:
    """Were every file refused, these tests would show nothing."""
    with TemporaryDirectory() as folder:
        state = {key: torch.full(shape, 0.1) for key, shape in STATES["microsoft"].items()}
        path = store(Path(folder), state, "model.safetensors")
        assert read_checkpoint(path, OPTIONS[1]).config.num_heads == 4
        with pytest.raises(InputError):
            read_checkpoint(path)
