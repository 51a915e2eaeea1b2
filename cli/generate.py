"""``diffdeploy generate``: generates text with a model bundle."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffdeploy.cli import console
from diffdeploy.cli.shared_options import AsJson, Device, PublicKey, Recompile, Threads, Trust, takes_quiet
from diffdeploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffdeploy.runtime import Runtime
    from diffdeploy.runtime.generation import Step

__all__ = ["generate"]

_MAX_NEW_TOKENS = 128
# Rates from this value on are printed without decimals.
_WHOLE = 100


@takes_quiet
def generate(
    bundle: Annotated[Path, typer.Argument(help="A bundle that holds a whole model.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to continue.")] = None,
    input_ids: Annotated[str | None, typer.Option(help="Token ids to continue, such as 1,2,3.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the text as a chat message, using the model's template.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Largest number of new tokens.", show_default="128, or as many as fit")
    ] = None,
    min_new_tokens: Annotated[int, typer.Option(help="Smallest number of new tokens.")] = 0,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sample tokens, with logits divided by this number.",
            show_default="no sampling; 1 with --top-k, --top-p or --seed",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from this many of the most probable tokens.", show_default="all")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the most probable tokens that together have this probability.", show_default="all"
        ),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Penalty for tokens that have already occurred; 1 for none.")
    ] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given several times.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed for the sampling.", show_default="a different one each time")
    ] = None,
    device: Device = None,
    threads: Threads = None,
    recompile: Recompile = False,
    trust: Trust = False,
    public_key: PublicKey = None,
    as_json: AsJson = False,
) -> int:
    """Continue a prompt, and report the speed."""
    import numpy as np

    from diffdeploy.formats import RunOptions
    from diffdeploy.runtime import open_runtime

    given = [option for option in (prompt, prompt_file, input_ids) if option is not None]
    if len(given) != 1:
        raise InputError("give one of --prompt, --prompt-file and --input-ids")
    if chat and input_ids is not None:
        raise InputError("--chat sends text as a message, but --input-ids gives tokens; omit one of them")
    options = RunOptions(device=device, threads=threads, recompile=recompile, trust=trust, public_key=public_key)
    # Read before the bundle is loaded, which may take minutes.
    text = prompt if prompt_file is None else _read(prompt_file)
    given_ids = None if input_ids is None else _numbers(input_ids)
    with open_runtime(bundle, options) as runtime:
        ids = _encoded(runtime, text or "", chat=chat) if given_ids is None else given_ids
        drawn = [option for option in (temperature, top_k, top_p, seed) if option is not None]
        room = runtime.spec.axes["total_sequence_length"].max - len(ids) + 1
        steps = runtime.stream(
            np.array([ids], np.int64),
            # Without --max-new-tokens, at most as many as fit; the prompt itself may still be too long.
            max_new_tokens=max(1, min(_MAX_NEW_TOKENS, room)) if max_new_tokens is None else max_new_tokens,
            do_sample=bool(drawn),
            temperature=1.0 if temperature is None else temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            min_new_tokens=min_new_tokens,
            stop=stop,
        )
        run = _Run(as_text=input_ids is None, quiet=as_json)
        if not runtime.verified:
            console.note(f"{bundle} was exported without verification; run diffdeploy verify {bundle}")
        run.take(steps)
    if as_json:
        console.print_json(run.fields(ids))
    else:
        run.finish(len(ids))
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--input-ids is {text!r}; accepted: comma-separated numbers") from error


def _read(prompt_file: Path) -> str:
    try:
        return prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{prompt_file} cannot be read as text ({error})") from error


def _encoded(runtime: "Runtime", prompt: str, *, chat: bool) -> list[int]:
    from diffdeploy.runtime.chat import ChatTemplate

    tokenizer = runtime.tokenizer
    if not chat:
        return tokenizer.encode(prompt)
    # A template writes the special tokens itself.
    text = ChatTemplate(runtime.bundle).render([{"role": "user", "content": prompt}])
    return tokenizer.encode(text, special=False)


class _Run:
    """Times tokens and prints them as they arrive: as text if the prompt was text, otherwise as ids."""

    def __init__(self, *, as_text: bool, quiet: bool) -> None:
        self._as_text, self._quiet = as_text, quiet
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._times: list[float] = []

    def take(self, steps: "Iterator[Step]") -> None:
        """Generate, time and print all tokens."""
        self._times.append(time.perf_counter())
        for step in steps:
            self._times.append(time.perf_counter())
            token = int(step.tokens[0])
            self._texts += step.texts or ()
            if not self._quiet:
                comma = "," if self._tokens else ""
                console.print_part(step.texts[0] if self._as_text and step.texts else f"{comma}{token}")
            self._tokens.append(token)

    @property
    def _rates(self) -> tuple[float, float | None]:
        """Seconds for the prompt, and tokens per second after it."""
        first = self._times[1] - self._times[0]
        rest = self._times[-1] - self._times[1]
        return first, (len(self._tokens) - 1) / rest if len(self._tokens) > 1 else None

    def fields(self, ids: list[int]) -> dict[str, Any]:
        """Fields for JSON."""
        first, decode = self._rates
        return {
            "input_ids": ids,
            "output_ids": self._tokens,
            "text": "".join(self._texts) if self._texts else None,
            "prefill_tokens_per_second": len(ids) / first,
            "decode_tokens_per_second": decode,
        }

    def finish(self, num_prompt: int) -> None:
        """Print the end of the text, and the speed."""
        first, decode = self._rates
        console.print_text("")
        rate = "" if decode is None else f", then {_figure(decode)} new tokens/s"
        console.note(f"{num_prompt} prompt tokens at {_figure(num_prompt / first)} tokens/s{rate}")


def _figure(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= _WHOLE else f"{rate:.3g}"
