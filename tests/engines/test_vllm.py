"""vLLM itself, with the plugin as it is installed: log-probabilities and tokens are those of the fp64 formula."""

import http.client
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffdeploy.checkpoints import ModelCheckpoint, read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main
from diffdeploy.config import MlpConfig
from diffdeploy.engines import EngineRequest, EngineRound, Subject
from diffdeploy.engines.verification import verify_engine
from diffdeploy.engines.vllm import VllmEngine, _cause, register
from diffdeploy.errors import InputError
from diffdeploy.exporters import convert_model
from tests.checkpoints.test_whole_models import diffllama
from tests.exporters.test_convert import HALF, INTERLEAVED, expected_logits, in_memory, paper


def test_the_plugin_keeps_out_of_versions_that_were_not_tested(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(VllmEngine, "tested", {})
    monkeypatch.setattr(VllmEngine, "distributions", ("torch",))
    with caplog.at_level(logging.WARNING, "vllm.diffdeploy"):
        register()  # other models are served as ever
    assert "DiffLlama is not registered: vllm" in caplog.text


def test_the_cause_is_the_first_error_of_a_log() -> None:
    log = [
        "(EngineCore pid=7) INFO 11-26 03:28:48 [core.py:133] Initializing, kv_cache_dtype=auto",
        "(EngineCore pid=7) ERROR 11-26 03:28:49 [core.py:1510] AssertionError: Not enough allowed NUMA nodes.",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert _cause(log) == "AssertionError: Not enough allowed NUMA nodes."
    assert _cause(["Killed"]) == "Killed"
    assert _cause([]) == "it wrote no message"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "sample"
    convert_model(read_model(SAMPLE), directory)
    return directory


class Recorded(VllmEngine):
    """vLLM; what it answers is kept for tests that judge it again."""

    def __init__(self) -> None:
        self.answers: dict[int, list[EngineRound]] = {}

    def run(self, request: EngineRequest) -> list[EngineRound]:
        ranks = request.tensor_parallel_size
        if ranks not in self.answers:
            self.answers[ranks] = super().run(request)
        return self.answers[ranks]


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded()


@pytest.mark.engines
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_in_chunks_and_from_the_prefix_cache(
    ranks: int,
    converted: Path,
    recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("diffdeploy.engines.require_engine", lambda name: recorded)
    arguments = ["verify", str(converted), "--engine", "vllm", "--tensor-parallel-size", str(ranks), "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)["verification"]
    assert [case["group"] for case in result["cases"]] == ["batched"] * 3 + ["cached prefix"] * 3
    assert result["tensor_parallel_size"] == ranks
    assert result["num_tokens_checked"] == result["num_tokens"] == 144
    # One block of the longest prompt, in the second round.
    assert result["num_cached_tokens"] == 32
    assert result["worst"]["budget_used"] < 0.6


@pytest.mark.engines
@pytest.mark.parametrize("name", ["lambda_q1", "q_proj.weight", "out_proj.weight"])
def test_an_answer_of_other_weights_fails(name: str, converted: Path, recorded: Recorded) -> None:
    class Other(Recorded):
        def open(self, path: Path) -> Subject:
            subject = super().open(path)
            weights = {key: subject.weights[key].clone() for key in subject.weights}
            weights[f"layers.2.self_attn.{name}"] *= 1.01
            return Subject(config=subject.config, weights=weights, dtype=subject.dtype, max_length=subject.max_length)

    other = Other()
    other.answers = recorded.answers
    assert recorded.answers, "runs behind the tests that ask vLLM"
    assert not verify_engine(converted, other).passed


MODELS: dict[str, dict[str, Any]] = {
    "biases-tied": {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 2},
    "yarn": {
        "num_key_value_heads": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 0.9,
        },
    },
}


@pytest.mark.engines
@pytest.mark.parametrize(("name", "ranks"), [("biases-tied", 2), ("yarn", 1)])
def test_checkpoints_of_transformers_in_half_precision(name: str, ranks: int, tmp_path: Path) -> None:
    # On two ranks, each has a copy of the one pair of keys and values.
    model, _, _ = diffllama(tmp_path / "float32", head_dim=16, **MODELS[name])
    model.bfloat16().save_pretrained(tmp_path / "bfloat16")
    report = verify_engine(tmp_path / "bfloat16", VllmEngine(), tensor_parallel_size=ranks)
    assert report.dtype == "bfloat16"
    assert report.passed, report.worst
    assert report.num_tokens_checked > 0


def quantised(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Projections in 4 bits as GPTQ stores them, in groups of 32 inputs; and what they stand for."""
    packed, plain = {}, {}
    for key, tensor in state.items():
        if "_proj.weight" not in key:
            packed[key] = plain[key] = tensor.bfloat16()
            continue
        outputs, inputs = tensor.shape
        groups = tensor.float().reshape(outputs, inputs // 32, 32)
        # Powers of 2, so that bfloat16 holds every product.
        scales = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True) / 7)))
        numbers = torch.clamp(torch.round(groups / scales) + 8, 0, 15)
        plain[key] = ((numbers - 8) * scales).reshape(outputs, inputs).bfloat16()
        by_eights = numbers.reshape(outputs, inputs // 8, 8).to(torch.int64) << torch.arange(0, 32, 4)
        base = key.removesuffix("weight")
        packed[f"{base}qweight"] = by_eights.sum(-1).to(torch.int32).T.contiguous()
        packed[f"{base}scales"] = scales.squeeze(-1).T.contiguous().bfloat16()
        # Each eight of them 7: GPTQ stores one less.
        packed[f"{base}qzeros"] = torch.full((inputs // 32, outputs // 8), 0x77777777, dtype=torch.int32)
        packed[f"{base}g_idx"] = torch.arange(inputs, dtype=torch.int32) // 32
    return packed, plain


@pytest.mark.engines
@pytest.mark.parametrize("ranks", [1, 2])
def test_quantised_weights(ranks: int, tmp_path: Path) -> None:
    config = paper(rope=HALF, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp=MlpConfig(hidden_dim=128))
    convert_model(in_memory(config), tmp_path / "source")
    packed, plain = quantised(load_file(tmp_path / "source" / "model.safetensors"))
    fields = json.loads((tmp_path / "source" / "config.json").read_text()) | {"dtype": "bfloat16"}
    method = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    for name, state, more in (("packed", packed, {"quantization_config": method}), ("plain", plain, {})):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps(fields | more))

    class Quantised(VllmEngine):
        def run(self, request: EngineRequest) -> list[EngineRound]:
            return super().run(request.model_copy(update={"model": str(tmp_path / "packed")}))

    report = verify_engine(tmp_path / "plain", Quantised(), tensor_parallel_size=ranks)
    assert report.passed, report.worst


@pytest.mark.engines
def test_models_that_it_cannot_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_model(in_memory(paper(rope=INTERLEAVED)), tmp_path / "narrow")
    with pytest.raises(
        InputError, match=r"has streams of width 6, so heads of 12 in vLLM's cache, .* kernels for 32, "
    ):
        verify_engine(tmp_path / "narrow", VllmEngine())
    assert main(["verify", str(tmp_path / "narrow"), "--engine", "vllm", "--tensor-parallel-size", "3"]) == 2
    assert "accepted: divisors of 4, the heads of the model" in capsys.readouterr().err


REFUSED = """
from types import SimpleNamespace
from torch import zeros
from diffdeploy.engines.vllm_model import DiffLlamaForCausalLM, _side_by_side

def said(call):
    try:
        call()
    except ValueError as error:
        return str(error)

print(said(lambda: DiffLlamaForCausalLM(vllm_config=SimpleNamespace(lora_config=object()))))
print(said(lambda: _side_by_side("q_proj.weight_scale_inv", zeros(4, 2), 0, 8)))
print(_side_by_side("q_proj.g_idx", zeros(6), None, 4).shape[0])
"""


@pytest.mark.engines
def test_what_would_be_wrong_in_silence_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True)
    adapters, scales, unordered = done.stdout.splitlines()[-3:]
    assert adapters.startswith("LoRA adapters were requested")
    assert "its outputs cannot be separated into 8 streams" in scales
    assert unordered == "6"


@contextmanager
def server(model: Path, log: Path) -> Iterator[int]:
    """OpenAI's interface on a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    options = {"--port": port, "--served-model-name": "sample", "--dtype": "float32", "--max-model-len": 128}
    command += [str(part) for option in options.items() for part in option]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen([*command, "--enforce-eager"], stdout=stream, stderr=stream, env=environment)
        try:
            deadline = time.monotonic() + 300
            while not answers(port):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1.0)
            yield port
        finally:
            process.terminate()
            process.wait(60)


def answers(port: int) -> bool:
    try:
        return call(port, "GET", "/health")[0] == 200
    except OSError:
        return False


def call(port: int, method: str, path: str, fields: dict[str, Any] | None = None) -> tuple[int, bytes]:
    body = None if fields is None else json.dumps(fields)
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def greedy(found: ModelCheckpoint, prompt: bytes, count: int) -> bytes:
    """By the formula of the tests."""
    text = prompt
    for _ in range(count):
        logits = expected_logits(found, np.frombuffer(text, np.uint8).astype(np.int64))[-1]
        second, first = np.sort(logits)[-2:]
        assert first - second > 1e-3, "no text that rounding could change"
        text += bytes([int(logits.argmax())])
    return text[len(prompt) :]


@pytest.mark.engines
def test_the_server_of_openais_interface(converted: Path, tmp_path: Path) -> None:
    prompts = (b"def main(", b"class Foo:\n    def ", b"import ")
    told: dict[bytes, Any] = {}

    def ask(port: int, prompt: bytes) -> None:
        fields = {"model": "sample", "prompt": prompt.decode(), "max_tokens": 8, "temperature": 0}
        told[prompt] = call(port, "POST", "/v1/completions", fields)

    with server(converted, tmp_path / "log") as port:
        threads = [threading.Thread(target=ask, args=(port, prompt)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = read_model(SAMPLE)
    for prompt in prompts:
        status, body = told[prompt]
        assert status == 200, body
        assert json.loads(body)["choices"][0]["text"].encode() == greedy(found, prompt, 8)
