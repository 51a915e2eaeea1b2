"""Verification of an engine: its log-probabilities and greedy tokens against the fp64 formula."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from diffdeploy.arrays import Array, ArrayView, to_array
from diffdeploy.bundle import Environment, cast_weights
from diffdeploy.engines.base import Engine, EngineRequest, EngineRow, Subject, log_softmax
from diffdeploy.errors import InputError
from diffdeploy.graphs import DType, GraphSpec, graph_spec
from diffdeploy.records import Record
from diffdeploy.verify import CaseReport, OutputReport
from diffdeploy.verify.decoder import exact_ways, logits_of
from diffdeploy.verify.greedy import wrong_tokens
from diffdeploy.verify.metrics import Yardstick, measure
from diffdeploy.verify.values import prompt_inputs

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EngineReport", "verify_engine"]

# Lengths of the prompts in one batch: below an engine's chunk size, above it, and above a block of its cache.
_PROMPTS = (3, 21, 41)
_NEW_TOKENS, _LOGPROBS = 24, 8


class EngineReport(Record):
    """The verdict on an engine with a model.

    Attributes:
        schema_version: version of this record.
        engine: name of the engine.
        version: version of the engine.
        model: directory of the model.
        dtype: dtype in which it computed.
        tensor_parallel_size: number of ranks that shared each layer.
        seed: random seed for the prompts.
        environment: versions of the software that verified it.
        cases: log-probabilities and tokens of each prompt in each round.
        num_tokens: number of greedy tokens that were generated.
        num_tokens_checked: number of those whose exact margin exceeds twice the allowed error of a log-probability.
        num_cached_tokens: number of prompt tokens that came from the engine's prefix cache.
    """

    schema_version: Literal[1] = 1
    engine: str
    version: str | None
    model: str
    dtype: DType
    tensor_parallel_size: int
    seed: int
    environment: Environment
    cases: list[CaseReport]
    num_tokens: int
    num_tokens_checked: int
    num_cached_tokens: int

    @property
    def passed(self) -> bool:
        """True if every case passed, and there was at least one."""
        return bool(self.cases) and all(case.passed for case in self.cases)

    @property
    def worst(self) -> CaseReport | None:
        """A failed case without figures if there is one, else the case that used the largest share of its budget."""
        return max(self.cases, key=lambda case: case.severity, default=None)


def verify_engine(
    path: Path,
    engine: Engine,
    *,
    tensor_parallel_size: int = 1,
    seed: int = 0,
    phase: Callable[[str], None] = lambda _: None,
) -> EngineReport:
    """Let an engine continue prompts of random tokens, and compare its answers with the formula in fp64.

    The error of a log-probability is limited by the budget of the dtype, like that of any output of an artifact. A
    token must be the most probable one in the exact result wherever its margin over the second most probable one
    exceeds the allowed errors of both together.

    Args:
        path: directory with the model.
        engine: engine to verify.
        tensor_parallel_size: number of ranks that share each layer.
        seed: random seed for the prompts.
        phase: callback that receives a few words when a phase begins.

    Raises:
        InputError: the engine cannot run the model.
        UnavailableError: the engine is not installed, or its version was not tested.
        DiffDeployError: the engine failed.
    """
    engine.require_usable()
    subject = engine.open(path)
    request = _request(path, subject, tensor_parallel_size, seed)
    phase(f"running {engine.name}")
    rounds = engine.run(request)
    phase("comparing with the formula")
    truth = _Truth(subject)
    cases, checked = [], 0
    for each in rounds:
        for number, (prompt, row) in enumerate(zip(request.prompts, each.rows, strict=True)):
            outputs, num_clear = _judge(prompt, row, truth, request)
            cases.append(CaseReport.of(f"{each.name.replace(' ', '-')}-{number}-P{len(prompt)}", each.name, outputs))
            checked += num_clear
    rows = [row for each in rounds for row in each.rows]
    return EngineReport(
        engine=engine.name,
        version=engine.version,
        model=str(path),
        dtype=subject.dtype,
        tensor_parallel_size=tensor_parallel_size,
        seed=seed,
        environment=Environment.current((*engine.distributions, "torch", "numpy", "transformers")),
        cases=cases,
        num_tokens=sum(len(row.tokens) for row in rows),
        num_tokens_checked=checked,
        num_cached_tokens=sum(row.num_cached_tokens for row in rows),
    )


def _request(path: Path, subject: Subject, tensor_parallel_size: int, seed: int) -> EngineRequest:
    longest = min(subject.max_length, max(_PROMPTS) + _NEW_TOKENS)
    if longest <= min(_PROMPTS):
        raise InputError(f"{path} supports sequences of {longest} tokens, too few to verify an engine with")
    new_tokens = min(_NEW_TOKENS, longest // 2)
    generator, vocab_size = np.random.default_rng(seed), subject.config.vocab_size
    tokens = np.delete(np.arange(vocab_size), [] if subject.padding is None else [subject.padding])
    lengths = [max(1, min(length, longest - new_tokens)) for length in _PROMPTS]
    return EngineRequest(
        model=str(path),
        dtype=subject.dtype,
        prompts=[tokens[generator.integers(0, len(tokens), length)].tolist() for length in lengths],
        max_new_tokens=new_tokens,
        num_logprobs=min(_LOGPROBS, vocab_size),
        max_length=longest,
        tensor_parallel_size=tensor_parallel_size,
    )


class _Known(NamedTuple):
    """Log-probabilities ``[S, V]`` of a sequence, float64.

    exact: by the formula with float activations.
    stored: by the formula with streams that are rounded to the dtype.
    eager: of the eager model.
    quantised: by the formula with quantised activations, if the engine quantises them.
    """

    exact: Array
    stored: Array
    eager: Array
    quantised: Array | None = None

    @property
    def expected(self) -> Array:
        """Those with which the engine is compared."""
        return self.exact if self.quantised is None else self.quantised


class _Truth:
    """Log-probabilities of a sequence: exact ones, and those of the eager model in the engine's dtype."""

    def __init__(self, subject: Subject) -> None:
        import torch

        from diffdeploy.modules import DiffTransformer

        self.dtype, self._config = subject.dtype, subject.config
        # The weights with which the engine computes, whose rounding is not an error of the engine.
        weights: Mapping[str, Tensor] = cast_weights(subject.weights, subject.dtype)
        self._weights = ArrayView(weights)
        self._spec: GraphSpec = graph_spec(
            "model", self._config, dtype=self.dtype, max_batch_size=2, max_sequence_length=subject.max_length
        )
        self._eager = DiffTransformer.from_weights(
            self._config,
            weights,
            impl="naive",
            dtype=getattr(torch, self.dtype),
            max_positions=max(_PROMPTS) + _NEW_TOKENS,
        )
        self._quantisation = subject.quantisation
        self._known: dict[tuple[int, ...], _Known] = {}

    def of(self, ids: list[int]) -> "_Known":
        """Compute the log-probabilities of a sequence."""
        key = tuple(ids)
        # The second round requests the same again.
        if key not in self._known:
            inputs = prompt_inputs(self._spec, np.array([ids]))
            ways = exact_ways(self._config, self._weights, inputs, self._spec, self.dtype, self._quantisation)
            _, *logits = logits_of(ways)
            exact, stored, *quantised = (log_softmax(each[0]) for each in logits if each is not None)
            self._known[key] = _Known(exact, stored, self._run(ids), *quantised)
        return self._known[key]

    def _run(self, ids: list[int]) -> Array:
        import torch

        with torch.no_grad():
            logits = to_array(self._eager(torch.tensor([ids])))
        return log_softmax(logits[0].astype(np.float64))


def _judge(prompt: list[int], row: EngineRow, truth: _Truth, request: EngineRequest) -> tuple[list[OutputReport], int]:
    """Judge one row, and count its tokens that could be checked."""
    if len(row.tokens) != request.max_new_tokens:
        reason = f"there are {len(row.tokens)} tokens, expected {request.max_new_tokens}"
        return [OutputReport.failed("tokens", reason)], 0
    known = truth.of([*prompt, *row.tokens])
    # The logits at a position are those of the next token.
    last = len(prompt) - 1
    reports = [_measured("log-probabilities", row.logprobs, last, known, truth.dtype)]
    if row.prompt_logprobs:
        reports.append(_measured("log-probabilities of the prompt", row.prompt_logprobs, 0, known, truth.dtype))
    allowed = reports[0].allowed_max_error
    if allowed is None:  # without a figure, the case has already failed
        return reports, 0
    exact_NV = known.expected[last:-1]
    wrong, num_clear = wrong_tokens(exact_NV, np.array(row.tokens), allowed)
    if len(wrong):
        step = int(wrong[0])
        lost = exact_NV[step].max() - exact_NV[step, row.tokens[step]]
        reports.append(
            OutputReport.failed(
                "tokens",
                f"{len(wrong)} of {len(row.tokens)} are not the most probable ones; the first, new token {step}, is "
                f"{row.tokens[step]}, but {int(exact_NV[step].argmax())} is more probable by {lost:.3g}, and only "
                f"{2 * allowed:.3g} is allowed",
            )
        )
    return reports, num_clear


def _measured(name: str, steps: list[dict[int, float]], start: int, known: _Known, dtype: DType) -> OutputReport:
    """Judge the log-probabilities of several positions, from ``start`` on, by the criterion for outputs."""
    places = [(start + step, token) for step, numbers in enumerate(steps) for token in numbers]
    positions, tokens = (np.array(side, dtype=np.int64) for side in zip(*places, strict=True))
    actual = np.array([number for numbers in steps for number in numbers.values()])
    yardstick = Yardstick(known.exact[positions, tokens], dtype)
    yardstick.add(known.eager[positions, tokens].astype(dtype))
    yardstick.add_stored(known.stored[positions, tokens])
    if known.quantised is not None:
        yardstick = yardstick.with_quantised(known.quantised[positions, tokens])
    return measure(name, actual.astype(dtype), yardstick)
