"""Bundles under transformers' ``generate()``: token for token what transformers' own model gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, pipeline
from transformers.cache_utils import DynamicCache

from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.errors import InputError
from diffdeploy.exporters import ExportOptions, export_bundle
from diffdeploy.integrations.transformers import DiffDeployForCausalLM
from tests.support.bundles import SMALL_MODEL, BundleCache

IDS = torch.randint(8, 96, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
NEW: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "attention_mask": MASK}


@pytest.fixture(scope="module")
def pair(llama_pair: tuple[Path, Any]) -> tuple[Any, Any]:
    """A bundle, and the model of transformers that it was made from."""
    return DiffDeployForCausalLM.from_pretrained(llama_pair[0]), llama_pair[1]


def again(llama_pair: tuple[Path, Any], output: Path, **options: Any) -> Path:
    """The model of the pair as another bundle."""
    sizes = {"graph": "model", "max_batch_size": 6, "max_sequence_length": 48}
    found = read_model(llama_pair[0].parent / "checkpoint")
    return export_bundle(found, output, ExportOptions(**{**sizes, **options}), verify=False).path


@pytest.fixture(scope="module")
def writer(bundles: BundleCache) -> tuple[Any, Any]:
    """The bundle of the sample, and the tokenizer in it."""
    path = bundles.bundle(read_model(SAMPLE), SMALL_MODEL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), padding_side="left", pad_token="!")
    return DiffDeployForCausalLM.from_bundle(path), tokenizer


def same(pair: tuple[Any, Any], ids: torch.Tensor, **options: Any) -> bool:
    found = []
    for model in pair:
        torch.manual_seed(3)
        found.append(model.generate(ids, **options))
    return torch.equal(*found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"use_cache": False},
        {"guidance_scale": 1.5},
    ],
    ids=["greedy", "beams", "sampled-beams", "sampled", "processors", "no-cache", "guidance"],
)
def test_a_left_padded_batch_gets_the_tokens_of_transformers(options: dict[str, Any], pair: tuple[Any, Any]) -> None:
    assert same(pair, IDS, **NEW, **options)


def test_assistants_change_no_token(pair: tuple[Any, Any]) -> None:
    bundle, model = pair
    options = {**NEW, "attention_mask": None}
    expected = model.generate(IDS[1:], **options)
    for target, assistant in ((bundle, model), (bundle, bundle), (model, bundle)):
        assert torch.equal(target.generate(IDS[1:], assistant_model=assistant, **options), expected)
    # With proposals that are refused, after which the cache is cropped.
    assert same(pair, IDS[1:].repeat(1, 2), prompt_lookup_num_tokens=3, **{**options, "eos_token_id": 1})


def test_the_model_ends_where_its_checkpoint_says(pair: tuple[Any, Any]) -> None:
    bundle, model = pair
    assert bundle.generation_config.eos_token_id == bundle.config.eos_token_id == 7
    written = model.generate(IDS[1:], max_new_tokens=12, eos_token_id=None)[0, 9:]
    # A token that is written ends the row where it first is.
    end = int(written[5])
    assert same(pair, IDS, **{**NEW, "eos_token_id": end})


def test_caches_are_handed_on_as_transformers_does(pair: tuple[Any, Any]) -> None:
    whole = pair[0](IDS, MASK).logits
    cache = DynamicCache()
    parts = [pair[0](IDS[:, a:b], MASK[:, :b], past_key_values=cache).logits for a, b in ((0, 4), (4, 5), (5, 9))]
    assert cache.get_seq_length() == 9
    # What padding gives is nobody's.
    torch.testing.assert_close(torch.cat(parts, 1)[MASK == 1], whole[MASK == 1], rtol=0, atol=1e-4)
    torch.testing.assert_close(whole[MASK == 1], pair[1](IDS, MASK).logits[MASK == 1].detach(), rtol=0, atol=1e-4)
    assert pair[0](IDS, use_cache=True, return_dict=False)[1].get_seq_length() == 9
    assert torch.equal(pair[0](IDS, MASK, logits_to_keep=2).logits, whole[:, -2:])


def test_a_cache_has_two_names_and_no_third(pair: tuple[Any, Any]) -> None:
    """transformers 5.24 renamed it; by a name that is not known it would be ignored, and tokens would be others."""
    first, second = DynamicCache(config=pair[0].config), DynamicCache(config=pair[0].config)
    for end in (4, 9):
        rest = slice(0 if end == 4 else 4, end)
        logits = pair[0](IDS[:, rest], MASK[:, :end], past_key_values=first).logits
        assert torch.equal(logits, pair[0](IDS[:, rest], MASK[:, :end], cache=second).logits)
    with pytest.raises(InputError, match="kept is a cache by another name; accepted: past_key_values, cache"):
        pair[0](IDS, MASK, kept=first)


def test_pipelines_and_streamers_write_text(writer: tuple[Any, Any]) -> None:
    model, tokenizer = writer
    written = pipeline("text-generation", model=model, tokenizer=tokenizer, device=model.device)
    alone = written("def main(", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    assert alone.startswith("def main(self")
    batch = written(["def main(", "import numpy as"], max_new_tokens=20, do_sample=False, batch_size=2)
    assert batch[0][0]["generated_text"] == alone
    given = tokenizer("def main(", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(given.input_ids, max_new_tokens=20, streamer=streamer)
    assert "".join(streamer) == alone.removeprefix("def main(")


def test_tokens_are_those_of_the_runtime(writer: tuple[Any, Any]) -> None:
    model, tokenizer = writer
    ids = tokenizer("import os", return_tensors="pt").input_ids
    assert torch.equal(model.generate(ids, max_new_tokens=20), model.runtime.generate(ids, max_new_tokens=20))
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "the cache is a StaticCache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is not an input or output"),
        ({"max_new_tokens": 60}, "accepted: 1 to 48"),
        ({"num_beams": 4}, "batch_size of input_ids is 8; accepted: 1 to 6"),
    ],
)
def test_what_a_bundle_cannot_do_is_refused(options: dict[str, Any], message: str, pair: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match=message):
        pair[0].generate(IDS, **{**NEW, **options})


def test_other_refusals(pair: tuple[Any, Any], sample_bundle: Path) -> None:
    with pytest.raises(InputError, match="holds a block"):
        DiffDeployForCausalLM.from_bundle(sample_bundle)
    with pytest.raises(InputError, match="torch_dtype is not accepted for a bundle; accepted: device"):
        DiffDeployForCausalLM.from_pretrained(sample_bundle, torch_dtype="auto")
    with pytest.raises(InputError, match="saved by copying its directory"):
        pair[0].save_pretrained("elsewhere")
    with pytest.raises(InputError, match="inputs_embeds is not an input or output"):
        pair[0](inputs_embeds=torch.zeros(1, 2, 64))
    with pytest.raises(InputError, match="input_ids is missing"):
        pair[0]()


@pytest.mark.slow
def test_logits_of_the_last_position_are_enough_but_for_assistants(
    llama_pair: tuple[Path, Any], tmp_path: Path
) -> None:
    bundle = DiffDeployForCausalLM.from_bundle(again(llama_pair, tmp_path / "last", logits="last"))
    assert same((bundle, llama_pair[1]), IDS, num_beams=2, **NEW)
    with pytest.raises(InputError, match="export with --logits all"):
        bundle.generate(IDS[1:].repeat(1, 2), prompt_lookup_num_tokens=3, max_new_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pt2", "aoti", "compile"])
def test_every_format(name: str, llama_pair: tuple[Path, Any], tmp_path: Path) -> None:
    bundle = DiffDeployForCausalLM.from_bundle(again(llama_pair, tmp_path / name, format=name), trust=True)
    model = llama_pair[1]
    for options in ({}, {"num_beams": 3}, {"do_sample": True}):
        assert same((bundle, model), IDS, **NEW, **options)
    expected = model.generate(IDS[1:], max_new_tokens=12, eos_token_id=None)
    assert torch.equal(bundle.generate(IDS[1:], assistant_model=model, max_new_tokens=12, eos_token_id=None), expected)
