"""What compiles: once per kind of decoding, and once per machine."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import zlib

import jax
import pytest

from experiments.models import TINY
from sparsespec_jax import (
    EngineConfig,
    Model,
    SamplingParams,
    SpeculationConfig,
    decode,
)
from sparsespec_jax.loading.user_cache import user_cache_dir
from sparsespec_jax.models.transformer import init_params
from sparsespec_jax.tuning import compile_cache
from tests.engine_helpers import make_prompts


def small_model():
    config = dataclasses.replace(TINY, num_layers=1)
    return Model(
        name="small", config=config, params=init_params(config, seed=0), tokenizer=None
    )


def run(model, prompts, **law):
    """decode() with sizes of its own, so that no other test compiled its steps."""
    return decode(
        model,
        prompts,
        sampling=SamplingParams(**law),
        speculation=SpeculationConfig(num_draft_tokens=2, min_budget=7),
        engine=EngineConfig(num_slots=2, prefill_chunk=64),
    )


@pytest.fixture(scope="module")
def compiled():
    """The list of all compilations of this process from now on."""
    events = []

    def note(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    return events


def test_other_prompts_of_a_similar_length_compile_nothing(compiled):
    model, counts = small_model(), []
    for lengths, law in (
        ([30], dict(max_tokens=4)),
        ([200, 1, 8], dict(max_tokens=56, temperature=0.3, seed=3)),
        ([3] * 5, dict(max_tokens=9, n=2, stop_token_ids=[5], logprobs="processed")),
    ):
        run(model, make_prompts(TINY.vocab_size, lengths), **law)
        counts.append(len(compiled))
    assert counts == [counts[0]] * 3 and counts[0] > 0


# -- between processes --------------------------------------------------------------

DECODE = """
import json
import jax

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
from tests import test_compilations as here
results = here.run(here.small_model(), [[5, 3, 9]] * 2, max_tokens=20, n=2)
print(json.dumps({
    "texts": [[list(r.token_ids), list(r.logprobs)] for r in results],
    "hits": events.count("/jax/compilation_cache/cache_hits"),
    "folder": jax.config.jax_compilation_cache_dir,
}))
"""
# No file may have more bytes: as on a full disk, an entry is half written.
PROGRAM_ON_A_FULL_DISK = """
import json, resource, sys
import jax, jax.numpy as jnp
from sparsespec_jax.tuning import compile_cache

compile_cache.turn_on()
if sys.argv[1:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
total = jax.jit(lambda x: jnp.sort(jnp.tanh(x) @ x).sum())(jnp.eye(99))
print(json.dumps([float(total), events.count("/jax/compilation_cache/cache_hits")]))
"""


def start(environment, script, folder, *arguments):
    """A process with warnings as errors that runs a script, its cache in `folder`."""
    environment = environment | {
        compile_cache.VARIABLE: str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-Werror", "-c", script, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """(what it printed as JSON, what it wrote to stderr); it must end well."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return json.loads(out), err


def test_a_second_process_loads_what_others_compiled(users_environment, tmp_path):
    """With the tokens that no cache gives."""
    folder = tmp_path / "new" / "cache"
    first, second = (
        finish(start(users_environment, DECODE, folder))[0] for _ in range(2)
    )
    assert second["hits"] >= 2  # steps with and without prompt chunks
    assert first["texts"] == second["texts"]
    results = run(small_model(), [[5, 3, 9]] * 2, max_tokens=20, n=2)
    assert first["folder"] == second["folder"] == str(folder)
    for (tokens, logprobs), result in zip(first["texts"], results, strict=True):
        assert tuple(tokens) == result.token_ids
        # Here programs are optimised less.
        assert logprobs == pytest.approx(result.logprobs, abs=1e-5)


def test_a_full_disk_is_told_and_mended(users_environment, tmp_path):
    process = users_environment, PROGRAM_ON_A_FULL_DISK, tmp_path
    (total, _), err = finish(start(*process, "3000"))
    assert "Error writing persistent compilation cache entry" in err
    (entry,) = [e for e in tmp_path.glob("*-cache") if "lambda" in e.name]
    assert entry.stat().st_size == 3000
    (again, hits), err = finish(start(*process))
    assert again == total and hits > 0 and err == ""  # smaller programs had room
    assert zlib.decompress(entry.read_bytes())


# -- who decides --------------------------------------------------------------------


@pytest.fixture
def folder_of(monkeypatch):
    """The folder that turn_on() chooses under environment variables, or None."""

    def choose(**variables):
        monkeypatch.delenv(compile_cache.VARIABLE, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        compile_cache.turn_on.__wrapped__()
        return jax.config.jax_compilation_cache_dir

    of_tests = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield choose
    jax.config.update("jax_compilation_cache_dir", of_tests)
    jax.config.update("jax_enable_compilation_cache", True)


def test_the_folder_is_the_users_unless_named(folder_of, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    assert folder_of(SPARSESPEC_COMPILE_CACHE="off") is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert folder_of(SPARSESPEC_CACHE=tmp_path / "a") is None
    monkeypatch.setattr(sys, "platform", "linux")
    assert not caplog.records
    folder = folder_of(SPARSESPEC_CACHE=tmp_path / "a")
    assert folder == str(tmp_path / "a" / "compiled")
    assert folder == str(user_cache_dir() / "compiled")
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert folder in caplog.text
    # Whatever is set stays.
    assert folder_of(SPARSESPEC_COMPILE_CACHE=tmp_path / "b") == folder
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert folder_of(SPARSESPEC_COMPILE_CACHE=tmp_path / "b") is None
    jax.config.update("jax_enable_compilation_cache", True)
    assert folder_of(SPARSESPEC_COMPILE_CACHE=tmp_path / "b") == str(tmp_path / "b")


def test_a_folder_that_cannot_be_used_is_told(folder_of, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    assert folder_of(SPARSESPEC_COMPILE_CACHE=tmp_path / "file" / "b") is None
    assert "cannot be kept in" in caplog.text and "Not a directory" in caplog.text
    monkeypatch.setattr(compile_cache, "_LEAST_FREE", 2**62)
    assert folder_of(SPARSESPEC_COMPILE_CACHE=tmp_path / "c") is None
    assert "MB are free" in caplog.records[-1].message
    assert f"set {compile_cache.VARIABLE} to another folder" in caplog.text


def test_damaged_and_old_entries_go(tmp_path):
    whole = zlib.compress(os.urandom(5000))
    entries = {"a": whole, "b": whole, "c": whole[:-9], "d": b"", "e": b"(\xb5/\xfd.."}
    for age, (name, data) in enumerate(entries.items()):
        (tmp_path / f"{name}-cache").write_bytes(data)
        os.utime(tmp_path / f"{name}-cache", (2e9 - age, 2e9 - age))
    (tmp_path / "notes").write_text("kept")

    def names():
        return "".join(sorted(e.name[0] for e in tmp_path.glob("*-cache")))

    compile_cache.tidy(tmp_path)
    assert names() == "abe"
    compile_cache.tidy(tmp_path, largest=6000)
    assert names() == "a"
    assert (tmp_path / "notes").exists()
