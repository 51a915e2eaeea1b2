"""Conversations with one cache, and tokens as they come, against transformers on all tokens at once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import diffdeploy
from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.errors import InputError
from diffdeploy.runtime import eos_of
from tests.support.bundles import SMALL_MODEL, BundleCache

GENERATOR = torch.Generator().manual_seed(4)
TURNS = [torch.randint(8, 96, (2, size), generator=GENERATOR) for size in (6, 1, 5)]
NEW: dict[str, Any] = {"max_new_tokens": 7, "eos_token_id": None}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of a runtime computes."""
    found: list[int] = []
    original = diffdeploy.runtime.Runtime.__call__

    def counted(self: Any, **inputs: Any) -> Any:
        found.append(inputs["input_ids"].shape[1])
        return original(self, **inputs)

    monkeypatch.setattr("diffdeploy.runtime.Runtime.__call__", counted)
    return found


def test_turns_give_the_tokens_of_the_whole_conversation(llama_pair: tuple[Path, Any], calls: list[int]) -> None:
    path, model = llama_pair
    whole = torch.zeros((2, 0), dtype=torch.int64)
    with diffdeploy.load(path) as runtime:
        session = runtime.session()
        for turn in TURNS:
            whole = torch.cat((whole, turn), 1)
            expected = model.generate(whole, attention_mask=torch.ones_like(whole), **NEW)
            found = session.generate(turn, **NEW)
            assert torch.equal(found, expected[:, whole.shape[1] - turn.shape[1] :])
            whole = expected
        np.testing.assert_array_equal(session.tokens, whole)
    # A turn computes what is new and the last token before, which nothing has computed; then one after the other.
    assert calls == [6, *6 * [1], 1 + 1, *6 * [1], 1 + 5, *6 * [1]]


def test_padding_and_rows_that_ended_are_nothing_to_later_turns(llama_pair: tuple[Path, Any]) -> None:
    path, model = llama_pair
    first = model.generate(TURNS[0], **NEW)[:, 6:]
    # Row 0 ends after three tokens, and is filled.
    end = int(first[0, 2])
    assert end not in first[0, :2]
    assert end not in first[1]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with diffdeploy.load(path) as runtime:
        session = runtime.session()
        ended = session.generate(TURNS[0], **{**NEW, "eos_token_id": end, "pad_token_id": 5})
        assert ended[0, 6:].tolist() == [*first[0, :3].tolist(), 5, 5, 5, 5]
        found = session.generate(TURNS[2], mask, **NEW)
    for row, before in ((0, torch.cat((TURNS[0][0], first[0, :3]))), (1, torch.cat((TURNS[0][1], first[1])))):
        alone = torch.cat((before, TURNS[2][row][mask[row] == 1]))[None]
        assert torch.equal(model.generate(alone, **NEW)[0, alone.shape[1] :], found[row, 5:])


def test_a_refused_turn_leaves_no_trace(llama_pair: tuple[Path, Any]) -> None:
    path, model = llama_pair
    with diffdeploy.load(path) as runtime:
        session = runtime.session()
        assert session.tokens.shape == (0, 0)
        session.generate(TURNS[0], **NEW)
        for ids, options, message in (
            (TURNS[1][:1], {}, "the session has 2 rows, but input_ids has 1"),
            (
                TURNS[1],
                {"max_new_tokens": 36},
                "the prompt has 1 tokens after 13 earlier ones and 36 will follow; .* for 48 tokens",
            ),
            (TURNS[1] + 96, {}, "input_ids holds numbers from"),
            (TURNS[1][:, :0], {}, "the prompt is empty"),
            ([[1, 2]], {}, "input_ids is a list; accepted: a torch tensor or a numpy array"),
            (TURNS[1], {"attention_mask": torch.tensor([[2], [1]])}, "attention_mask holds numbers from 1 to 2"),
            (TURNS[1], {"min_new_tokens": -1}, "min_new_tokens is -1; accepted: 0 or more"),
            (TURNS[1], {"stop": ""}, "stop contains an empty text"),
            (TURNS[1], {"stop": "x"}, "has no tokenizer.json"),
        ):
            given: Any = ids
            with pytest.raises(InputError, match=message):
                session.generate(given, **{**NEW, **options})
        whole = torch.cat((model.generate(TURNS[0], **NEW), TURNS[1]), 1)
        assert torch.equal(session.generate(TURNS[1], **NEW), model.generate(whole, **NEW)[:, 13:])


def test_a_block_holds_no_conversation(sample_bundle: Path) -> None:
    with diffdeploy.load(sample_bundle) as runtime, pytest.raises(InputError, match="holds a block"):
        runtime.session()


def test_what_is_not_taken_is_not_computed(llama_pair: tuple[Path, Any], calls: list[int]) -> None:
    path, model = llama_pair
    with diffdeploy.load(path) as runtime:
        session = runtime.session()
        steps = session.stream(TURNS[0], **NEW)
        taken = [next(steps) for _ in range(3)]
        assert calls == [6, 1, 1]
        assert all(step.texts is None for step in taken)  # no tokenizer beside the checkpoint
        whole = torch.cat((torch.from_numpy(session.tokens), TURNS[1]), 1)
        assert whole.shape[1] == 6 + 3 + 1
        assert torch.equal(session.generate(TURNS[1], **NEW), model.generate(whole, **NEW)[:, 9:])


@pytest.fixture(scope="module")
def runtime(bundles: BundleCache) -> diffdeploy.runtime.Runtime:
    return diffdeploy.load(bundles.bundle(read_model(SAMPLE), SMALL_MODEL))


def prompt(*texts: bytes) -> np.ndarray[Any, Any]:
    return np.stack([np.frombuffer(text, np.uint8) for text in texts]).astype(np.int64)


def test_texts_come_with_their_tokens(runtime: diffdeploy.runtime.Runtime) -> None:
    ids = prompt(b"def main(", b"import os")
    tokens = runtime.generate(ids, max_new_tokens=20)[:, 9:]
    steps = list(runtime.stream(ids, max_new_tokens=20))
    np.testing.assert_array_equal(np.stack([step.tokens for step in steps], 1), tokens)
    texts = ["".join(parts) for parts in zip(*(step.texts or () for step in steps), strict=True)]
    assert texts == [bytes(row).decode() for row in tokens.tolist()]
    assert runtime.tokenizer.decode(tokens[0].tolist()) == texts[0]


@pytest.mark.parametrize("several", [False, True])
def test_a_stop_ends_a_row(several: bool, runtime: diffdeploy.runtime.Runtime) -> None:
    ids = prompt(b"def main(", b"import os")
    whole = [bytes(row).decode() for row in runtime.generate(ids, max_new_tokens=20)[:, 9:].tolist()]
    stop = ", s"
    assert stop in whole[0]
    assert stop not in whole[1]
    given = [stop, "\0"] if several else stop
    steps = list(runtime.stream(ids, max_new_tokens=20, stop=given))
    texts = ["".join(parts) for parts in zip(*(step.texts or () for step in steps), strict=True)]
    at = whole[0].index(stop)
    assert texts == [whole[0][:at], whole[1]]
    tokens = runtime.generate(ids, max_new_tokens=20, stop=given, pad_token_id=1)[:, 9:]
    # As with transformers' stop_strings, the tokens of the stop are there, and filling behind them.
    assert bytes(tokens[0].tolist()) == whole[0][: at + 3].encode() + b"\1" * (20 - at - 3)
    assert bytes(tokens[1].tolist()).decode() == whole[1]


def test_penalties_and_least_lengths_are_those_of_transformers(llama_pair: tuple[Path, Any]) -> None:
    path, model = llama_pair
    written = model.generate(TURNS[2], max_new_tokens=12, eos_token_id=None)[:, 5:]
    ends = [int(written[0, 1]), int(written[1, 2])]
    options: dict[str, Any] = {"repetition_penalty": 1.6, "min_new_tokens": 4, "eos_token_id": ends}
    expected = model.generate(TURNS[2], max_new_tokens=12, pad_token_id=0, **options)
    with diffdeploy.load(path) as runtime:
        found = runtime.generate(TURNS[2], max_new_tokens=12, pad_token_id=0, **options)
    assert torch.equal(found, expected)
    assert not torch.equal(found[:, 5:7], written[:, :2])


@pytest.mark.parametrize(
    ("files", "default", "expected"),
    [
        ({"generation_config.json": '{"eos_token_id": [5, 6]}', "config.json": '{"eos_token_id": 7}'}, None, (5, 6)),
        ({"generation_config.json": "{}", "config.json": '{"eos_token_id": 7}'}, "2 of a class", (7,)),
        ({"config.json": "{}"}, "2 of a class", (2,)),
        ({"config.json": '{"eos_token_id": null}'}, None, ()),
    ],
)
def test_the_end_of_texts_is_what_the_source_says(
    files: dict[str, str], default: str | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    provenance = SimpleNamespace(defaults={} if default is None else {"eos_token_id": default})
    bundle: Any = SimpleNamespace(path=tmp_path, manifest=SimpleNamespace(files=files, provenance=provenance))
    assert eos_of(bundle) == expected
    (tmp_path / "config.json").write_text('{"eos_token_id": "seven"}')
    if expected != (5, 6):
        with pytest.raises(InputError, match=r"config.json has no number or list of numbers for eos_token_id"):
            eos_of(bundle)


def test_a_batch_is_checked_before_its_cache_is_reserved(
    llama_pair: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of as many rows may be larger than the memory of the machine."""
    reserved: list[int] = []
    monkeypatch.setattr("diffdeploy.runtime.decoding.Decoding.reserve", lambda _, capacity: reserved.append(capacity))
    with diffdeploy.load(llama_pair[0]) as runtime:
        most = runtime.spec.axes["batch_size"].max
        rows = np.ones((most + 1, 2), np.int64)
        with pytest.raises(InputError, match=rf"batch_size of input_ids is {most + 1}; accepted: 1 to {most}"):
            runtime.generate(rows, max_new_tokens=1)
    assert reserved == []
