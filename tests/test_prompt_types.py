"""A prompt of any type becomes token ids or one ValueError that says what to do."""

import array
import collections
import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import decoders

from sparsespec_jax import Engine, SamplingParams, decode
from sparsespec_jax.host.text import encode_prompt
from sparsespec_jax.loading.chat import chat_messages
from tests.engine_helpers import ENGINE, SPECULATION
from tests.test_text_stream import small

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tiny_model):
    """The tiny model; token i is the character 'a' + i."""
    tokenizer = small(*map(chr, range(97, 123)), decoder=decoders.Fuse())
    tokenizer.chat_template = TEMPLATE
    return dataclasses.replace(tiny_model, tokenizer=tokenizer)


class Text(str):
    """A string of a class of its own."""


IDS = [3, 1, 2]
ACCEPTED = {
    "text": ("dbc", IDS),
    "a subclass of str": (Text("dbc"), IDS),
    "numpy text": (np.str_("dbc"), IDS),
    "list": (IDS, IDS),
    "tuple": (tuple(IDS), IDS),
    "range": (range(3), [0, 1, 2]),
    "array": (array.array("i", IDS), IDS),
    "deque": (collections.deque(IDS), IDS),
    "iterator": (iter(IDS), IDS),
    "numpy": (np.array(IDS), IDS),
    "numpy, 8 bits": (np.array(IDS, np.uint8), IDS),
    "numpy objects": (np.array(IDS, object), IDS),
    "jax": (jnp.array(IDS), IDS),
    "numpy scalars": ([np.int64(3), np.uint8(1), np.array(2)], IDS),
    "jax scalars": (list(jnp.array(IDS)), IDS),
    "chat": ([{"role": "user", "content": "dbc"}], IDS),
    "chat tuple": (({"role": "user", "content": "dbc"},), IDS),
    "mapping": ([types.MappingProxyType({"role": "user", "content": "dbc"})], IDS),
    "parts": (
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": t} for t in ("d", "bc")],
            }
        ],
        IDS,
    ),
}


@pytest.mark.parametrize("prompt, ids", ACCEPTED.values(), ids=ACCEPTED)
def test_prompts_that_are_accepted(model, prompt, ids):
    found = encode_prompt(prompt, model)
    assert found == ids
    assert type(found) is list and {type(token) for token in found} == {int}


class Hostile:
    """Fails at whatever is asked of it."""

    def __iter__(self):
        raise RuntimeError("no")

    def __index__(self):
        raise RuntimeError("no")

    def __repr__(self):
        raise RuntimeError("no")


class NoArray:
    def __array__(self, *args, **kwargs):
        raise RuntimeError("no")


LOOP = []
LOOP.append(LOOP)
TYPES = "text, chat messages or token ids, got "
THROUGHOUT = "holds token ids or chat messages throughout, got "
REFUSED = {
    "nothing": (None, TYPES + "NoneType: give a text"),
    "number": (7, TYPES + "int: put token ids into a list"),
    "half a number": (0.5, TYPES + "float: put token ids into a list"),
    "truth value": (True, TYPES + "bool: put"),
    "numpy number": (np.int32(7), TYPES + "int32: put token ids into a list"),
    "object": (object(), TYPES + "object"),
    "class": (list, TYPES + "type"),
    "hostile": (Hostile(), TYPES + "Hostile"),
    "hostile inside": ([1, Hostile()], THROUGHOUT),
    "no array": (NoArray(), TYPES + "NoArray"),
    "bytes": (b"hello", TYPES + r"bytes: .*decode\('utf-8'\)"),
    "bytearray": (bytearray(b"hello"), TYPES + r"bytearray: .*decode\('utf-8'\)"),
    "memoryview": (memoryview(b"hello"), TYPES + r"memoryview: .*decode\('utf-8'\)"),
    "a message": (
        {"role": "user", "content": "a"},
        TYPES + "dict: .*wrap .* in \\[\\]",
    ),
    "set": ({1, 2}, TYPES + "set: .*give a list"),
    "two axes": (np.ones((2, 3), int), r"of shape \(2, 3\): .*each row as a prompt"),
    "two axes, jax": (jnp.ones((1, 3), int), r"of shape \(1, 3\): .*each row"),
    "no axes": (np.array(5), r"of shape \(\): a prompt is one row"),
    "rows": ([[1, 2], [3]], THROUGHOUT + r"\[1, 2\]"),
    "a loop": (LOOP, THROUGHOUT),
    "floats": ([1.0, 2.0], THROUGHOUT + "1.0"),
    "numpy floats": (np.ones(3), THROUGHOUT + "1.0"),
    "jax floats": ([*jnp.ones(3)], THROUGHOUT),
    "truth values": ([True, 1], THROUGHOUT + "True"),
    "numpy truth": (np.array([True]), THROUGHOUT + "True"),
    "numpy truth inside": ([np.True_], THROUGHOUT),
    "jax truth": ([*jnp.array([True])], THROUGHOUT),
    "None inside": ([1, None], THROUGHOUT + "None"),
    "masked": (np.ma.array([1, 2], mask=[0, 1]), THROUGHOUT + "None"),
    "texts": (["a", "b"], THROUGHOUT + "'a'"),
    "numpy texts": (np.array(["a"]), THROUGHOUT + "'a'"),
    "bytes inside": ([1, b"a"], THROUGHOUT + "b'a'"),
    "a message inside": ([1, {"role": "user"}], THROUGHOUT),
    "empty": ([], r"the prompt \[\] has no tokens"),
    "empty text": ("", "the prompt '' has no tokens"),
    "empty array": (np.array([], int), "has no tokens"),
    "negative": ([1, -1], "token id -1 is outside the model's vocabulary"),
    "numpy negative": (np.array([-1]), "token id -1 is outside"),
    "too large": ([97], r"token id 97 is outside the model's vocabulary \[0, 97\)"),
    "far too large": ([2**70], f"token id {2**70} is outside"),
    "half a pair": (
        "a\ud800b",
        r"character 1 of the text is '\\ud800', half of a surr",
    ),
    "half a pair in a chat": (
        [{"role": "user", "content": "\udc00"}],
        "half of a surrogate pair",
    ),
}


@pytest.mark.parametrize("prompt, message", REFUSED.values(), ids=REFUSED)
def test_prompts_that_are_refused(model, prompt, message):
    with pytest.raises(ValueError, match=message) as caught:
        encode_prompt(prompt, model)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


def test_a_refused_prompt_is_named_by_its_number(model):
    law = SamplingParams(max_tokens=3)
    for prompt in ("\ud800", b"ab", [{"role": "user", "content": 3}], {"role": "user"}):
        with pytest.raises(ValueError, match="^prompt 1: "):
            decode(model, ["a", prompt], sampling=law)


def test_a_model_without_tokenizer_says_why(tiny_model):
    model = dataclasses.replace(
        tiny_model, tokenizer_problem="m.gguf has a tokenizer of kind 'llama'"
    )
    reason = ".*needs? a tokenizer, and model 'tiny' has none: m.gguf .* kind 'llama'"
    for prompt in ("text", [{"role": "user", "content": "chat"}]):
        with pytest.raises(ValueError, match=f"prompt{reason}.*Give token ids"):
            encode_prompt(prompt, model)
    config = dataclasses.replace(ENGINE, max_length=100)
    engine = Engine(model, speculation=SPECULATION, engine=config)
    with pytest.raises(ValueError, match=f"stop strings{reason}.*stop_token_ids"):
        engine.add_request([1], SamplingParams(max_tokens=1, stop="a"))


# --- Chat messages


CALL = [{"name": "f"}]
MESSAGES = {
    "text": ({"content": "a"}, {"content": "a"}),
    "no parts": ({"content": []}, {"content": ""}),
    "parts": (
        {
            "content": (
                {"type": "text", "text": "a", "x": 1},
                {"type": "text", "text": ""},
            )
        },
        {"content": "a"},
    ),
    "keys without value": ({"content": "a", "name": None}, {"content": "a"}),
    "a call": ({"tool_calls": CALL}, {"tool_calls": CALL}),
    "a call and None": ({"content": None, "tool_calls": CALL}, {"tool_calls": CALL}),
    "a call and text": (
        {"content": "a", "tool_calls": CALL},
        {"content": "a", "tool_calls": CALL},
    ),
}


@pytest.mark.parametrize("message, wanted", MESSAGES.values(), ids=MESSAGES)
def test_messages_as_templates_read_them(message, wanted):
    role = {"role": "assistant"}
    assert chat_messages([role | message]) == [role | wanted]


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
BAD_MESSAGES = {
    "no mapping": ("hi", "must be a mapping with 'role' and 'content', got 'hi'"),
    "no role": ({"content": "a"}, "'role' must be a string such as 'user', got None"),
    "role": ({"role": 3, "content": "a"}, "'role' must be a string .*got 3"),
    "nothing": ({"role": "user"}, "'content' must be a text or .* got None"),
    "None": ({"role": "user", "content": None}, "'content' must be .* got None"),
    "no calls": (
        {"role": "user", "content": None, "tool_calls": []},
        "'content' must be .* got None",
    ),
    "number": ({"role": "user", "content": 3}, "'content' must be .* got 3"),
    "one part": ({"role": "user", "content": {"type": "text", "text": "a"}}, "must be"),
    "bytes": ({"role": "user", "content": b"a"}, "'content' must be .* got b'a'"),
    "image": (
        {"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]},
        "part 1: 'content' parts must be .*image_url.*only text",
    ),
    "bare text": ({"role": "user", "content": ["a"]}, "part 0: .* got 'a'"),
    "no type": ({"role": "user", "content": [{"text": "a"}]}, "part 0: "),
    "no text": ({"role": "user", "content": [{"type": "text"}]}, "part 0: "),
    "a call with a number": (
        {"role": "assistant", "content": 3, "tool_calls": CALL},
        "'content' must be .* got 3",
    ),
}


@pytest.mark.parametrize("message, problem", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_messages_that_are_refused(message, problem):
    good = {"role": "user", "content": "a"}
    with pytest.raises(ValueError, match=f"^message 1 of the chat.*{problem}"):
        chat_messages([good, message])
