"""``diffdeploy generate``: text out of a model bundle."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffdeploy.cli import console
from diffdeploy.cli.shared_options import AsJson, Device, PublicKey, Recompile, Threads, Trust
from diffdeploy.errors import InputError

if TYPE_CHECKING:
    from diffdeploy.runtime.text import Tokenizer

__all__ = ["generate"]

_MAX_NEW_TOKENS = 128
# What stands for a token whose last bytes are still to come.
_UNFINISHED = "\ufffd"


def generate(
    bundle: Annotated[Path, typer.Argument(help="A bundle that holds a whole model.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to continue.")] = None,
    input_ids: Annotated[str | None, typer.Option(help="Tokens to continue, such as 1,2,3.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens to come.", show_default="128, or as many as fit")
    ] = None,
    min_new_tokens: Annotated[int, typer.Option(help="Least tokens to come.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(help="Draw tokens; logits are divided by this.", show_default="the most probable")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many tokens.", show_default="all")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the most probable with so much probability.", show_default="all")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Against tokens that are there; 1 for none.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may come again.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws.", show_default="another one each time")] = None,
    device: Device = None,
    threads: Threads = None,
    recompile: Recompile = False,
    trust: Trust = False,
    public_key: PublicKey = None,
    as_json: AsJson = False,
) -> int:
    """Continue a prompt, and say how fast."""
    from diffdeploy.runtime import load
    from diffdeploy.runtime.text import Tokenizer

    given = [option for option in (prompt, prompt_file, input_ids) if option is not None]
    if len(given) != 1:
        raise InputError("give one of --prompt, --prompt-file and --input-ids")
    runtime = load(bundle, device=device, threads=threads, recompile=recompile, trust=trust, public_key=public_key)
    tokenizer = None
    if input_ids is None or stop:
        tokenizer = Tokenizer(runtime.bundle)
    ids = _numbers(input_ids) if input_ids is not None else _encoded(tokenizer, prompt, prompt_file)
    drawn = [option for option in (temperature, top_k, top_p, seed) if option is not None]
    options: dict[str, Any] = {
        "do_sample": bool(drawn),
        "temperature": 1.0 if temperature is None else temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "min_new_tokens": min_new_tokens,
    }
    with runtime:
        run = _Run(tokenizer, stop or [], quiet=as_json)
        room = runtime.spec.axes["sequence_length"].max - len(ids) + 1
        # Without a number nobody asked for more than there is room for; the prompt itself may be too long.
        most = max(1, min(_MAX_NEW_TOKENS, room)) if max_new_tokens is None else max_new_tokens
        run.take(runtime, ids, most, options)
    if as_json:
        console.print_json(run.fields(ids))
    else:
        run.finish(len(ids))
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--input-ids is {text!r}; accepted are numbers with commas between them") from error


def _encoded(tokenizer: "Tokenizer | None", prompt: str | None, prompt_file: Path | None) -> list[int]:
    assert tokenizer is not None
    if prompt is None:
        assert prompt_file is not None
        try:
            prompt = prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{prompt_file} cannot be read as text ({error})") from error
    return tokenizer.encode(prompt)


class _Run:
    """Tokens as they come: shown, timed, and ended by a text."""

    def __init__(self, tokenizer: "Tokenizer | None", stop: list[str], *, quiet: bool) -> None:
        self._tokenizer, self._stop, self._quiet = tokenizer, stop, quiet
        self.tokens: list[int] = []
        self._shown = self._text = ""
        self._times: list[float] = []

    def take(self, runtime: Any, ids: list[int], max_new_tokens: int, options: dict[str, Any]) -> None:
        """Generate."""
        import numpy as np

        from diffdeploy.runtime.generation import stream

        steps = stream(runtime, np.array([ids], np.int64), max_new_tokens=max_new_tokens, **options)
        self._times.append(time.perf_counter())
        for chosen in steps:
            self._times.append(time.perf_counter())
            self.tokens.append(int(chosen[0]))
            if self._ends():
                return

    def _ends(self) -> bool:
        """Show what is new; whether a text that ends everything has come."""
        if self._tokenizer is None:
            if not self._quiet:
                console.print_part(("," if len(self.tokens) > 1 else "") + str(self.tokens[-1]))
            return False
        text = self._tokenizer.decode(self.tokens)
        found = [text.index(end) for end in self._stop if end in text]
        if found:
            text = text[: min(found)]
        elif text.endswith(_UNFINISHED):
            return False  # a character of which the rest comes with the next token
        self._text = text
        # What may be the beginning of a text that ends everything waits for the next token.
        sure = text if found else text[: len(text) - max((_overlap(text, end) for end in self._stop), default=0)]
        self._show(sure)
        return bool(found)

    def _show(self, text: str) -> None:
        if not self._quiet and len(text) > len(self._shown):
            console.print_part(text[len(self._shown) :])
            self._shown = text

    @property
    def _rates(self) -> tuple[float, float | None]:
        """Seconds of the prompt, and tokens a second behind it."""
        first = self._times[1] - self._times[0]
        rest = self._times[-1] - self._times[1]
        return first, (len(self.tokens) - 1) / rest if len(self.tokens) > 1 else None

    def fields(self, ids: list[int]) -> dict[str, Any]:
        """For JSON."""
        first, decode = self._rates
        return {
            "input_ids": ids,
            "output_ids": self.tokens,
            "text": None if self._tokenizer is None else self._text,
            "prefill_tokens_per_second": len(ids) / first,
            "decode_tokens_per_second": decode,
        }

    def finish(self, num_prompt: int) -> None:
        """The end of the text, and how fast it came."""
        first, decode = self._rates
        self._show(self._text)
        console.print_text("")
        rate = "" if decode is None else f", {decode:.3g} tokens/s behind it"
        console.note(f"{num_prompt} tokens of prompt at {num_prompt / first:.3g} tokens/s{rate}")


def _overlap(text: str, end: str) -> int:
    """How much of the end of a text is the beginning of another one."""
    return next((size for size in range(min(len(text), len(end)), 0, -1) if text.endswith(end[:size])), 0)
