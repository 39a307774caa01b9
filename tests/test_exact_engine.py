"""Exact numerics through the whole engine, with interpreted kernels of the GPU."""

import numpy as np
import pytest

from experiments import kv_rows
from sparsespec_jax import EngineConfig, SamplingParams, SpeculationConfig
from sparsespec_jax import engine as engine_lib
from sparsespec_jax.host.intake import prepare

PROMPTS = [
    np.random.default_rng(i).integers(0, 97, n).tolist() for i, n in ((0, 1), (1, 70))
]


def make_engine(gpu_model, **speculation):
    return kv_rows.ReadableEngine(
        gpu_model,
        speculation=SpeculationConfig(**speculation),
        engine=EngineConfig(
            numerics="exact", impl="gpu_interpret", prefill_chunk=72, page_size=32,
            num_slots=2, max_length=128,
        ),
    )  # fmt: skip


def run(engine, num_tokens=None):
    """Results, until so many tokens are emitted."""
    results = []
    while engine.has_work and engine.num_emitted_tokens < (num_tokens or 10**9):
        results += engine.step()
    return sorted(results + engine.pause(), key=lambda result: result.prompt_index)


def bits(results):
    return [(r.token_ids, np.float32(r.logprobs).tobytes()) for r in results]


def test_texts_scores_and_kv_rows_have_the_bits_of_plain_decoding(
    gpu_model, monkeypatch
):
    # The look before is tried in test_exactness.py.
    monkeypatch.setattr(engine_lib, "check_exact", lambda *args: None)
    law = SamplingParams(temperature=0.8, max_tokens=6, ignore_eos=True)
    prepared = [prepare(gpu_model, prompt, law) for prompt in PROMPTS]
    engines = (
        make_engine(gpu_model, num_draft_tokens=0),
        make_engine(gpu_model, num_draft_tokens=2),
    )
    with engines[0] as plain, engines[1] as speculative:
        for engine in engines:
            for index, prompt in enumerate(prepared):
                engine.submit(prompt, prompt_index=index)
            run(engine, num_tokens=4)
        found = kv_rows.compare(plain, speculative)
        assert found["kv_texts"] == 2
        assert found["identical_kv_rows"] == found["kv_rows"] > 70
        wanted = run(plain)
        assert bits(run(speculative)) == bits(wanted)
        for index, result in enumerate(wanted):
            speculative.submit(
                prepared[index], prompt_index=index, scored=result.token_ids
            )
        assert bits(run(speculative)) == bits(wanted)


@pytest.mark.slow  # interpreted kernels of one more engine
@pytest.mark.timeout(900)
def test_aligned_steps_have_the_bits_of_plain_decoding(gpu_model, monkeypatch):
    monkeypatch.setattr(engine_lib, "check_exact", lambda *args: None)
    law = SamplingParams(temperature=0.8, max_tokens=6, ignore_eos=True)
    prepared = [prepare(gpu_model, prompt, law) for prompt in PROMPTS]
    found = []
    for options in (
        dict(num_draft_tokens=0),
        dict(num_draft_tokens=2, schedule="aligned"),
    ):
        with make_engine(gpu_model, **options) as engine:
            for index, prompt in enumerate(prepared):
                engine.submit(prompt, prompt_index=index)
            found.append(bits(run(engine)))
    assert found[0] == found[1]
