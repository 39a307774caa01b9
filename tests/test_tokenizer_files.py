"""Tokenizer files: what they hold beside the vocabulary, and what is wrong in them."""

import json

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from sparsespec_jax.loading.tokenizer import (
    Tokenizer,
    tokenizer_from_directory,
    tokenizer_from_vocabulary,
)

NEXT = 99  # the first id that the vocabulary leaves free
PAD = dict(pad_id=1, pad_token="#")


def backend():
    """Characters of ASCII, and two tokens that no one has said are special."""
    tokens = [*map(chr, range(33, 127)), "Ġ", "Ċ", "</s>", "<s>", "<unk>"]
    assert len(tokens) == NEXT
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


@pytest.fixture
def load(tmp_path):
    """Write both files and load them; `config` is a dict or the file's text."""

    def write(config=None, *, made=None, **options):
        (made or backend()).save(str(tmp_path / "tokenizer.json"))
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
        return tokenizer_from_directory(tmp_path, **options)

    return write


# --- Stored truncation and padding


@pytest.mark.parametrize("stored", ["truncation", "padding", "both"])
def test_texts_are_encoded_whole_and_alone(load, stored):
    made = backend()
    if stored != "padding":
        made.enable_truncation(8)
    if stored != "truncation":
        made.enable_padding(length=16, **PAD)
    tokenizer = load(made=made)
    assert len(tokenizer.encode("x" * 40)) == 40
    assert tokenizer.encode("hi") == [71, 72]


# --- Tokens of tokenizer_config.json


def token(content, **flags):
    keys = dict(lstrip=False, rstrip=False, normalized=False, single_word=False)
    return keys | {"content": content, "special": True} | flags


def listed(**tokens):
    return {"added_tokens_decoder": {k.strip("_"): v for k, v in tokens.items()}}


def test_listed_tokens_are_added_with_their_ids(load):
    config = listed(_100=token("<b>", special=False), _99=token("<a>"))
    tokenizer = load(config | {"eos_token": "<a>", "bos_token": "<s>"})
    assert tokenizer.encode("x<a><b></s>") == [87, 99, 100, 27, 14, 82, 29]
    assert tokenizer.decode([87, 99, 100]) == "x<b>"
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (97, (99,))


def test_a_listed_token_may_be_in_the_vocabulary(load):
    tokenizer = load(listed(_96=token("</s>")))
    assert tokenizer.encode("a</s>") == [64, 96]
    assert tokenizer.decode([64, 96]) == "a"


def test_flags_of_a_listed_token_come_before_those_of_tokenizer_json(load):
    made = backend()
    made.add_tokens([AddedToken("</s>", normalized=False)])
    assert load(made=made).decode([64, 96]) == "a</s>"
    special = load(listed(_96=token("</s>", lstrip=True)), made=made)
    assert special.encode("a  </s>") == [64, 96]
    assert special.decode([64, 96]) == "a"


CONFLICTS = {
    "a gap": (listed(_120=token("<a>")), "'<a>' the id 120, .*the next one is 99"),
    "taken": (listed(_5=token("<a>")), "'<a>' the id 5, .*there that is '&'"),
    "elsewhere": (listed(_99=token("</s>")), "'</s>' the id 99, .*there its id is 96"),
}


@pytest.mark.parametrize("config, problem", CONFLICTS.values(), ids=CONFLICTS)
def test_a_listed_token_whose_id_cannot_be_had_is_named(load, config, problem):
    with pytest.raises(ValueError, match=f"tokenizer_config.json: added.*{problem}"):
        load(config)


@pytest.mark.parametrize("key", ["eos_token", "pad_token", "image_token"])
def test_named_tokens_are_special(load, key):
    """Those of the vocabulary are found in texts; others get the ids that follow."""
    tokenizer = load({key: token("</s>"), "unk_token": "<new>", "additional_special_"
                      "tokens": ["<s>", token("<more>")]})  # fmt: skip
    ids = tokenizer.encode("a</s><new><s><more>")
    assert ids == [64, 96, 99, 97, 100]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.special_tokens == {key: "</s>", "unk_token": "<new>"}


def test_extra_special_tokens_may_have_names(load):
    named = load({"extra_special_tokens": {"sep_token": "<s>"}})
    assert named.special_tokens == {"sep_token": "<s>"}
    assert named.encode("<s>") == [97]
    assert load({"extra_special_tokens": ["<s>"]}).encode("<s>") == [97]


def test_templates_get_the_tokens_that_the_file_names(load):
    template = "{{ bos_token }}{{ eos_token }}{{ pad_token }}"
    config = {"eos_token": "</s>", "pad_token": "<unk>", "chat_template": template}
    tokenizer = load(config, eos_ids=(5, 7))
    assert tokenizer.chat_text([]) == "</s><unk>"
    assert tokenizer.eos_ids == (5, 7, 96)  # all of them stop
    # Where it names none there is none, whatever ids stop.
    assert load({"chat_template": template}, eos_ids=(5,)).chat_text([]) == ""
    assert load({"chat_template": template, "eos_token": None}).chat_text([]) == ""


def test_what_is_loaded_is_saved(load, tmp_path):
    templates = [
        {"name": "default", "template": "{{ eos_token }}{{ pad_token }}"},
        {"name": "tool_use", "template": "tools"},
    ]
    config = {"eos_token": "</s>", "pad_token": "<p>", "chat_template": templates}
    tokenizer = load(config | listed(_99=token("<p>")), eos_ids=(5,))
    tokenizer.save(tmp_path / "saved")
    again = tokenizer_from_directory(tmp_path / "saved", eos_ids=(5,))
    assert again.special_tokens == tokenizer.special_tokens
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_ids == (5, 96)
    assert again.encode("<p></s>") == tokenizer.encode("<p></s>") == [99, 96]
    assert again.chat_text([]) == "</s><p>"


# --- Wrong files

WRONG = {
    "a list": ("[]", "must hold an object, got \\[\\]"),
    "null": ("null", "must hold an object, got None"),
    "a text": ('"x"', "must hold an object, got 'x'"),
    "damaged": ("{", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "token type": ({"eos_token": 5}, "eos_token must be a string or .*, got 5"),
    "token list": ({"bos_token": ["<s>"]}, "bos_token must be a string"),
    "token content": ({"pad_token": {}}, "pad_token must be .* with 'content'"),
    "named extra": ({"extra_special_tokens": {"a_token": 3}}, "a_token must be"),
    "extra": ({"extra_special_tokens": "<s>"}, "extra_special_tokens must be a list"),
    "extra token": (
        {"additional_special_tokens": ["<s>", 3]},
        r"additional_special_tokens\[1\] must be a string",
    ),
    "added list": ({"added_tokens_decoder": [1]}, "added_tokens_decoder must be an ob"),
    "added id": (
        listed(x=token("<a>")),
        "added_tokens_decoder must be .* ids as keys, got 'x'",
    ),
    "added entry": (listed(_99="<a>"), "added_tokens_decoder.99 must be an object"),
    "added content": (listed(_99={}), "added_tokens_decoder.99 must be a string or"),
    "added flag": (
        listed(_99=token("<a>", lstrip="no")),
        "added_tokens_decoder.99.lstrip must be true or false, got 'no'",
    ),
    "template": ({"chat_template": 3}, "chat_template must be a string or strings by"),
    "template entry": (
        {"chat_template": [{"name": "default"}]},
        r"chat_template\[0\] must be an object with 'name' and 'template'",
    ),
    "template name": ({"chat_template": [{"template": "x"}]}, r"chat_template\[0\]"),
    "template text": ({"chat_template": ["x"]}, r"chat_template\[0\] must .* got 'x'"),
    "template null": (
        {"chat_template": [{"name": "default", "template": None}]},
        r"chat_template\[0\]",
    ),
    "templates by name": ({"chat_template": {"default": 3}}, "chat_template must be"),
}


@pytest.mark.parametrize("config, problem", WRONG.values(), ids=WRONG)
def test_wrong_configurations_name_file_and_key(load, config, problem):
    with pytest.raises(
        ValueError, match=f"tokenizer_config.json:? {problem}"
    ) as caught:
        load(config)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_files_that_are_no_text_are_named(load, tmp_path, name):
    (tmp_path / name).write_bytes(b'{"x": "caf\xe9"}')
    with pytest.raises(ValueError, match=f"{name} is not UTF-8"):
        load()


def test_a_vocabulary_whose_parts_do_not_fit_is_refused():
    def made(tokens=("a", "b", "ab"), merges=("a b",), types=(1, 1, 1), **options):
        options = dict(token_types=types, pre_tokenizer="gpt-2") | options
        return tokenizer_from_vocabulary(tokens, merges, **options)

    assert made().encode("ab") == [2]
    for merges in ["a c"], ["ab"], [""]:
        with pytest.raises(ValueError, match="the merges do not fit the vocabulary"):
            made(merges=merges)
    with pytest.raises(ValueError, match="3 tokens and 2 types"):
        made(types=(1, 1))
    with pytest.raises(ValueError, match="bos_id 3 is outside the vocabulary of 3"):
        made(bos_id=3, add_bos=True)


def test_what_a_vocabulary_cannot_write_is_one_value_error():
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="the tokenizer cannot encode"):
        Tokenizer(words).encode("b")
