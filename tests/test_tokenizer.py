"""Tokenizers: ids against llama.cpp's, chat templates, and the default model."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsespec_jax.host.text import OutputText
from sparsespec_jax.loading.tokenizer import (
    PRE_TOKENIZERS,
    Tokenizer,
    tokenizer_from_directory,
    tokenizer_from_vocabulary,
)
from sparsespec_jax.models.config import PRESETS
from tests.model_files import logits_of_text

GOLDENS = Path(__file__).parent / "goldens"

# Ours, plain narrative English: what the model finds easiest.
PROSE = """\
The old lighthouse stood on the edge of the cliff, where it had watched over the sea \
for more than a hundred years. Its keeper, a quiet man named Thomas, climbed the \
narrow stairs every evening to light the lamp. He had no family left in the village, \
but the fishermen knew him well, and on stormy nights they were grateful for the \
steady beam that guided them home. One winter, the wind blew so hard that the windows \
rattled and the waves crashed against the rocks below. Thomas stayed awake until dawn, \
feeding the lamp with oil and listening to the thunder. In the morning, when the storm \
had passed, he found a small boat washed up on the beach, and beside it a young woman \
wrapped in a wet blanket.

Economists had expected prices to fall after the harvest, but they did not. Merchants \
in the larger towns bought up most of the grain before it reached the markets, and \
the railway, which might have carried supplies from the south, was closed for repairs \
until the end of the year. By December the council was forced to act. It bought flour \
at its own expense and sold it at the old price from two warehouses near the river."""


@pytest.fixture(scope="session")
def default_tokenizer(default_model):
    return default_model.require_tokenizer()


# --- The default model's tokenizer


def test_ids_equal_those_of_llama_cpp(default_tokenizer):
    """Digits, markers, spaces, accents, control bytes; ids by llama.cpp's `smollm`."""
    rows = json.loads((GOLDENS / "default_tokenizer.json").read_text())
    assert len(rows) == 12
    for row in rows:
        assert default_tokenizer.encode(row["text"]) == row["ids"], row["text"]


def test_digits_are_tokens_of_their_own(default_tokenizer):
    # The vocabulary has "0" at 32; merges would join digits if they were let.
    assert default_tokenizer.encode("1024") == [33, 32, 34, 36]


def test_chat_markers_are_single_tokens_and_no_bos_is_added(default_tokenizer):
    ids = default_tokenizer.encode("<|im_start|>x<|im_end|>")
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 3)
    assert default_tokenizer.encode("x") == ids[1:-1]
    assert (default_tokenizer.bos_id, default_tokenizer.eos_ids) == (1, (2, 0))
    specials = [default_tokenizer.decode([i]) for i in range(17)]
    assert specials == [""] * 17
    kept = default_tokenizer.decode(ids, skip_special_tokens=False)
    assert kept == "<|im_start|>x<|im_end|>"


def test_the_chat_template_adds_the_default_system_turn(default_tokenizer):
    question = [{"role": "user", "content": "Hi"}]
    text = default_tokenizer.chat_text(question)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    system = {"role": "system", "content": "Be brief."}
    text = default_tokenizer.chat_text([system, *question], add_generation_prompt=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
    ids = default_tokenizer.encode_chat([system, *question])
    assert ids[:3] == [1, 9690, 198]
    assert ids[-4:] == [1, 520, 9531, 198]


@pytest.mark.parametrize(
    "text", ["", " ", PROSE, "naïve café 日本語 😀", "a\n\n\tb  c\r\n"]
)
def test_text_survives_the_round_trip(default_tokenizer, text):
    assert default_tokenizer.decode(default_tokenizer.encode(text)) == text


def test_a_stream_gives_whole_characters_only(default_tokenizer):
    text = "日本語 😀 naïve"
    ids = default_tokenizer.encode(text)
    stream, pieces = OutputText(default_tokenizer, ()), []
    for token in ids:
        stream.push([token])
        pieces.append(stream.take())
    assert "".join(pieces) == text
    assert "" in pieces  # characters of several tokens
    assert not any("\ufffd" in piece for piece in pieces)


# --- The default model itself (its file is what its tokenizer comes from)


def mean_nll(model, text):
    tokens = jnp.array(model.require_tokenizer().encode(text), jnp.int32)
    law = jax.nn.log_softmax(logits_of_text(model, tokens)[:-1])
    return float(-jnp.take_along_axis(law, tokens[1:, None], axis=1).mean())


def test_the_default_model_predicts_english(default_model):
    preset = PRESETS["smollm2-135m"]
    assert default_model.config == dataclasses.replace(preset, eos_ids=(2, 0))
    nats = mean_nll(default_model, PROSE)
    print(f"default model: {nats:.3f} nats a token")
    # With the pairs of Q and K rows left as stored it is 4.8 to 5.6.
    assert 2.0 < nats < 3.6


def test_the_default_models_logits_equal_those_of_transformers(default_model):
    with np.load(GOLDENS / "default_model.npz") as expected:
        tokens, stride, wanted = (
            expected[key] for key in ("tokens", "stride", "logits")
        )
    error = np.abs(logits_of_text(default_model, tokens)[:, ::stride] - wanted).max()
    print(f"default model: largest error {error:.2e}, logits spread {wanted.std():.1f}")
    assert error < 1e-3


# --- Other vocabularies


def byte_vocabulary(*words):
    """All printable ASCII as single tokens, then words made by merges."""
    tokens = [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ"]
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
                tokens.append(word[:end])
    return tokens, merges


def pieces(tokenizer, text):
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("pre_tokenizer", "wanted"),
    [
        # GPT-2: runs of digits whole, a space joins what follows.
        ("gpt-2", ["x", "Ġ", "1", "2345", "..."]),
        ("smollm", ["x", "Ġ", "1", "2", "3", "4", "5", "..."]),
        ("qwen2", ["x", "Ġ", "1", "2", "3", "4", "5", "..."]),
        # Llama 3: digits in threes from the left.
        ("llama-bpe", ["x", "Ġ", "1", "23", "4", "5", "..."]),
    ],
)
def test_pre_tokenizers_split_digits_as_published(pre_tokenizer, wanted):
    tokens, merges = byte_vocabulary("2345", "...")
    tokenizer = tokenizer_from_vocabulary(
        tokens,
        merges,
        token_types=[1] * len(tokens),
        pre_tokenizer=pre_tokenizer,
    )
    assert pieces(tokenizer, "x 12345...") == wanted
    assert tokenizer.decode(tokenizer.encode("x 12345...")) == "x 12345..."


def test_an_unknown_pre_tokenizer_is_not_guessed():
    with pytest.raises(ValueError, match="'tekken' is not known; supported.*smollm"):
        tokenizer_from_vocabulary(["a"], [], token_types=[1], pre_tokenizer="tekken")
    assert "smollm" in PRE_TOKENIZERS


def test_bos_is_added_when_the_vocabulary_says_so():
    tokens, merges = byte_vocabulary()
    tokenizer = tokenizer_from_vocabulary(
        [*tokens, "<s>"],
        merges,
        token_types=[1] * len(tokens) + [3],
        pre_tokenizer="llama-bpe",
        bos_id=len(tokens),
        add_bos=True,
    )
    assert pieces(tokenizer, "ab") == ["<s>", "a", "b"]
    assert len(tokenizer.encode("ab", add_special_tokens=False)) == 2


# --- Hugging Face directories


@pytest.fixture
def saved(tmp_path):
    tokens, merges = byte_vocabulary("hello")
    tokenizer = tokenizer_from_vocabulary(
        [*tokens, "<s>", "</s>"],
        merges,
        token_types=[1] * len(tokens) + [3, 3],
        pre_tokenizer="qwen2",
        bos_id=len(tokens),
        eos_ids=(len(tokens) + 1,),
        chat_template="{{ bos_token }}{% for m in messages %}\n"
        "  {%- if m.role == 'x' %}{{ raise_exception('no x') }}{% endif %}\n"
        "{{ m.content | tojson }}{% endfor %}"
        "{{ eos_token if closed else '' }}",
    )
    tokenizer.save(tmp_path)
    return tmp_path, tokenizer


def test_a_saved_tokenizer_comes_back(saved):
    folder, tokenizer = saved
    again = tokenizer_from_directory(folder, eos_ids=(5,))
    assert again.encode("hello<s>123") == tokenizer.encode("hello<s>123")
    assert again.bos_id == tokenizer.bos_id
    assert again.eos_ids == (5, *tokenizer.eos_ids)
    assert again.chat_template == tokenizer.chat_template
    assert again.vocab_size == tokenizer.vocab_size
    assert again.token_id("hello") == tokenizer.token_id("hello")
    with pytest.raises(ValueError, match="no token 'goodbye'"):
        again.token_id("goodbye")


def test_chat_templates_get_their_variables_and_may_refuse(saved):
    _, tokenizer = saved
    message = {"role": "user", "content": "<b> é"}
    assert tokenizer.chat_text([message], closed=True) == '<s>"<b> é"</s>'
    with pytest.raises(ValueError, match="chat template failed in line 2: no x"):
        tokenizer.chat_text([{"role": "x", "content": ""}])
    bare = Tokenizer(tokenizer.backend)
    with pytest.raises(ValueError, match="no chat template"):
        bare.chat_text([message])


def test_templates_cannot_reach_python(saved):
    _, tokenizer = saved
    tokenizer.chat_template = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(ValueError, match="chat template failed.*unsafe"):
        tokenizer.chat_text([])


def test_other_places_of_templates_and_special_tokens(saved):
    folder, tokenizer = saved
    path = folder / "tokenizer_config.json"
    described = {
        "eos_token": {"content": "</s>", "lstrip": False},
        "chat_template": [
            {"name": "tool_use", "template": "tools{{ tools | length }}"},
            {"name": "default", "template": "plain"},
        ],
    }
    path.write_text(json.dumps(described))
    again = tokenizer_from_directory(folder)
    assert again.chat_text([]) == "plain"
    assert again.chat_text([], tools=[{"name": "f"}]) == "tools1"
    assert (again.bos_id, again.eos_ids) == (None, tokenizer.eos_ids)
    (folder / "chat_template.jinja").write_text("beside")
    assert tokenizer_from_directory(folder).chat_template == "beside"


def test_missing_and_damaged_files_are_named(saved, tmp_path_factory):
    folder, _ = saved
    with pytest.raises(ValueError, match="no tokenizer.json.*save_pretrained"):
        tokenizer_from_directory(tmp_path_factory.mktemp("empty"))
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[:100])
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        tokenizer_from_directory(folder)
    (folder / "tokenizer.json").write_text(whole)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        tokenizer_from_directory(folder)
