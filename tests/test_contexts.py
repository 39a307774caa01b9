"""Contexts of the acceptance experiment, and both long experiments in small."""

import collections
import dataclasses
import itertools
import json
import subprocess
import sys
import types

import pytest
from absl import app

from experiments import (
    context_files,
    contexts,
    measure,
    models,
    prompts,
    record,
)
from experiments.options import make
from experiments.studies import sweep_context
from experiments.throughput import ThroughputConfig, make_prompts
from sparsespec_jax.loading.tokenizer import tokenizer_from_vocabulary


@pytest.mark.parametrize(
    ("make", "most"), [(prompts.essays, 32), (prompts.reasoning, 16)]
)
def test_prompts_are_different_and_repeatable(make, most):
    first = make(most)
    assert len({str(p) for p in first}) == most
    assert make(5) == first[:5]
    with pytest.raises(ValueError, match=f"at most {most}.*got {most + 1}"):
        make(most + 1)


def test_cut_gives_one_context_per_text_and_range():
    texts = [list(range(3000)), list(range(1500))]
    got = contexts.cut(texts, seed=3)
    lengths = [len(c) for c in got]
    assert len(lengths) == 4  # the short text reaches one range only
    for length, (low, high) in zip(
        lengths, [*contexts.RANGES, contexts.RANGES[0]], strict=True
    ):
        assert low <= length < high
    assert all(c == list(range(len(c))) for c in got)
    assert contexts.cut(texts, seed=3) == got != contexts.cut(texts, seed=4)


def test_is_looping_sees_loops_and_nothing_else():
    assert contexts.is_looping(list(range(10)) * 6)
    assert not contexts.is_looping(list(range(96)))
    assert not contexts.is_looping(list(range(80)) + list(range(16)))
    assert not contexts.is_looping([1, 2, 3])


# --- Prompts over files


@pytest.fixture(scope="module")
def tokenizer():
    """A token a character, so that lengths can be told by eye."""
    tokens = [*map(chr, range(33, 127)), "\u0120", "\u010a", "<end>"]
    return tokenizer_from_vocabulary(
        tokens,
        [],
        token_types=[1] * 96 + [3],
        pre_tokenizer="gpt-2",
        eos_ids=(96,),
        chat_template="{{ messages[0].content }}<end>",
    )


LENGTHS, COUNT = (1500, 4000), 10


@pytest.fixture(scope="module")
def made(tokenizer):
    return context_files.file_prompts(tokenizer, lengths=LENGTHS, count=COUNT, seed=3)


def test_file_prompts_have_the_lengths_asked_for(made):
    for prompt in made:
        assert prompt.target <= len(prompt.ids) <= prompt.target * 33 / 32
        assert prompt.described()["tokens"] == len(prompt.ids)
    assert [prompt.target for prompt in made] == [*LENGTHS] * COUNT


def test_file_prompts_are_of_all_kinds_and_origins(made):
    kinds = collections.Counter(prompt.kind for prompt in made)
    assert set(kinds) == {"free", "copied", "reasoning"} and min(kinds.values()) >= 4
    origins = {prompt.origin for prompt in made}
    assert {"python", "numpy", "jax", "flax"} < origins
    assert any("reference" in origin for origin in origins)


def test_no_text_is_asked_about_twice(made, tokenizer):
    texts = [(prompt.origin, prompt.name) for prompt in made]
    assert len(set(texts)) == len(texts)
    for one, other in itertools.combinations(made, 2):  # licences may be the same
        assert one.ids[900:1100] != other.ids[900:1100]


def test_file_prompts_follow_from_the_seed(made, tokenizer):
    again = context_files.file_prompts(tokenizer, lengths=LENGTHS, count=COUNT, seed=3)
    assert again == made
    other = context_files.file_prompts(tokenizer, lengths=(1500,), count=2, seed=4)
    assert not {prompt.ids for prompt in other} & {prompt.ids for prompt in made}


def test_a_prompt_shows_the_file_and_what_is_asked(made, tokenizer):
    code = next(prompt for prompt in made if prompt.origin == "jax")
    text = tokenizer.decode(code.ids, skip_special_tokens=False)
    assert text.startswith(f"This is the file `{code.name}` of jax, its first ")
    shown = text.partition("```python\n")[2].partition("\n```\n\n")
    source = next(
        "".join(text.lines)
        for text in context_files.code_texts()
        if (text.origin, text.name) == ("jax", code.name)
    )
    assert source.isascii() and source.startswith(shown[0] + "\n")
    assert shown[2].endswith(".<end>") and len(shown[2]) > 100


def test_sources_are_code_and_nobodys_tests():
    texts = context_files.code_texts()
    assert {text.origin for text in texts} == {"python", *context_files.PACKAGES}
    for text in texts:
        assert not {"test", "tests", "site-packages"} & {*text.name.split("/")}
        assert max(map(len, text.lines)) <= 200
    names = {text.name for text in texts if text.origin == "python"}
    assert "argparse.py" in names and "html/entities.py" not in names


def test_contexts_of_a_load_are_told_apart_by_their_noise(tokenizer):
    load = ThroughputConfig(context_length=600, num_contexts=2, num_requests=3)
    model = types.SimpleNamespace(require_tokenizer=lambda: tokenizer)
    first, second, third = make_prompts(load, model)
    assert first == third != second
    assert all(600 <= len(prompt) < 620 for prompt in (first, second))


def test_too_many_texts_are_refused(tokenizer):
    message = "no text is left for prompt .* of 9 with 500000 tokens"
    with pytest.raises(ValueError, match=message):
        context_files.file_prompts(tokenizer, lengths=(500_000,), count=9, seed=0)


@pytest.fixture
def tiny_reader(monkeypatch, tiny_model, tokenizer):
    """The tiny model, which can read, and stops at its last token."""
    config = dataclasses.replace(tiny_model.config, eos_ids=(96,))
    model = dataclasses.replace(tiny_model, tokenizer=tokenizer, config=config)
    monkeypatch.setattr(models, "load", lambda name, dtype: model)
    return model


def config_of(tmp_path, **values):
    paths = {"output": str(tmp_path / "c.json")}
    return make(contexts.ContextsConfig, paths | {"source": "files"} | values)


def test_contexts_over_files_are_written_and_continued(tmp_path, tiny_reader, capsys):
    plain = tmp_path / "plain.json"
    config = config_of(
        tmp_path, lengths=(1000,), num_prefixes=2, continuations=str(plain),
        temperatures=(0.0, 1.0), max_tokens=40, num_slots=2, prefill_chunk=256,
    )  # fmt: skip
    contexts.main(config)
    found = contexts.load_contexts(tmp_path / "c.json")
    assert [1000 <= len(ids) <= 1031 for ids in found] == [True, True]
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["sha256"] == contexts.hash_of(found)
    assert written["versions"].keys() == {"python", "numpy", "jax", "flax"}
    assert written["options"]["lengths"] == [1000]
    assert str(tmp_path) not in (tmp_path / "c.json").read_text()
    assert [prompt["tokens"] for prompt in written["prompts"]] == [*map(len, found)]
    law = dict(max_tokens=41, seed=0)
    texts = contexts.load_continuations(plain, found, tiny_reader, **law)
    assert [len(text) for text in texts[1.0]] == [41, 41]
    counted = json.loads(plain.read_text())
    for heat in (0.0, 1.0):
        looping = sum(map(contexts.is_looping, texts[heat]))
        assert counted["num_looping"][str(heat)] == looping
        assert counted["num_past_end"][str(heat)] == sum(96 in t for t in texts[heat])
    assert counted["num_looping"]["0.0"] > 0  # a random model repeats itself
    assert f"SHA-256 {written['sha256']}" in capsys.readouterr().out


def test_contexts_over_files_need_no_engine(tmp_path, tiny_reader, monkeypatch):
    monkeypatch.setattr(contexts, "Engine", None)
    contexts.main(config_of(tmp_path, lengths=(1000, 2000), num_prefixes=1))
    found = contexts.load_contexts(tmp_path / "c.json")
    assert [len(ids) // 1000 for ids in found] == [1, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"lengths": (4000,), "num_prefixes": 1, "continuations": "x"},
            "4096 that tiny",
        ),
        ({"prompts": "x.txt"}, "--prompts is of own text"),
        ({"source": "reasoning", "num_prefixes": 17}, "at most 16 for reasoning"),
    ],
)
def test_what_cannot_be_made_is_said_first(tmp_path, tiny_reader, values, message):
    with pytest.raises(app.UsageError, match=message):
        contexts.main(config_of(tmp_path, **values))
    assert not (tmp_path / "c.json").exists()


def test_defaults_are_those_of_the_source(tmp_path):
    files, own = config_of(tmp_path), config_of(tmp_path, source="essays")
    assert config_of(tmp_path, source="reasoning").num_prefixes == 16
    assert (files.max_tokens, files.num_prefixes) == (256, 10)
    assert (own.max_tokens, own.num_prefixes) == (96, 24)
    assert config_of(tmp_path, max_tokens=300).max_tokens == 300


def test_changed_contexts_are_refused(tmp_path):
    path = tmp_path / "c.json"
    contexts.write_contexts(path, [[1, 2], [3]])
    assert contexts.load_contexts(path) == [[1, 2], [3]]
    path.write_text(path.read_text().replace("[[1, 2], [3]]", "[[1], [2, 3]]"))
    with pytest.raises(ValueError, match="c.json names the SHA-256 .* were changed"):
        contexts.load_contexts(path)
    path.write_text("[[1, 2]]")
    assert contexts.load_contexts(path) == [[1, 2]]
    path.write_text('{"contexts": 5}')
    with pytest.raises(ValueError, match="not a list of contexts"):
        contexts.load_contexts(path)


def test_the_tables_reach_32k():
    """Each length of a prompt over files falls into a range of its own, and a row."""
    ranges = [*measure._OTHERS, *measure._RANGES]
    homes = []
    for length in contexts.ContextsConfig(output="x").lengths:
        both = {
            span
            for tokens in (length, length + length // 32)
            for span in ranges
            if span[0] <= tokens < span[1]
        }
        assert len(both) == 1
        homes += both
    assert len(set(homes)) == len(homes) and set(homes) == {*sweep_context.RANGES}
    ends = sorted(ranges)
    assert [low for low, _ in ends[1:]] == [high for _, high in ends[:-1]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_acceptance_and_lossless_run_in_small(tmp_path):
    module = [sys.executable, "-m"]
    out, texts = tmp_path / "acceptance", tmp_path / "contexts.json"
    command = [
        *module, "experiments.contexts", "--num_prefixes=2", "--ranges=500-1000",
        f"--output={texts}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    command = [
        *module, "experiments.acceptance", f"--contexts={texts}", "--max_tokens=20",
        "--num_slots=2", "--rows=full:1,window:0.05", f"--output={out}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    full, window = record.load(out)[1]
    assert full["accepted_histogram"][:-1] == [0] * 8
    assert window["identical_contexts"] == full["identical_contexts"] == 2
    out = tmp_path / "lossless"
    command = [
        *module, "experiments.lossless", "--num_requests=1", "--max_tokens=40",
        "--lags=0,2", "--page_sizes=16", f"--output={out}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    rows = record.load(out)[1]
    assert [row["num_differing_tokens"] for row in rows] == [0, 0]
