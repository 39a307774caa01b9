"""What options, files and a model rule out is said in one line before any work."""

import dataclasses
import json

import pytest

from experiments import models
from sparsespec_jax import save_checkpoint
from sparsespec_jax.loading.tokenizer import tokenizer_from_vocabulary

# Runs a command's checks once per list of options; what it says of each, as JSON.
DRIVER = """
import importlib, json, sys
from absl import app, flags
from experiments import experiment, launch, options
name, out, *cases = sys.argv[1:]
module = importlib.import_module(f"experiments.{name}")
kind = experiment.of_module(name) if name != "contexts" else None
kinds = [kind.Config, options.RunOptions] if kind else [module.ContextsConfig]
options.define(*kinds)
said = []
for given in map(json.loads, cases):
    flags.FLAGS.unparse_flags()
    flags.FLAGS([name, *given, f"--{out}"])
    try:
        with launch.checking():
            if kind:
                how = options.parse(options.RunOptions)
                small = kind.SMOKE if how.smoke else {}
                experiment.prepare(kind, options.parse(kind.Config, small), how)
            else:
                module.main(options.parse(*kinds))
        said.append("it ran")
    except app.UsageError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def _letters():
    """A token a character, as many as a tiny model has."""
    return tokenizer_from_vocabulary(
        [*map(chr, range(33, 127)), "\u0120", "\u010a", "<end>"],
        [],
        token_types=[1] * 96 + [3],
        pre_tokenizer="gpt-2",
        eos_ids=(96,),
        chat_template="{{ messages[0].content }}<end>",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models without and with a tokenizer, and files that do not suit them."""
    folder = tmp_path_factory.mktemp("unfit")
    model = models.tiny_model()
    save_checkpoint(model, folder / "tiny")
    save_checkpoint(dataclasses.replace(model, tokenizer=_letters()), folder / "told")
    contexts = {
        "short": [[1, 2, 3]],
        "good": [[i % 97 for i in range(90)], [5] * 70],
        "long": [[1] * 20, [1] * 4090],
        "foreign": [[1] * 20, [1, 97]],
        "empty": [],
        "hollow": [[1], []],
        "words": [[1, "a"]],
    }
    for name, value in contexts.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "torn.json").write_text("[[1, 2")
    (folder / "prompts.jsonl").write_text('{"token_ids": [1]}\n{"token_ids": [97]}\n')
    (folder / "ids.jsonl").write_text('{"token_ids": [1]}\n')
    (folder / "chat.txt").write_text("hello\n")
    return folder


MODEL = "--model=tiny"
DECODES = [MODEL, "--max_tokens=16", "--num_draft_tokens=2", "--rows=window:0.2"]
STUDY = [MODEL, "--study=ablations"]
LOAD = [MODEL, "--load=smollm2_256x4096", "--dtype=float32", "--num_requests=2",
        "--num_slots=2", "--prefill_lanes=1", "--page_size=4", "--prompt_length=8",
        "--new_tokens=8", "--num_draft_tokens=2"]  # fmt: skip
NO_TRACE = "--trace_steps=0"
CASES = {
    "acceptance": [
        (["--rows=pilar:1"], "policy must be one of"),
        (["--rows=oracle:1", "--proposer=cascade"], "selects for one query"),
        (["--rows=pillar:1", "--draft_steps=2"], "need proposer='cascade'"),
        ([*DECODES, "--contexts=empty.json"], "empty.json is not a list of contexts"),
        ([*DECODES, "--contexts=torn.json"], "torn.json is damaged"),
        ([*DECODES, "--contexts=hollow.json"], "context 1 is no list of ids"),
        ([*DECODES, "--contexts=words.json"], "context 0 is no list of ids"),
        (
            [*DECODES, "--contexts=long.json"],
            "long.json: context 1 has 4090 tokens, which with 17 behind it is more "
            "than the 4096 that tiny was made for",
        ),
        (
            [*DECODES, "--contexts=foreign.json"],
            "foreign.json: context 1 has the token id 97, the vocabulary of tiny ends",
        ),
        (DECODES, "there are none for --model=tiny: write some with"),
        ([*DECODES, "--rows=window"], "takes policy:budget_ratio, got 'window'"),
        ([*DECODES, "--contexts=good.json", "--temperature=-1"], "temperature"),
        ([*DECODES, "--contexts=good.json", "--impl=gpu"], "impl='gpu' needs a GPU"),
        ([*DECODES, "--contexts=good.json", "--page_size=999999999"], "GiB"),
    ],
    "study": [
        ([*STUDY, "--contexts=none.json"], "there is no file none.json"),
        (STUDY, "there are none for --model=tiny: write some with"),
        (["--study=lader"], "study must be one of"),
        (["--smoke", "--continuations=none"], "there is no file none"),
        ([*STUDY, "--contexts=empty.json"], "empty.json is not a list of contexts"),
        ([*STUDY, "--contexts=long.json"], "context 1 has 4090 tokens, which with 97"),
        ([*STUDY, "--contexts=foreign.json"], "context 1 has the token id 97"),
        (
            [*STUDY, "--contexts=short.json", "--mode=replay"],
            "no row can be measured: context 0 has 3 tokens, a replay of 8 drafts "
            "needs 10",
        ),
        (
            [*STUDY, "--contexts=good.json", "--mode=replay", "--max_tokens=20"],
            "a replay of two cycles of 8 drafts needs 26 tokens, --max_tokens gives 21",
        ),
        (
            [MODEL, "--study=sweep_context", "--contexts=good.json"],
            "no row can be measured: no context has a length in [500, 1000)",
        ),
        (
            [MODEL, "--study=ladder", "--contexts=good.json", "--mode=decode"],
            "leave no row to measure",
        ),
        ([*STUDY, "--contexts=good.json", "--known=nowhere"], "nowhere/results.jsonl"),
        ([*STUDY, "--contexts=good.json", "--part=3/2"], "--part is i/n"),
        ([*STUDY, "--contexts=good.json", "--continuations=no"], "there is no file no"),
        ([*STUDY, "--contexts=good.json", "--impl=gpu"], "impl='gpu' needs a GPU"),
    ],
    "train_eagle": [
        ([MODEL, "--contexts=none.json"], "there is no file none.json"),
        ([MODEL], "there are none for --model=tiny: write some with"),
        (
            [MODEL, "--contexts=short.json", "--held_out=good.json"],
            "short.json, to train on: context 0 has 3 tokens, 66 are needed",
        ),
        (
            [MODEL, "--contexts=good.json", "--held_out=long.json"],
            "long.json: context 1 has 4090 tokens, which with 97",
        ),
        ([MODEL, "--contexts=good.json"], "2 texts leave none after 2 held out"),
        (
            [MODEL, "--contexts=good.json", "--held_out=good.json", "--impl=gpu"],
            "impl='gpu' needs a GPU",
        ),
    ],
    "contexts": [
        ([MODEL, "--ranges=10-5"], "--ranges takes low-high"),
        ([MODEL, "--temperatures=warm"], "could not convert string to float: 'warm'"),
        ([MODEL, "--temperatures=-1"], "temperature"),
        ([MODEL], "'tiny' has no tokenizer"),
        ([MODEL, "--num_prefixes=3", "--prompts=prompts.jsonl"], "holds 2 of 3"),
    ],
    "divergence": [
        (["--model=nowhere"], "there is no model at 'nowhere'"),
        ([MODEL, "--prompts=ids.jsonl", "--max_tokens=4096"], "was made for 4096"),
        ([MODEL, "--prompts=prompts.jsonl"], "prompt 1: token id 97 is outside"),
        ([MODEL, "--prompts=chat.txt"], "prompt 0: a chat prompt needs a tokenizer"),
    ],
    "lossless": [
        ([MODEL], "'tiny' has no tokenizer"),
        ([MODEL, "--temperatures=warm"], "could not convert string to float: 'warm'"),
        ([MODEL, "--lags="], "--lags is empty"),
        (["--model=told", "--lags=7"], "lag must be an integer in [0, 2], got 7"),
        (["--model=told", "--max_tokens=4000"], "was made for 4096"),
    ],
    "throughput": [
        ([*LOAD], "a trace needs a GPU, this process has none: give --trace_steps=0"),
        ([*LOAD, NO_TRACE, "--new_tokens=1"], "new_tokens must be at least 2, got 1"),
        ([*LOAD, NO_TRACE, "--max_length=15"], "make 16, max_length is 15"),
        ([*LOAD, NO_TRACE, "--kv_gib=1e-9"], "kv_gib is 1e-09, a page has"),
        ([*LOAD, NO_TRACE, "--kv_gib=3e-6"], "the pool has 1: raise num_pages"),
        ([*LOAD, NO_TRACE, "--prompt_length=0"], "prompt 0: a chat prompt needs a tok"),
    ],
    "offload": [
        ([], "a trace needs a GPU, this process has none: give --notrace"),
        (["--notrace", "--lag=7"], "lag must be an integer in [0, 2], got 7"),
    ],
    "speedup_map": [
        (["--choices=4,8"], "choices must hold 0"),
        (["--load=smollm2_256x4096"], "has no preset: name --model"),
        (["--slots=8,900"], "900 slots can hold only ["),
    ],
    "step_time": [
        ([], "this process has none: give --trace_steps=0"),
        (["--scope=head"], "scope must be one of"),
        (["--policy=nothing"], "policy must be one of"),
    ],
    "host_cost": [
        (["--num_requests=many"], "invalid literal for int() with base 10: 'many'"),
        (["--num_requests=4,0"], "num_requests must be at least 1, got 0"),
    ],
    "simulate": [(["--scale=7"], "scale must divide page_size 64, is 7")],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_before_the_work(parent, folder, name):
    options = [json.dumps(options) for options, _ in CASES[name]]
    output = f"output={folder / 'out'}"
    done = parent.run(DRIVER, name, output, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    for (options, message), found in zip(CASES[name], said, strict=True):
        assert message in found and "\n" not in found, (options, found)
    assert not (folder / "out").exists()
