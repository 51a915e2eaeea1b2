"""Text as its tokens come: joined it is the text of all tokens, and no character comes before it is whole."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.errors import InputError
from diffdeploy.runtime.text import RowText, TextDecoder, Tokenizer

CHARACTERS = "añ你🎉 "


def bundle_with(directory: Path, tokenizer: tokenizers.Tokenizer | None, vocab_size: int) -> Any:
    """What a tokenizer asks of a bundle."""
    directory.mkdir(exist_ok=True, parents=True)
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
    files = {} if tokenizer is None else {"tokenizer.json": None}
    values = SimpleNamespace(min=0, max=vocab_size - 1)
    graph = SimpleNamespace(inputs={"input_ids": SimpleNamespace(values=values)})
    return SimpleNamespace(path=directory, manifest=SimpleNamespace(files=files, graph=graph))


def bytewise() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(SAMPLE / "tokenizer.json"))


def llama_like() -> tokenizers.Tokenizer:
    """Words that begin with a space, single bytes for the rest, and a special token."""
    words = ["<unk>", "</s>", "\u2581", "\u2581def", "\u2581return", "a", "b", ".", "\u2581你"]
    vocab = {word: number for number, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    found = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    found.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    found.add_special_tokens(["</s>"])
    return found


# Tokens of several bytes that end one character and begin the next.
CHUNKS = [bytes(each) for each in ([0xBD, 0xA0, 0xE4], [0xA0, 0xF0], [0x9F, 0x8E], [0x89, 0x80, 0x80], [0xC3, 0xE4])]


def crossing() -> tokenizers.Tokenizer:
    """Every byte, and tokens that cross characters."""
    letters = {number: letter for letter, number in bytewise().get_vocab().items()}
    words = [*("".join(letters[byte] for byte in chunk) for chunk in CHUNKS), *(letters[byte] for byte in range(256))]
    found = tokenizers.Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    found.decoder = decoders.ByteLevel()
    return found


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(bundle_with(tmp_path_factory.mktemp("crossed"), crossing(), 300))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(bundle_with(tmp_path_factory.mktemp("sample"), bytewise(), 256))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(bundle_with(tmp_path_factory.mktemp("llama"), llama_like(), 300))


def test_each_character_comes_with_its_last_byte(sample: Tokenizer) -> None:
    decoder = TextDecoder(sample)
    found = [decoder.add(byte) for byte in CHARACTERS.encode()]
    assert found == ["a", "", "ñ", "", "", "你", "", "", "", "🎉", " "]
    assert decoder.rest() == ""
    # The first byte of two is all that comes.
    assert [decoder.add(0xC3), decoder.rest(), decoder.rest()] == ["", "\ufffd", ""]


# Bytes that are often the beginning of a character, or its middle.
BYTES = st.lists(st.sampled_from([*CHARACTERS.encode(), 0x80, 0xC3, 0xE4, 0xF0, 0xFF]) | st.integers(0, 255))


@settings(max_examples=400, deadline=None)
@given(tokens=BYTES)
def test_any_bytes_give_the_text_of_all(tokens: list[int], sample: Tokenizer) -> None:
    decoder = TextDecoder(sample)
    found = "".join([*(decoder.add(token) for token in tokens), decoder.rest()])
    assert found == bytes(tokens).decode(errors="replace")


CROSSING = st.lists(st.sampled_from([*CHUNKS, *(bytes([byte]) for byte in (0x41, 0x80, 0xBD, 0xE4, 0xF0, 0x9F))]))


@settings(max_examples=1500, deadline=None)
@given(parts=CROSSING)
def test_tokens_that_cross_characters_give_the_text_of_all(parts: list[bytes], crossed: Tokenizer) -> None:
    tokens = [CHUNKS.index(part) if part in CHUNKS else len(CHUNKS) + part[0] for part in parts]
    decoder = TextDecoder(crossed)
    found = "".join([*(decoder.add(token) for token in tokens), decoder.rest()])
    assert found == b"".join(parts).decode(errors="replace")


def test_bytes_that_are_no_character_do_not_wait_for_ever(sample: Tokenizer) -> None:
    decoder = TextDecoder(sample)
    found = "".join(decoder.add(0x80) for _ in range(200))
    assert len(found) >= 196
    assert len(decoder._ids) < 10


LLAMA = st.lists(st.integers(0, 8) | st.sampled_from(["你", "ñ", "🎉"]), max_size=30)


@settings(max_examples=300, deadline=None)
@given(parts=LLAMA)
def test_spaces_and_special_tokens_stay_where_they_are(parts: list[int | str], llama: Tokenizer) -> None:
    tokens: list[int] = []
    for part in parts:
        tokens += [part] if isinstance(part, int) else [9 + byte for byte in part.encode()]
    decoder = TextDecoder(llama)
    found = "".join([*(decoder.add(token) for token in tokens), decoder.rest()])
    assert found == llama.decode(tokens)


def test_the_first_word_keeps_its_space_behind_a_prompt(llama: Tokenizer) -> None:
    assert llama.decode([4]) == "return"
    assert TextDecoder(llama, [3]).add(4) == " return"
    # A character that the prompt began is shown once it is whole.
    assert TextDecoder(llama, [3, 9 + 0xC3]).add(9 + 0xB1) == "ñ"


@pytest.mark.parametrize("size", [1, 3])
def test_a_stop_ends_a_row_before_it(size: int, sample: Tokenizer) -> None:
    text = "one, two; three"
    row, shown = RowText(sample, [], ["; t", "no", "three"]), []
    for byte in text.encode():
        shown.append(row.add(byte, last=False))
        if row.stopped:
            break
    assert "".join(shown) == "one, two"
    # What could have been the beginning of a stop came late, and not never.
    assert shown[:2] == ["o", ""]


def test_what_waits_comes_with_the_last_token(sample: Tokenizer) -> None:
    row = RowText(sample, [], ["\n\n"])
    assert [row.add(ord("a"), last=False), row.add(ord("\n"), last=True)] == ["a", "\n"]
    assert not row.stopped


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="has 256 tokens, but the embedding of the model has 200: it is the tokenizer of"
    ):
        Tokenizer(bundle_with(tmp_path, bytewise(), 200))
    with pytest.raises(InputError, match="its checkpoint came without one; give tokens with --input-ids"):
        Tokenizer(bundle_with(tmp_path, None, 200))
    (tmp_path / "broken").mkdir()
    bundle = bundle_with(tmp_path / "broken", bytewise(), 256)
    (tmp_path / "broken" / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(InputError, match="cannot be read as a tokenizer"):
        Tokenizer(bundle)


def test_added_tokens_behind_the_embedding_are_refused_where_a_text_has_them(tmp_path: Path) -> None:
    tokenizer = bytewise()
    tokenizer.add_special_tokens(["<pad>"])
    found = Tokenizer(bundle_with(tmp_path, tokenizer, 256))
    assert found.encode("ab") == [97, 98]
    with pytest.raises(InputError, match=r"the text contains the token '<pad>', which has the id 256"):
        found.encode("a<pad>")
