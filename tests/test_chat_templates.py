"""Chat templates: what they are given, what they may use, and how they fail."""

import dataclasses
import json

import pytest
from tokenizers import decoders

from sparsespec_jax import Engine, SamplingParams, decode, score, stream
from sparsespec_jax.host.metrics import RequestMetrics
from sparsespec_jax.host.results import RequestProgress
from sparsespec_jax.host.text import encode_prompt
from sparsespec_jax.loading.tokenizer import Tokenizer
from tests.engine_helpers import ENGINE, SPECULATION
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
    both["tool_use"] += "{{ tools | length }}"
    assert text(backend, both, tools=TOOLS) == "tools1"
    default = "{{ tools | length }}"
    assert text(backend, {"default": default}, tools=TOOLS) == "1"
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


# How templates read a variable that may not be given.
THINKING = {
    "defined": (
        "{% if enable_thinking is defined and not enable_thinking %}n{% endif %}"
    ),
    "set": (
        "{% if not enable_thinking is defined %}{% set enable_thinking = true %}"
        "{% endif %}{{ '' if enable_thinking else 'n' }}"
    ),
    "default": "{{ '' if enable_thinking | default(true) else 'n' }}",
    "in a loop": (
        "{% for m in messages %}{% if enable_thinking is false %}n{% endif %}"
        "{% endfor %}"
    ),
    "in a macro": (
        "{% macro f() %}{{ 'n' if enable_thinking is false }}{% endmacro %}{{ f() }}"
    ),
    "in a generation": (
        "{% generation %}{{ 'n' if enable_thinking is false }}{% endgeneration %}"
    ),
}


@pytest.mark.parametrize("template", THINKING.values(), ids=THINKING)
def test_variables_reach_the_template(backend, template):
    assert text(backend, template, enable_thinking=False) == "n"
    assert text(backend, template) == text(backend, template, enable_thinking=True)
    with pytest.raises(
        ValueError,
        match="reads no variable 'enable_thinkng'; beside the messages it reads "
        "enable_thinking$",
    ):
        text(backend, template, enable_thinkng=False)


NOTHING_YET = RequestProgress(
    request_id=0,
    prompt_index=0,
    sample_index=0,
    token_ids=(),
    logprobs=(),
    params_versions=(),
    metrics=RequestMetrics(),
)


def test_variables_of_prompts(backend, tiny_model):
    """In every way that a prompt comes in, each prompt with its own."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template += "{{ 'b' if think }}{{ 'a' if tools }}"
    tokenizer = Tokenizer(backend, chat_template=template)
    model = dataclasses.replace(tiny_model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    each = [{"think": True, "tools": TOOLS}, None]
    law = SamplingParams(max_tokens=1)
    how = dict(sampling=law, speculation=SPECULATION, engine=ENGINE)
    found = decode(model, [chat, chat], chat_template_kwargs=each, **how)
    assert [r.prompt_token_ids for r in found] == [(0, 1, 0), (0,)]
    config = dataclasses.replace(ENGINE, max_length=64)
    with Engine(model, speculation=SPECULATION, engine=config) as engine:
        first = engine.add_request(chat, law, chat_template_kwargs={"think": True})
        second = engine.resume_request(
            chat, law, NOTHING_YET, chat_template_kwargs={"tools": TOOLS}
        )
        found = [engine.abort(request_id) for request_id in (first, second)]
    assert [r.prompt_token_ids for r in found] == [(0, 1), (0, 0)]
    # They reach the others too: what is unread is refused.
    for call in (
        lambda **given: stream(model, [chat], **given),
        lambda **given: score(model, [chat], [[1]], **given),
    ):
        with pytest.raises(ValueError, match="prompt 0: .*reads no variable 'thnk'"):
            call(chat_template_kwargs={"thnk": 1})


BAD_VARIABLES = {
    "a text": ("a", {"think": True}, r"\(think\) are of chats, and 'a' is none"),
    "ids": ([0], {"tools": TOOLS}, r"\(tools\) are of chats, and \[0\] is none"),
    "no dict": (USER, [True], "must be a dict, or a list of a dict or None for each"),
    "no dict inside": (USER, [[]], "prompt 0: .*must be a dict of template variables"),
    "names": (USER, {3: 1}, r"prompt 0: .*must be a dict .*, got \{3: 1\}"),
    "messages": (USER, {"messages": []}, "holds 'messages', which the prompt is"),
    "unread": (USER, {"thnk": 1}, "reads no variable 'thnk'; .* it reads think$"),
}


@pytest.mark.parametrize("prompt, given, problem", BAD_VARIABLES.values(), ids=str)
def test_variables_that_are_refused(backend, tiny_model, prompt, given, problem):
    tokenizer = Tokenizer(backend, chat_template="{{ 'b' if think }}a")
    model = dataclasses.replace(tiny_model, tokenizer=tokenizer)
    prompts = [prompt, prompt] if given == [True] else [prompt]
    with pytest.raises(ValueError, match=problem) as caught:
        decode(model, prompts, chat_template_kwargs=given)
    assert "\n" not in str(caught.value)
