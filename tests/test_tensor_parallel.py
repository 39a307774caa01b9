"""A model shared by devices: the text of one device, and nothing whole on any of them.

On forced devices of the CPU, in processes of their own: this one has one device.
"""

import json
import os
import pathlib

import pytest

from tests.forked import Parent
from tests.model_files import GOLDENS, write_gguf

ROOT = pathlib.Path(__file__).parents[1]
DEVICES = "--xla_force_host_platform_device_count=8"


@pytest.fixture(scope="module")
def eight():
    """Forks processes of eight devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}"
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    with Parent(os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}) as parent:
        yield parent


@pytest.fixture(scope="module")
def devices(eight):
    """Runs an expression over the cases on eight devices; returns its value."""

    def evaluate(expression, *arguments):
        code = (
            "import json, sys\nfrom tests import tensor_parallel_cases as cases\n"
            f"print(json.dumps({expression}))"
        )
        done = eight.run(code, *map(str, arguments), cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return evaluate


@pytest.mark.parametrize("degree", [8, pytest.param(2, marks=pytest.mark.slow)])
def test_plain_and_drafted_text_is_that_of_one_device(devices, degree):
    """At 8 devices each of the 4 KV heads stands on two."""
    found = devices(f"cases.plain_and_drafted({degree})")
    assert found["same"] == [True, True]
    assert found["distance"] < 1e-4 and found["accepted"] > 0.5
    assert found["compiled"] == [2, 2]
    assert found["kv_bytes"] == max(4, degree) * 2 * 16 * 4  # heads, K and V, values
    for own, whole in (found["pool"], found["table"]):
        assert own == [whole // degree] * degree
    # A pair for each row and device is the most that is gathered, and there is one sum
    # behind the embedding, the output and down, and one maximum.
    sizes, num_sums = found["gathered"]
    assert max(sizes) <= 2 * degree * found["rows"]
    assert num_sums == 4


@pytest.mark.parametrize("degree", [8, pytest.param(2, marks=pytest.mark.slow)])
def test_a_cut_vocabulary_gives_the_same_tokens(devices, degree):
    """Laws, edits and acceptors over the same logits; equal ones stand far apart."""
    assert devices(f"cases.laws_of_cut_logits({degree})") == []


@pytest.mark.slow
def test_many_options_at_once_change_no_token(devices):
    """One layer and one of the cases below, so that few programs are compiled."""
    names = ["cascade, edits, spilled"]
    wrong, distance = devices(f"cases.differences(cases.ONE_LAYER, [2], {names})")
    assert not wrong and distance < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_nothing_changes_a_token_at_any_degree(devices, degree):
    found = devices(f"cases.differences(cases.CUT, [{degree}], cases.CASES)")
    wrong, distance = found
    assert not wrong and distance < 1e-4


def test_preempted_and_resumed_requests_have_their_text(devices):
    same, restored, resumed = devices("cases.preempted_and_resumed(4)")
    assert same and restored > 10 and resumed


@pytest.mark.slow
def test_scores_are_those_of_one_device(devices):
    assert devices("cases.scores(2)") < 1e-4


def test_weights_are_loaded_to_their_devices(devices, tmp_path):
    """From every kind of file; of four devices two share a KV head."""
    gguf = write_gguf(tmp_path / "mistral.gguf", "mistral")
    names = [GOLDENS / "llama_biases_linear_rope", GOLDENS / "qwen3", gguf]
    for degree in (2, 4):
        found = devices(f"cases.loaded(sys.argv[1:], {degree})", *names)
        assert len(found) == 4  # the last one again, from a checkpoint of Orbax
        for same, share in found:
            assert same and 1 / degree <= share < 1 / degree + 0.02


def test_random_weights_are_those_of_one_device(devices):
    same, share = devices("cases.random_weights(8)")
    assert same and share < 1 / 8 + 0.03


@pytest.mark.slow
def test_a_run_is_one_of_its_degree(eight, tmp_path):
    """The launcher, from files to a results file that says how many devices."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"token_ids": [5, 3, 9]}\n{"token_ids": [7]}\n')
    done = eight.run_module(
        "experiments.generate", "--model", str(GOLDENS / "qwen3"), "--dtype", "float32",
        "--prompts", str(prompts), "--max_tokens", "12", "--min_budget", "3",
        "--tensor_parallel", "2", "--quiet", "--output", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "24 of 24 tokens identical to plain decoding" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["speculative"]["tensor_parallel"] == 2


def test_what_cannot_be_shared_is_refused_before_work(devices):
    found = devices("cases.refusals()")
    heads, length, vocabulary, few, bad, odd, reader, placed, load, memory = found
    assert "tensor_parallel is 3" in heads and "num_heads is 8" in heads
    assert heads.endswith("use one of 1, 2, 4, 8")
    assert "intermediate_size is 50" in length and length.endswith("use one of 1, 2")
    assert "vocab_size is 97" in vocabulary and vocabulary.endswith("use one of 1")
    assert "tensor_parallel is 16, this process has 8 cpu device(s)" in few
    assert "tensor_parallel must be an integer in [1, " in bad and "got 0" in bad
    assert "policy 'odd' remembers (3, 7) for 4 KV heads" in odd
    assert "KV pages of 2048 bytes need" in memory
    assert "GiB on each of 4 devices, at most 19 pages fit" in memory
    assert "proposer Reader reads weights that devices share" in reader
    assert "the weights lie on 2 devices: use EngineConfig(tensor_parallel=2)" in placed
    assert "tensor_parallel is 8" in load and load.endswith("use one of 1, 2, 4")


def test_exact_rows_stand_alone_on_two_devices(devices):
    """Passes, or an exception; and a sum that depends on the rows beside is named."""
    found = devices("cases.probes()")
    assert found.startswith("numerics='exact' cannot be kept: hidden states")
