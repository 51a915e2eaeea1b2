"""The verification of engines, with an engine that is right or wrong on purpose; and the registry."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.engines import EngineRow, engine_names, require_engine
from diffdeploy.engines.verification import verify_engine
from diffdeploy.errors import InputError, UnavailableError
from tests.engines.toy_engine import ToyEngine


def test_a_right_engine_passes() -> None:
    report = verify_engine(SAMPLE, ToyEngine(read_model(SAMPLE)))
    assert report.passed
    assert [case.id for case in report.cases] == ["one-by-one-0-P3", "one-by-one-1-P21", "one-by-one-2-P40"]
    assert report.num_tokens == 72
    assert report.num_tokens_checked > 60
    assert report.worst is not None
    assert 0 < report.worst.severity < 0.6
    # Of other tokens.
    assert verify_engine(SAMPLE, ToyEngine(read_model(SAMPLE)), seed=7).passed


def streams_swapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "layers.1.self_attn.q_proj.weight"
    return {**weights, name: weights[name].reshape(4, 2, 16, 128).flip(1).reshape(128, 128)}


def lambda_of_another_layer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, "layers.3.self_attn.lambda_q1": weights["layers.2.self_attn.lambda_q1"]}


def one_value_row_in_half_precision(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "layers.0.self_attn.v_proj.weight"
    return {**weights, name: weights[name].bfloat16().float()}


@pytest.mark.parametrize("change", [streams_swapped, lambda_of_another_layer, one_value_row_in_half_precision])
def test_an_engine_with_other_weights_fails(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    report = verify_engine(SAMPLE, ToyEngine(read_model(SAMPLE), change))
    assert not report.passed
    assert report.worst is not None
    assert report.worst.severity > 1


def another_token(row: EngineRow) -> EngineRow:
    # The second choice at a place where the first is sure, with right probabilities.
    step = max(range(len(row.logprobs)), key=lambda n: max(row.logprobs[n].values()))
    second = sorted(row.logprobs[step], key=lambda token: -row.logprobs[step][token])[1]
    tokens = [*row.tokens[:step], second]
    return row.model_copy(update={"tokens": tokens + row.tokens[step + 1 :]})


def one_token_less(row: EngineRow) -> EngineRow:
    return row.model_copy(update={"tokens": row.tokens[:-1]})


def one_probability_off(row: EngineRow) -> EngineRow:
    first = {token: value + 1e-3 for token, value in row.prompt_logprobs[0].items()}
    return row.model_copy(update={"prompt_logprobs": [first, *row.prompt_logprobs[1:]]})


def no_number(row: EngineRow) -> EngineRow:
    first = dict.fromkeys(row.logprobs[0], float("nan"))
    return row.model_copy(update={"logprobs": [first, *row.logprobs[1:]]})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (another_token, "tokens"),
        (one_token_less, "there are 23 tokens, expected 24"),
        (one_probability_off, "the error of log-probabilities of the prompt is"),
        (no_number, "NaN differs from the exact result"),
    ],
)
def test_a_wrong_answer_fails(spoil: Callable[[EngineRow], EngineRow], reason: str) -> None:
    report = verify_engine(SAMPLE, ToyEngine(read_model(SAMPLE), spoil=spoil))
    failed = [output for case in report.cases for output in case.outputs if not output.passed]
    assert failed
    assert any(reason in output.failure for output in failed)


def test_versions_that_were_not_tested_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyEngine, "tested", {"0.1": "nowhere", "0.2": "nowhere"})
    installed = torch.__version__.partition("+")[0]
    with pytest.raises(UnavailableError, match=rf"^toy {installed} is installed, but .* tested with 0.1, 0.2; install"):
        verify_engine(SAMPLE, ToyEngine(read_model(SAMPLE)))
    monkeypatch.setattr(ToyEngine, "distributions", ("no-such-engine",))
    with pytest.raises(UnavailableError, match=r"^toy is not installed; pip install 'diffdeploy\[test\]'$"):
        verify_engine(Path("nowhere"), ToyEngine(read_model(SAMPLE)))


def test_every_row_of_the_registry_is_an_engine() -> None:
    for name in engine_names():
        engine = require_engine(name)
        assert engine.name == name
        assert engine.tested
    with pytest.raises(InputError, match="engine is 'trains'; accepted: genai, vllm"):
        require_engine("trains")
