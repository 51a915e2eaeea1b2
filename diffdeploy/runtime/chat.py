"""Conversations, rendered to one text by the chat template that came with the checkpoint.

Templates can use the same variables and functions as in Hugging Face's ``apply_chat_template``.
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
# Maximum length in characters; the longest templates have some twenty thousand, and conversations some millions.
_LONGEST_TEMPLATE = 2**20
_LONGEST_TEXT = 2**24
_LONGEST_REPEATED = 2**12
# Sandboxes of older versions let templates escape (CVE-2024-56326, CVE-2025-27516).
_SAFE_JINJA = (3, 1, 6)


class ChatTemplate:
    """The chat template of a bundle: ``chat_template.jinja``, else ``chat_template`` in ``tokenizer_config.json``.

    It is only as trustworthy as its checkpoint, so it runs in jinja2's sandbox and has access only to the messages.

    Args:
        bundle: bundle of a model.

    Raises:
        InputError: the bundle has no template, or an invalid one.
        UnavailableError: the package jinja2 is not installed.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._path = bundle.path
        config = _json_of(bundle, _CONFIG)
        source = _text_of(bundle, _TEMPLATE) if _TEMPLATE in bundle.manifest.files else _default(config)
        if source is None:
            raise InputError(
                f"{bundle.path} has no chat template: its checkpoint came without {_TEMPLATE} and without a template "
                f"in {_CONFIG}; omit --chat"
            )
        if len(source) > _LONGEST_TEMPLATE:
            raise InputError(f"the chat template of {bundle.path} has {len(source):,} characters, which is too long")
        self._special = {name: text for name, value in config.items() if (text := _token(name, value)) is not None}
        environment = _environment()
        try:
            self._template: Any = environment.from_string(source)
        # The parser may raise any error for untrusted text; the same applies to templates below.
        except Exception as error:
            raise InputError(f"the chat template of {bundle.path} cannot be read: {_first_line(error)}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Render a conversation to text with special tokens.

        Args:
            messages: messages such as ``{"role": "user", "content": "Hello"}``, of JSON types.
            add_generation_prompt: true to end the text where the model is to answer.

        Raises:
            InputError: the template rejects the messages, or fails.
        """
        # Only plain types: the sandbox cannot know what the methods of other objects do.
        given = json.loads(json.dumps(list(messages)))
        parts, size = [], 0
        try:
            for part in self._template.generate(
                messages=given, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self._special
            ):
                size += len(part)
                if size > _LONGEST_TEXT:
                    raise InputError(f"the chat template of {self._path} produces endless text")  # noqa: TRY301
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
        raise InputError(f"{bundle.path / name} is not UTF-8 text; export again with the correct file") from error


def _json_of(bundle: Bundle, name: str) -> dict[str, Any]:
    if name not in bundle.manifest.files:
        return {}
    try:
        fields = json.loads(_text_of(bundle, name))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{bundle.path / name} is not readable JSON; export again with the correct file") from error
    return fields if isinstance(fields, dict) else {}


def _default(config: Mapping[str, Any]) -> str | None:
    """Default template in a tokenizer's config, which contains one template or several named ones."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named = [each for each in found if isinstance(each, dict) and each.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None


def _token(name: str, value: object) -> str | None:
    """Text of a special token, such as ``bos_token``, which older files store as an object."""
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
            f"chat templates need jinja2 3.1.6 or newer, since the sandbox of {found} has known vulnerabilities; pip "
            "install 'diffdeploy[text]'"
        )


def _environment() -> Any:
    _require_jinja2()
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """``{% generation %}``, with which trainers mark the model's own text; only its content is rendered here."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        # Small operands of `*` and `**` give huge results: terabytes of text, or a number that takes years to compute.
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
        # Jinja's own function is for web pages, and escapes characters of HTML tags.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *pairs, **named: dict(*pairs, **named),
    }
    return environment
