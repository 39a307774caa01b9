"""Chat templates: what they are given, what they may use, and how they fail."""

import dataclasses
import json

import pytest
from tokenizers import decoders

from sparsespec_jax.host.text import encode_prompt
from sparsespec_jax.loading.tokenizer import Tokenizer
from tests.test_text_stream import small

USER = [{"role": "user", "content": "<b> é"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}


@pytest.fixture(scope="module")
def backend():
    made = small("a", "b", "<s>", decoder=decoders.Fuse()).backend
    made.add_special_tokens(["<s>"])
    return made


def text(backend, template, messages=USER, *, special_tokens=None, **options):
    tokenizer = Tokenizer(
        backend, chat_template=template, special_tokens=special_tokens or {}
    )
    return tokenizer.chat_text(messages, **options)


GIVEN = {
    "a token that is not there is empty": ("[{{ bos_token }}{{ eos_token }}]", "[]"),
    "and undefined": ("{{ bos_token is defined }}", "False"),
    "its default": ("{{ bos_token | default('x') }}", "x"),
    "no tools": ("{{ tools is none }}{{ 'tools' if tools else '' }}", "True"),
    "no documents": ("{{ documents is none }}", "True"),
    "a prompt for the answer": ("{{ add_generation_prompt }}", "True"),
    "keys": ("{{ messages[0].role }}{{ messages[0]['content'] }}", "user<b> é"),
    "unknown keys": ("[{{ messages[0].name }}]", "[]"),
    "JSON": (
        "{{ messages[0] | tojson }}",
        '{"role": "user", "content": "<b> é"}',
    ),
    "JSON, ASCII": (
        "{{ messages[0].content | tojson(ensure_ascii=true) }}",
        '"<b> \\u00e9"',
    ),
    "JSON, short and sorted": (
        "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}",
        '{"content":"<b> é","role":"user"}',
    ),
    "JSON, indented": (
        "{{ [1] | tojson(indent=2) }}{{ [1] | tojson(indent='-') }}",
        "[\n  1\n][\n-1\n]",
    ),
    "JSON, by place": ("{{ 'é' | tojson(true, none) }}", '"\\u00e9"'),
    "generation": (
        "{% set x = 1 %}{% generation %}\n{{ x }}{% set x = 2 %}{{ x }}"
        "{% endgeneration %}\n{{ x }}",
        "121",
    ),
    "generation in a loop": (
        "{% for m in messages %}\n  {%- generation -%}\n {{ m.role }}{{ loop.index }}\n"
        "  {%- endgeneration %}\n{% endfor %}",
        "user1",
    ),
    "loops may be left": (
        "{% for i in [0, 1, 2] %}{{ i }}{% if i %}{% break %}{% endif %}{% endfor %}",
        "01",
    ),
    "time": ("{{ strftime_now('%%') }}", "%"),
}


@pytest.mark.parametrize("template, wanted", GIVEN.values(), ids=GIVEN)
def test_what_templates_are_given(backend, template, wanted):
    assert text(backend, template) == wanted


def test_special_tokens_are_those_that_are_named(backend):
    names = {"bos_token": "<s>", "pad_token": "<pad>", "image_token": "<image>"}
    template = "{{ bos_token }}{{ pad_token }}{{ image_token }}[{{ eos_token }}]"
    wanted = "<s><pad><image>[]"
    assert text(backend, template, special_tokens=names) == wanted
    # One that the caller gives comes before.
    assert text(backend, "{{ bos_token }}", special_tokens=names, bos_token="x") == "x"
    # Without names they are those of the ids, which may be missing.
    by_id = Tokenizer(
        backend, bos_id=2, eos_ids=(1, 0), chat_template="{{ eos_token }}"
    )
    assert by_id.special_tokens == {"bos_token": "<s>", "eos_token": "b"}
    assert by_id.chat_text(USER) == "b"
    none = Tokenizer(backend, eos_ids=(99,), chat_template="[{{ eos_token }}]")
    assert none.chat_text(USER) == "[]"


def test_tools_and_calls_reach_the_template(backend):
    template = (
        "{{ tools | tojson }}{% for m in messages %}[{{ m.content is defined }}"
        "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}]{% endfor %}"
    )
    assert text(backend, template, [*USER, CALL], tools=TOOLS) == (
        json.dumps(TOOLS) + '[True<b> é][False[{"name": "f"}]]'
    )


FAILURES = {
    "syntax": ("a\n{% for %}", " in line 2: Expected an expression"),
    "unknown tag": ("{% nothing %}", " in line 1: .*unknown tag"),
    "undefined": ("\n\n{{ bos_token + 'x' }}", " in line 3: 'bos_token' is undefined"),
    "refused": ("\n{{ raise_exception('no') }}", " in line 2: no"),
    "division": ("{{ 1 / 0 }}", " in line 1: ZeroDivisionError: division by zero"),
    "types": ("\n{{ 'a' + 1 }}", " in line 2: TypeError: can only concatenate"),
    "arguments": ("{{ strftime_now() }}", " in line 1: TypeError: .*argument"),
    "no JSON": ("{{ raise_exception | tojson }}", " in line 1: TypeError: .*function"),
    "range": (
        "{{ range(10 ** 9) | list }}",
        " in line 1: OverflowError: Range too big",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "Python": ("{{ messages.__class__.__mro__ }}", " in line 1: .*unsafe"),
    "changing": ("{{ messages.append(1) }}", " in line 1: .*unsafe"),
}


@pytest.mark.parametrize("template, problem", FAILURES.values(), ids=FAILURES)
def test_whatever_fails_in_a_template_is_one_value_error(backend, template, problem):
    with pytest.raises(ValueError, match=f"^the chat template failed.*{problem}") as e:
        text(backend, template)
    assert type(e.value) is ValueError


def test_one_of_several_templates_is_picked(backend):
    both = {"tool_use": "tools", "default": "plain"}
    assert text(backend, both) == "plain"
    assert text(backend, both, tools=TOOLS) == "tools"
    assert text(backend, {"default": "plain"}, tools=TOOLS) == "plain"
    with pytest.raises(
        ValueError, match=r"templates named \['rag', 'tool_use'\].*none"
    ):
        text(backend, {"tool_use": "tools", "rag": "x"})
    with pytest.raises(ValueError, match="no chat template"):
        text(backend, None)


def test_a_chat_is_encoded_as_the_template_writes_it(backend, tiny_model):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer(backend, bos_id=2, chat_template=template)
    model = dataclasses.replace(tiny_model, tokenizer=tokenizer)
    assert encode_prompt([{"role": "user", "content": "ab"}], model) == [2, 0, 1]
