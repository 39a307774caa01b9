"""A run is gone on with only with the prompts, the model and the settings it had."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from experiments import fingerprint, generate, models, record
from experiments.config import GenerateConfig
from experiments.record import RunDirectory, RunError
from sparsespec_jax import save_checkpoint
from sparsespec_jax.loading.tokenizer import Tokenizer
from sparsespec_jax.models.transformer import params_dtype

# -- the rule ------------------------------------------------------------------------

PROMPTS = ["a1", "b2", "c3", "a1"]
INPUTS = {"launcher": "generate", "prompts": PROMPTS, "weights": "d4", "kernels": "gpu"}


@pytest.fixture
def begun(tmp_path):
    """A run of INPUTS that was interrupted before its first request was finished."""
    path = tmp_path / "run"
    with RunDirectory(path, config={"seed": 3}, inputs=INPUTS, resume=False) as run:
        run.append_to_journal([{"index": 0, "first": 0, "token_ids": [1]}])
    return path


def reopen(path, **changes):
    inputs = INPUTS | changes
    return RunDirectory(path, config={"seed": 3}, inputs=inputs, resume=True)


def test_the_same_inputs_go_on(begun):
    with reopen(begun) as run:
        assert run.journal == [{"index": 0, "first": 0, "token_ids": [1]}]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["x0", *PROMPTS[1:]], "prompt 0 was changed (4 then, 4 now)"),
        ([*PROMPTS[:3], "x0"], "prompt 3 was changed (4 then, 4 now)"),
        ([PROMPTS[0], "x0", *PROMPTS[1:]], "prompt 1 was added (4 then, 5 now)"),
        ([*PROMPTS, "x0"], "prompt 4 was added (4 then, 5 now)"),
        ([*PROMPTS, "a1"], "prompt 4 was added (4 then, 5 now)"),
        (PROMPTS[1:], "prompt 0 was removed (4 then, 3 now)"),
        (["a1", "c3", "a1"], "prompt 1 was removed (4 then, 3 now)"),
        (PROMPTS[:3], "prompt 3 was removed (4 then, 3 now)"),
        ([], "prompt 0 was removed (4 then, 0 now)"),
        (["b2", "a1", "c3", "a1"], "prompt 0 is in another place (reordered)"),
        (["a1", "c3", "b2", "a1"], "prompt 1 is in another place (reordered)"),
    ],
)
def test_other_prompts_are_refused_with_the_first_one_that_differs(
    begun, prompts, message
):
    before = (begun / "journal.jsonl").read_bytes()
    with pytest.raises(RunError) as found:
        reopen(begun, prompts=prompts)
    assert message in str(found.value) and "\n" not in str(found.value)
    assert (begun / "journal.jsonl").read_bytes() == before


def test_whatever_else_differs_is_named_with_both_values(begun):
    with pytest.raises(RunError, match="weights was 'd4', now 'e5'; kernels was 'gpu'"):
        reopen(begun, weights="e5", kernels="reference")
    with pytest.raises(RunError, match="XLA_FLAGS was None, now '--fast'"):
        reopen(begun, XLA_FLAGS="--fast")  # a version that recorded less


def test_a_run_of_another_launcher_is_named_before_its_flags(begun):
    with pytest.raises(RunError, match="holds a run of experiments.generate: name"):
        record.check(begun, config={"k": 1}, inputs={"launcher": "study"}, resume=True)


def test_what_is_known_early_is_checked_early(begun):
    known = dict(config={"seed": 3}, resume=True)
    record.check(begun, inputs={"launcher": "generate"}, **known)
    with pytest.raises(RunError, match="kernels was 'gpu', now 'tpu'"):
        record.check(begun, inputs={"launcher": "generate", "kernels": "tpu"}, **known)


def test_a_run_that_does_not_say_what_it_was_made_of_is_refused(begun):
    (begun / "inputs.json").unlink()
    with pytest.raises(RunError, match="no inputs.json: an earlier version wrote it"):
        reopen(begun)


@pytest.mark.parametrize("name", ["inputs.json", "config.json"])
@pytest.mark.parametrize("text", ["[]", "{", "null"])
def test_damaged_files_are_named(begun, name, text):
    (begun / name).write_text(text)
    with pytest.raises(RunError, match=rf"{name} is damaged"):
        reopen(begun)


def test_unfinished_requests_are_a_run_too(begun):
    """Starting anew would throw their tokens away."""
    with pytest.raises(RunError, match="already holds a run: add --resume"):
        RunDirectory(begun, config={"seed": 3}, inputs=INPUTS, resume=False)


def test_a_run_that_got_nowhere_starts_anew_with_other_inputs(tmp_path):
    for seed, inputs in ((3, INPUTS), (4, INPUTS | {"prompts": ["x0"]})):
        options = dict(config={"seed": seed}, inputs=inputs, resume=False)
        with RunDirectory(tmp_path / "run", **options) as run:
            run.write_environment({})
    assert record.read_json(tmp_path / "run" / "inputs.json")["prompts"] == ["x0"]
    assert run.session == 0


def test_other_devices_and_versions_are_noted_and_go_on(begun, capsys):
    was = {"devices": ["H100"], "packages": {"jax": "1.0", "flax": "2.0"}}
    now = {"devices": ["A100"], "packages": {"jax": "1.1", "flax": "2.0"}}
    record.write_json(begun / "environment.json", was)
    with reopen(begun) as run:
        run.write_environment(now)
    said = capsys.readouterr().err
    assert "device was 'H100', now 'A100'; jax was '1.0', now '1.1'" in said
    assert said.count("\n") == 1 and "flax" not in said
    assert record.read_json(begun / "environment.resume1.json") == now


# -- the hashes ----------------------------------------------------------------------


def inputs_of(model, **parts):
    return fingerprint.of_run("generate", model, impl="reference", **parts)


def differing(left, right):
    return {name for name in left | right if left.get(name) != right.get(name)}


def byte_level():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Tokenizer(backend, chat_template="{{ messages[0]['content'] }}")


@pytest.fixture(scope="module")
def spoken():
    """The tiny model with a tokenizer and a chat template."""
    return dataclasses.replace(models.tiny_model(), tokenizer=byte_level())


def test_equal_inputs_have_equal_hashes_of_json(spoken):
    found = inputs_of(spoken, prompts=[[1, 2], [3]], policy_file=None)
    assert json.loads(json.dumps(found)) == found
    assert found == inputs_of(spoken, prompts=[(1, 2), np.array([3])], policy_file=None)
    assert found["policy_file"] is None and len(found["prompts"]) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_changed_bit_of_any_tensor_changes_the_weights(tiny_model, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), tiny_model.params)
    before = fingerprint.of_model(dataclasses.replace(tiny_model, params=params))
    rng, bits = np.random.default_rng(0), f"uint{8 * params_dtype(params).itemsize}"
    leaves, tree = jax.tree.flatten(params)
    for number, leaf in enumerate(leaves):
        flat = np.asarray(jax.lax.bitcast_convert_type(leaf, bits)).reshape(-1).copy()
        flat[rng.integers(flat.size)] ^= 1 << rng.integers(8 * flat.itemsize)
        new = jax.lax.bitcast_convert_type(jnp.asarray(flat.reshape(leaf.shape)), dtype)
        changed = [*leaves[:number], new, *leaves[number + 1 :]]
        params = jax.tree.unflatten(tree, changed)
        after = fingerprint.of_model(dataclasses.replace(tiny_model, params=params))
        assert differing(before, after) == {"weights"}


def test_swapped_values_and_tensors_change_the_weights(tiny_model):
    before = fingerprint.of_model(tiny_model)
    layers = {"layer_0": tiny_model.params["layer_1"]}
    layers["layer_1"] = tiny_model.params["layer_0"]
    table = tiny_model.params["embed"]["weight"]
    reversed_table = {"embed": {"weight": table[::-1]}}
    as_bfloat16 = {"embed": {"weight": table.astype(jnp.bfloat16)}}
    for changes in (layers, reversed_table, as_bfloat16):
        model = dataclasses.replace(tiny_model, params=tiny_model.params | changes)
        assert differing(before, fingerprint.of_model(model)) == {"weights"}


def test_configuration_tokenizer_and_template_have_hashes_of_their_own(spoken):
    before = fingerprint.of_model(spoken)
    config = dataclasses.replace(spoken.config, eos_ids=(5,))
    other = dataclasses.replace(spoken, config=config)
    assert differing(before, fingerprint.of_model(other)) == {"model_config"}

    def with_tokenizer(change):
        tokenizer = byte_level()
        change(tokenizer)
        return fingerprint.of_model(dataclasses.replace(spoken, tokenizer=tokenizer))

    def template(tokenizer):
        tokenizer.chat_template = "{{ messages[0]['content'] }}!"

    assert differing(before, with_tokenizer(template)) == {"chat_template"}
    for change in (
        lambda tokenizer: tokenizer.backend.add_special_tokens(["<new>"]),
        lambda tokenizer: tokenizer.backend.enable_padding(length=8),
        lambda tokenizer: setattr(tokenizer, "bos_id", 3),
        lambda tokenizer: tokenizer.special_tokens.update(bos_token="a"),
    ):
        assert differing(before, with_tokenizer(change)) == {"tokenizer"}


def test_settings_that_round_otherwise_are_inputs(spoken, monkeypatch):
    before = inputs_of(spoken)
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_dump_to=/x --xla_b=2")
    some = inputs_of(spoken)
    assert differing(before, some) == {"XLA_FLAGS"}
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=2  --xla_a=1")
    assert inputs_of(spoken) == some
    monkeypatch.setenv("XLA_FLAGS", before["XLA_FLAGS"])
    with jax.default_matmul_precision("bfloat16"):
        assert differing(before, inputs_of(spoken)) == {"jax_default_matmul_precision"}
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert differing(before, inputs_of(spoken)) == {"NVIDIA_TF32_OVERRIDE"}


# -- the command ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """(folder of the model, prompts and run; the command's options) of a run begun."""
    folder = tmp_path_factory.mktemp("agreement")
    lines = [json.dumps({"token_ids": [1 + i, 2, 3]}) for i in range(4)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    save_checkpoint(models.tiny_model(), folder / "model")
    options = dict(
        model=str(folder / "model"), prompts=str(folder / "prompts.jsonl"),
        max_tokens=40, num_slots=2, page_size=4, prefill_chunk=8, num_draft_tokens=3,
    )  # fmt: skip
    config = GenerateConfig(**options)
    inputs = generate.Generate(config).inputs()
    begin = dict(config=config.recorded(), inputs=inputs, resume=False)
    with RunDirectory(folder / "run", **begin) as run:
        run.append_to_journal([{"mode": "plain", "index": 0, "first": 0}])
    return folder, [f"--{name}={value}" for name, value in options.items()]


def test_the_command_refuses_other_prompts_and_another_model(interrupted, tmp_path):
    folder, options = interrupted
    shutil.copytree(folder / "run", tmp_path / "study")
    (tmp_path / "study" / "inputs.json").write_text('{"launcher": "study"}')
    lines = (folder / "prompts.jsonl").read_text().split("\n")
    before = (folder / "run" / "journal.jsonl").read_bytes()

    def start(run):
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.generate", *options, "--resume"]
            + [f"--output={run}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ends(process, message):
        out, error = process.communicate(timeout=120)
        last = error.rstrip("\n").split("\n")[-1]  # Orbax says more before
        assert process.returncode == 2 and out == "" and "Traceback" not in error
        assert last.startswith("error: ") and message in last, error

    (folder / "prompts.jsonl").write_text("\n".join(['{"token_ids": [9]}', *lines[1:]]))
    first = start(folder / "run"), start(tmp_path / "study")
    ends(first[0], "prompt 0 was changed (4 then, 4 now)")
    ends(first[1], "holds a run of experiments.study")
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    model = models.tiny_model()
    params = model.params | {"final_norm": {"scale": jnp.full(32, 1.5)}}
    shutil.rmtree(folder / "model")
    save_checkpoint(dataclasses.replace(model, params=params), folder / "model")
    ends(start(folder / "run"), "weights was ")
    assert (folder / "run" / "journal.jsonl").read_bytes() == before
