"""Strict settings for all tests, and the models that they share."""

import os

# Before jax is imported: the test environment holds TPU and CUDA plugins (they compile
# without hardware) that must not be asked for devices. On an accelerator run
# `pytest -m gpu` with JAX_PLATFORMS=cuda set.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to wait for
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two test runs at once
# Interpreted warpgroups wait for each other, each in a thread of the CPU client.
os.environ.setdefault("PJRT_NPROC", "8")
os.environ.setdefault("SPARSESPEC_COMPILE_CACHE", "off")  # the user's is the user's

import atexit
import gc
import importlib.util
import pathlib
import shutil
import tempfile

# Programs that one process of a run compiled are there for all others: the workers of
# pytest-xdist and every script inherit the folder from the process that made it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _PROGRAMS = tempfile.mkdtemp(prefix="sparsespec_tests_")
    atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Most programs of tests run for less time than their optimisation takes: a step
# compiles three times as fast without it, here and in the scripts that tests start.
# What users have is asked for: `optimized_programs`, `users_environment`.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
        "--xla_cpu_parallel_codegen_split_count=1 "  # of small programs: work saved
        "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
    )

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Before they are imported: what annotations say of arrays is checked in every call of
# the kernels' public functions and implementations, and of what a compiled step is made
# of. Two modules of the `test` extra; without them tests/test_kernels_types.py and
# tests/test_array_types.py fail, and only those.
if importlib.util.find_spec("jaxtyping") and importlib.util.find_spec("beartype"):
    import jaxtyping

    _KERNELS = pathlib.Path(__file__).parents[1] / "pallas_kernels"
    jaxtyping.install_import_hook(
        [
            f"pallas_kernels.{path.parent.name}.{module}"
            for path in sorted(_KERNELS.glob("*/api.py"))
            for module in ("api", "reference", "tpu", "gpu")
        ],
        "beartype.beartype",
    )
    jaxtyping.install_import_hook(
        [
            "sparsespec_jax.sampling",
            "sparsespec_jax.models.layer",
            "sparsespec_jax.models.products",
            "sparsespec_jax.models.rope",
            "sparsespec_jax.models.transformer",
            "sparsespec_jax.policies",
            "sparsespec_jax.proposers",
            "sparsespec_jax.device",
        ],
        "record_types.check",
    )

_MAPS = pathlib.Path("/proc/self/maps")  # Linux only
_MANY_MAPS = 20_000


@pytest.fixture(scope="session")
def tiny_config():
    """Shapes of a two-layer model with grouped heads; compiles in a second."""
    from experiments.models import TINY

    return TINY


@pytest.fixture(scope="session")
def tiny_model():
    """A random float32 model without tokenizer or end-of-text token."""
    from experiments import models

    return models.tiny_model()


@pytest.fixture(scope="session")
def gpu_model():
    """A random bfloat16 model of the smallest shapes that kernels for GPUs serve."""
    import dataclasses

    from experiments.models import TINY
    from sparsespec_jax import Model
    from sparsespec_jax.models.transformer import init_params

    config = dataclasses.replace(
        TINY, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=64, hidden_size=64,
        intermediate_size=64,
    )  # fmt: skip
    params = init_params(config, seed=0, dtype="bfloat16")
    return Model(name="tiny", config=config, params=params, tokenizer=None)


@pytest.fixture(scope="session")
def prompts(tiny_model):
    """Prompts of all lengths that behave differently, for `engine_helpers.LAWS`."""
    from tests.engine_helpers import make_prompts

    return make_prompts(tiny_model.config.vocab_size)


@pytest.fixture(scope="session")
def plain(tiny_model, prompts):
    """Token ids of plain decoding of these prompts."""
    from tests.engine_helpers import run, tokens_of

    return tokens_of(run(tiny_model, prompts, num_draft_tokens=0))


@pytest.fixture(scope="session")
def default_model():
    """SmolLM2-135M-Instruct in float32, fetched once into the user's cache."""
    from sparsespec_jax import load_model

    return load_model("smollm2", dtype="float32")


@pytest.fixture
def no_type_checks(monkeypatch):
    """Kernels as users call them: our own checks refuse what does not fit."""
    config = pytest.importorskip("jaxtyping").config
    monkeypatch.setattr(config, "jaxtyping_disable", True)


@pytest.fixture
def optimized_programs():
    """What this test compiles is compiled now, and optimised."""
    was = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_disable_most_optimizations", was)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def users_environment():
    """The environment of a script that compiles as a user's would."""
    ours = "JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"
    return {name: value for name, value in os.environ.items() if name not in ours}


@pytest.fixture(scope="session")
def parent():
    """Forks scripts that need no import of their own, see tests/forked.py."""
    from tests.forked import Parent

    with Parent() as parent:
        yield parent


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forget compiled programs before they take all memory maps of the process.

    Each takes about 18 of the 65,530 that Linux allows; without any left XLA crashes.
    """
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()
        gc.collect()


def pytest_collection_finish():
    """What has been imported stays: the collector need not look at it again and again.

    Tracing makes many small objects, and a sixth of its time went to collections.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_collection_modifyitems(items):
    """Skip tests of hardware that is not here."""
    backend = jax.default_backend()
    for item in items:
        for name in ("gpu", "tpu"):
            if item.get_closest_marker(name) and backend != name:
                item.add_marker(pytest.mark.skip(reason=f"runs on {name} only"))
