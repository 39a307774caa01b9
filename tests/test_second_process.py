"""A second process need not compile: what its first call takes of the first one's."""

import json
import pathlib
import subprocess
import sys

import pytest

import sparsespec_jax

SCRIPT = """
import json, time
def now():
    return time.perf_counter(), time.process_time()
clock = [now()]
from sparsespec_jax import SamplingParams, decode, load_model
clock.append(now())
model = load_model("smollm2", dtype="float32")
clock.append(now())
law = SamplingParams(temperature=0.65, max_tokens=32)
(result,) = decode(model, ["Once upon a time, in a village by the sea,"], sampling=law)
clock.append(now())
parts = zip(("import", "load", "call"), clock[:-1], clock[1:], strict=True)
times = {name: [b - a for a, b in zip(*pair)] for name, *pair in parts}
print(json.dumps([times, result.text]))
"""


def started(folder, users):
    """({part: [seconds, of the processors]}, text) of a user's process."""
    root = pathlib.Path(sparsespec_jax.__file__).parents[1]
    environment = {k: v for k, v in users.items() if "JAX_PERSISTENT" not in k}
    environment |= {"SPARSESPEC_COMPILE_CACHE": str(folder), "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_call_of_a_second_process(default_model, users_environment, tmp_path):
    """At most half. `pytest -s` prints the seconds; weights are on the disk before.

    To be run with nothing beside it: both are times of a clock.
    """
    first, text = started(tmp_path / "programs", users_environment)
    second, again = started(tmp_path / "programs", users_environment)
    print("", json.dumps(first), json.dumps(second), sep="\n")
    assert text == again
    assert second["call"][0] <= first["call"][0] / 2
