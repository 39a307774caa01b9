"""Scripts that end in the midst of things: Python's own exit status, and silence.

Steps are slow here (a vocabulary of 1,000,000), so that one is under way at every end.
"""

import signal

import pytest
from forked import Parent

PREAMBLE = """
import os, signal, sys, threading
import jax, jax.numpy as jnp
import sparsespec_jax as ss
import dataclasses
from experiments import models
from sparsespec_jax.models.transformer import init_params

few = dataclasses.replace(models.TINY, vocab_size=1000, num_layers=1)
params = init_params(few, seed=0)
params["embed"]["weight"] = jnp.tile(params["embed"]["weight"], (1000, 1))
config = dataclasses.replace(few, vocab_size=1_000_000)
model = ss.Model(name="wide", config=config, params=params, tokenizer=None)
prompts = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
law = ss.SamplingParams(max_tokens=5)
options = dict(
    speculation=ss.SpeculationConfig(num_draft_tokens=2, min_budget=3),
    engine=ss.EngineConfig(num_slots=2, page_size=4, prefill_chunk=4, max_length=40,
                           lag={lag}),
)

def begun():
    engine = ss.Engine(model, **options)
    for prompt in prompts:
        engine.add_request(prompt, law)
    for _ in range(4):
        engine.step()
    return engine

def fail(*args):
    raise OSError("the disk is full")

def press(*args):
    os.kill(os.getpid(), signal.SIGINT)
"""

# name: (the script's end, lag, exit status, the last line it prints to stderr)
SCRIPTS = {
    "after decode, lag 0": ("ss.decode(model, prompts, sampling=law, **options)", 0),
    "after decode, lag 1": ("ss.decode(model, prompts, sampling=law, **options)", 1),
    "after decode, lag 2": ("ss.decode(model, prompts, sampling=law, **options)", 2),
    "broken out of a stream, lag 1": (
        "for event in ss.stream(model, prompts, sampling=law, **options): break",
        1,
    ),
    "broken out of a stream, lag 2": (
        "for event in ss.stream(model, prompts, sampling=law, **options): break",
        2,
    ),
    "a stream that waits for its reader": (
        "events = ss.stream(model, prompts, sampling=law, **options); next(events)",
        1,
    ),
    "a stream never begun": (
        "events = ss.stream(model, prompts, sampling=law, **options)",
        2,
    ),
    "an engine dropped, lag 1": ("begun()", 1),
    "an engine dropped, lag 2": ("begun()", 2),
    "an engine held, lag 0": ("engine = begun()", 0),
    "an engine held, lag 1": ("engine = begun()", 1),
    "an engine held, lag 2": ("engine = begun()", 2),
    "an engine closed": ("with begun() as engine: engine.step()", 2),
    "an engine that cannot be collected": (
        "engine = begun(); engine.itself = engine; del engine",
        1,
    ),
    "an engine in a thread that nobody waits for": (
        "engine = begun()\n"
        "def loop():\n"
        "    while True: engine.step() if engine.has_work else begun()\n"
        "thread = threading.Thread(target=loop, daemon=True); thread.start()\n"
        "thread.join(0.5)",
        1,
    ),
    "an exception in a callback": (
        "ss.decode(model, prompts, sampling=law, on_result=fail, **options)",
        1,
        1,
        "OSError: the disk is full",
    ),
    "an exception in a callback of events": (
        "ss.decode(model, prompts, sampling=law, progress=fail, **options)",
        2,
        1,
        "OSError: the disk is full",
    ),
    "sys.exit": ("engine = begun(); sys.exit(7)", 1, 7, ""),
    "sys.exit in a callback": (
        "ss.decode(model, prompts, sampling=law, progress=lambda e: sys.exit(5), "
        "**options)",
        2,
        5,
        "",
    ),
    "Ctrl-C in decode": (
        "ss.decode(model, prompts, sampling=law, progress=press, **options)",
        1,
        -signal.SIGINT,
        "0 requests had finished: see .results",
    ),
    "Ctrl-C in decode, lag 2": (
        "ss.decode(model, prompts, sampling=law, progress=press, **options)",
        2,
        -signal.SIGINT,
        "0 requests had finished: see .results",
    ),
    "Ctrl-C in step": (
        "engine = begun(); press(); engine.step()",
        1,
        -signal.SIGINT,
        "KeyboardInterrupt",
    ),
    "Ctrl-C between two events": (
        "for event in ss.stream(model, prompts, sampling=law, **options): press()",
        2,
        -signal.SIGINT,
        "KeyboardInterrupt",
    ),
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory, users_environment):
    """The process that forks; only the first script compiles."""
    environment = users_environment | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with Parent(environment) as parent:
        yield parent


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_exit_is_pythons_own(parent, name):
    end, lag, status, last = (*SCRIPTS[name], 0, "")[:4]
    ended = parent.run(PREAMBLE.replace("{lag}", str(lag)) + end)
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ""
    lines = ended.stderr.strip().splitlines()
    if last:
        assert lines[0].startswith("Traceback")
        assert any(line.startswith(last) for line in lines[-2:])  # and perhaps a note
    else:
        assert lines == []
