"""Chat templates: what transformers makes of them, and nothing that a template from elsewhere should not do."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffdeploy.errors import InputError, UnavailableError
from diffdeploy.runtime.chat import ChatTemplate

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message.content | trim }}\n"
    "{%- if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>\\n<|im_start|>assistant\\n' }}{% endif %}"
)
# With what templates of released models use: namespaces, loop controls, JSON, special tokens, dates, marked answers.
RICH = (
    "{{- bos_token }}{% set ns = namespace(count=0) %}\n"
    "{% for message in messages %}\n"
    "  {% if message.role == 'system' %}{% continue %}{% endif %}\n"
    "  {% set ns.count = ns.count + 1 %}\n"
    "  {% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}\n"
    "  {% else %}[{{ ns.count * 2 }}{{ '=' * 3 }}{{ message | tojson }}]{% endif %}\n"
    "{% endfor %}{{ strftime_now('%Y') | length }}{{ dict(a=1)['a'] }}{{ tools is none }}"
)
MESSAGES = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": " Grüß dich & Co "},
    {"role": "assistant", "content": "Hallo"},
    {"role": "user", "content": "Und?"},
]


def bundle_with(directory: Path, **files: str) -> Any:
    names = {"template": "chat_template.jinja", "config": "tokenizer_config.json"}
    for name, text in files.items():
        (directory / names[name]).write_text(text, encoding="utf-8")
    manifest = SimpleNamespace(files={names[name]: None for name in files})
    return SimpleNamespace(path=directory, manifest=manifest)


CONFIG = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("source", [CHATML, RICH], ids=["chatml", "rich"])
def test_texts_are_those_of_transformers(source: str, add_generation_prompt: bool, tmp_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=add_generation_prompt, **special
    )
    template = ChatTemplate(bundle_with(tmp_path, template=source, config=json.dumps(CONFIG)))
    assert template.render(MESSAGES, add_generation_prompt=add_generation_prompt) == expected


def test_the_file_comes_before_the_config(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "listed"}]
    for given, expected in (
        ({"config": json.dumps({"chat_template": "of the config"})}, "of the config"),
        ({"config": json.dumps({"chat_template": named})}, "listed"),
        ({"config": json.dumps({"chat_template": "of the config"}), "template": "of the file"}, "of the file"),
    ):
        assert ChatTemplate(bundle_with(tmp_path, **given)).render(MESSAGES) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Only user messages!') }}", "raised: Only user messages!"),
        ("{{ messages[0].nothing.at_all }}", "raised: 'dict object' has no attribute 'nothing'"),
        ("{% for %}", "cannot be read"),
        ("{{ ''.__class__.__mro__ }}", "raised: access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "raised: access to attribute '__init__'"),
        ("{{ messages.append(1) }}", "raised: access to attribute 'append'"),
        ("{% include '/etc/passwd' %}", "raised: "),
        ("{{ 'x' * 10**9 }}", r"raised: \*\* of this size"),
        ("{{ 'x' * 1000000000 }}", r"raised: \* of this size"),
        pytest.param(
            "{% for a in range(99999) %}{% for b in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endfor %}",
            "endless text",
            id="endless",
        ),
        ("{{ range(999999999) }}", "raised: Range too big"),
        pytest.param("a" * (2**20 + 1), "has 1,048,577 characters", id="too-long"),
    ],
)
def test_templates_that_fail_or_do_harm_get_one_sentence(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"the chat template of .*{message}"):
        ChatTemplate(bundle_with(tmp_path, template=source)).render(MESSAGES)


def test_objects_do_not_reach_a_template(tmp_path: Path) -> None:
    template = ChatTemplate(bundle_with(tmp_path, template="{{ messages[0].content.unlink() }}"))
    with pytest.raises(TypeError, match="not JSON serializable"):
        template.render([{"role": "user", "content": tmp_path}])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "its checkpoint came without chat_template.jinja and without a template in tokenizer_config"),
        ({"config": "{}"}, "has no chat template"),
        ({"config": json.dumps({"chat_template": 3})}, "has no chat template"),
        ({"config": "{"}, "tokenizer_config.json is not readable JSON"),
    ],
)
def test_bundles_without_a_template(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        ChatTemplate(bundle_with(tmp_path, **files))


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({}, "which is not installed"),
        ({"jinja2": "3.1.5"}, "3.1.6 or newer, since the sandbox of 3.1.5 has known vulnerabilities"),
    ],
)
def test_a_sandbox_that_is_not_there_or_leaks_is_refused(
    installed: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffdeploy.runtime.chat.installed_versions", lambda _: installed)
    with pytest.raises(UnavailableError, match=message) as raised:
        ChatTemplate(bundle_with(tmp_path, template="text"))
    assert "pip install 'diffdeploy[text]'" in str(raised.value)
