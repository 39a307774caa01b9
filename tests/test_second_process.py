"""A second process need not compile: what its first call takes of the first one's."""

import json
import pathlib
import subprocess
import sys

import pytest

import sparsespec_jax

SCRIPT = """
import json, resource, time
start = time.perf_counter()
from sparsespec_jax import SamplingParams, decode, load_model
imported = time.perf_counter()
model = load_model("smollm2", dtype="float32")
loaded = time.perf_counter()
law = SamplingParams(temperature=0.65, max_tokens=32)
(result,) = decode(model, ["Once upon a time, in a village by the sea,"], sampling=law)
called = time.perf_counter()
usage = resource.getrusage(resource.RUSAGE_SELF)
times = {
    "import": imported - start, "load": loaded - imported, "call": called - loaded,
    "all": called - start, "processor": usage.ru_utime + usage.ru_stime,
}
print(json.dumps([times, result.text]))
"""


def started(folder, users):
    """(seconds by part, text) of the first call of a process of a user."""
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
    """`pytest -s` prints the seconds; weights are on the disk before."""
    first, text = started(tmp_path / "programs", users_environment)
    second, again = started(tmp_path / "programs", users_environment)
    print("\n", *(json.dumps(x) for x in (first, second)), sep="\n")
    assert text == again
    assert second["call"] <= first["call"] / 2
    assert second["all"] <= first["all"] / 2
