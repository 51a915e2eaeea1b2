"""Conversations as the one text that a model was trained on, by the template that its checkpoint brought along.

The variables and functions that a template finds are those of Hugging Face's ``apply_chat_template``.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from diffdeploy.bundle import Bundle
from diffdeploy.errors import InputError, UnavailableError
from diffdeploy.versions import installed_versions

__all__ = ["ChatTemplate"]

_TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
# Characters; the longest templates have some twenty thousand, and contexts some millions.
_LONGEST_TEMPLATE = 2**20
_LONGEST_TEXT = 2**24
_LONGEST_REPEATED = 2**12
# Older sandboxes let templates out (CVE-2024-56326, CVE-2025-27516).
_SAFE_JINJA = (3, 1, 6)


class ChatTemplate:
    """The chat template of a bundle: ``chat_template.jinja``, else ``chat_template`` in ``tokenizer_config.json``.

    It comes from wherever the checkpoint does, and is run in jinja2's sandbox: it sees the messages and nothing else.

    Args:
        bundle: of a model.

    Raises:
        InputError: the bundle has no template, or one that is none.
        UnavailableError: the package jinja2 is not installed.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._path = bundle.path
        config = _json_of(bundle, _CONFIG)
        source = _text_of(bundle, _TEMPLATE) if _TEMPLATE in bundle.manifest.files else _default(config)
        if source is None:
            raise InputError(
                f"{bundle.path} has no chat template: beside its checkpoint there was none in {_TEMPLATE} or "
                f"{_CONFIG}; leave --chat out"
            )
        if len(source) > _LONGEST_TEMPLATE:
            raise InputError(f"the chat template of {bundle.path} has {len(source):,} characters, and cannot be one")
        self._special = {name: text for name, value in config.items() if (text := _token(name, value)) is not None}
        environment = _environment()
        try:
            self._template: Any = environment.from_string(source)
        # Whatever a text from elsewhere makes of the parser; and below, a template may raise anything.
        except Exception as error:
            raise InputError(f"the chat template of {bundle.path} cannot be read: {_first_line(error)}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, with its special tokens.

        Args:
            messages: such as ``{"role": "user", "content": "Hello"}``, of what JSON can hold.
            add_generation_prompt: end it where the model is to answer.

        Raises:
            InputError: the template refuses the messages, or fails.
        """
        # Of plain types alone: objects have methods of which the sandbox cannot know what they do.
        given = json.loads(json.dumps(list(messages)))
        parts, size = [], 0
        try:
            for part in self._template.generate(
                messages=given, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self._special
            ):
                size += len(part)
                if size > _LONGEST_TEXT:
                    raise InputError(f"the chat template of {self._path} writes text without end")  # noqa: TRY301
                parts.append(part)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"the chat template of {self._path} raised: {_first_line(error)}") from error
        return "".join(parts)


def _text_of(bundle: Bundle, name: str) -> str:
    try:
        return (bundle.path / name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{bundle.path / name} is not text in UTF-8; export again with the right one") from error


def _json_of(bundle: Bundle, name: str) -> dict[str, Any]:
    if name not in bundle.manifest.files:
        return {}
    try:
        fields = json.loads(_text_of(bundle, name))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{bundle.path / name} is not readable JSON; export again with the right one") from error
    return fields if isinstance(fields, dict) else {}


def _default(config: Mapping[str, Any]) -> str | None:
    """The template in a tokenizer's config, which has one, or several with names."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named = [each for each in found if isinstance(each, dict) and each.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None


def _token(name: str, value: object) -> str | None:
    """The text of a special token, such as ``bos_token``, which older files write as an object."""
    if not name.endswith("_token"):
        return None
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _require_jinja2() -> None:
    found = installed_versions(["jinja2"]).get("jinja2")
    if found is None:
        raise UnavailableError(
            "chat templates need the package jinja2, which is not installed; pip install 'diffdeploy[text]'"
        )
    if tuple(int(part) for part in found.split(".")[:3]) < _SAFE_JINJA:
        raise UnavailableError(
            f"chat templates need jinja2 3.1.6 or newer, since the sandbox of {found} has known holes; pip install "
            "'diffdeploy[text]'"
        )


def _environment() -> Any:
    _require_jinja2()
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """``{% generation %}``, with which trainers mark what a model wrote; here its content is all that counts."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        # The two that make much of little: a text of terabytes, a number that takes years.
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [side for side in (left, right) if isinstance(side, int | float)]
            is_product = operator == "*" and (len(sizes) == 2 or max([0, *sizes]) <= _LONGEST_REPEATED)  # noqa: PLR2004
            if not is_product:
                raise jinja2.exceptions.SecurityError(f"{operator} of this size is not allowed in a chat template")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own is for web pages, and escapes what stands in tags.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *pairs, **named: dict(*pairs, **named),
    }
    return environment
