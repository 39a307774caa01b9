"""Long outputs, greedy and sampled, token by token against plain decoding.

    python -m experiments.lossless --output experiments/results/lossless.json

Decodes the same requests with k = 0 and then with k = 8 for every lag and page size,
in float32, and counts differing tokens; the exit status is 1 if there is one. About
4 minutes on an H100, an hour on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time

from absl import flags

from experiments import contexts as contexts_lib
from experiments import launch, record
from sparsespec_jax import (
    Engine,
    EngineConfig,
    SamplingParams,
    SpeculationConfig,
    load_model,
    sizes,
)

_MODEL = flags.DEFINE_string("model", "smollm2", "Model to decode with.")
_REQUESTS = flags.DEFINE_integer(
    "num_requests", 4, "Requests of each temperature.", lower_bound=1
)
_TEMPERATURES = flags.DEFINE_list("temperatures", ["0", "0.65"], "Temperatures.")
_TOKENS = flags.DEFINE_integer(
    "max_tokens", 2048, "New tokens per request.", lower_bound=1
)
_K = flags.DEFINE_integer("num_draft_tokens", 8, "Drafts per cycle.", lower_bound=1)
_RATIO = flags.DEFINE_float("budget_ratio", 0.05, "Share of the context read.")
_FLOOR = flags.DEFINE_integer(
    "min_budget", 0, "Tokens a draft reads at least.", lower_bound=0
)
_LAGS = flags.DEFINE_list("lags", ["0", "1", "2"], "Lags to try.")
_PAGES = flags.DEFINE_list("page_sizes", ["16", "64"], "Page sizes to try.")
_IMPL = flags.DEFINE_string("impl", None, "Kernels; default: the platform's.")
_COMMIT = flags.DEFINE_string("commit", None, "Commit to record if git cannot say.")
_OUTPUT = flags.DEFINE_string("output", None, "Results file.", required=True)


def make_requests(model):
    """(prompt, SamplingParams) of every request, one temperature after the other."""
    temperatures = [
        float(t) for t in _TEMPERATURES.value for _ in range(_REQUESTS.value)
    ]
    texts = contexts_lib.prompts(len(temperatures))
    tokenizer = model.require_tokenizer()
    law = SamplingParams(max_tokens=_TOKENS.value, ignore_eos=True)
    return [
        (
            tokenizer.encode_chat(text),
            dataclasses.replace(law, temperature=temperature, seed=index),
        )
        for index, (text, temperature) in enumerate(
            zip(texts, temperatures, strict=True)
        )
    ]


def options_of(requests, *, k, lag, page_size):
    """(SpeculationConfig, EngineConfig) of one configuration."""
    speculation = SpeculationConfig(
        num_draft_tokens=k, budget_ratio=_RATIO.value, min_budget=_FLOOR.value
    )
    engine = EngineConfig(
        num_slots=len(requests),
        page_size=page_size,
        max_length=max(len(p) + law.max_tokens for p, law in requests),
        prefill_chunk=32,
        lag=lag,
        impl=_IMPL.value,
    )
    return speculation, engine


def decode_all(model, requests, speculation, config):
    """(results by request, seconds) of one configuration."""
    engine = Engine(model, speculation=speculation, engine=config)
    engine.warm_up()
    for index, (prompt, law) in enumerate(requests):
        engine.add_request(prompt, law, prompt_index=index)
    start = time.perf_counter()
    return contexts_lib.finish(engine), time.perf_counter() - start


def compare(results, plain):
    """What of `results` equals `plain`, token by token."""
    same = [a.token_ids == b.token_ids for a, b in zip(results, plain, strict=True)]
    tokens = sum(len(r.token_ids) for r in results)
    differing = sum(
        sum(x != y for x, y in itertools.zip_longest(a.token_ids, b.token_ids))
        for a, b in zip(results, plain, strict=True)
    )
    return {
        "identical_requests": sum(same),
        "num_tokens": tokens,
        "num_differing_tokens": differing,
        "max_logprob_difference": max(
            abs(x - y)
            for a, b in zip(results, plain, strict=True)
            for x, y in zip(a.logprobs, b.logprobs, strict=False)
        ),
    }


def configurations():
    """Pairs (page size, lag), ordered so that the first ones cover every value."""
    pairs = [
        ((i + j) % 2, int(page_size), int(lag))
        for j, lag in enumerate(_LAGS.value)
        for i, page_size in enumerate(_PAGES.value)
    ]
    return [pair[1:] for pair in sorted(pairs, key=lambda pair: pair[0])]


def main():
    """Decode plainly once, speculatively in every configuration, and compare."""
    with launch.checking():
        lists = {"temperatures": _TEMPERATURES, "lags": _LAGS, "page_sizes": _PAGES}
        for name, flag in lists.items():
            if not flag.value:
                raise ValueError(f"--{name} is empty: name at least one")
        model = load_model(_MODEL.value, dtype="float32")
        requests = make_requests(model)
        plain_options = options_of(requests, k=0, lag=1, page_size=16)
        options = [
            options_of(requests, k=_K.value, lag=lag, page_size=page_size)
            for page_size, lag in configurations()
        ]
        for pair in (plain_options, *options):
            sizes.resolve(model, *pair)
    own_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    header = record.results_header(own_flags, commit=_COMMIT.value)
    header["temperatures"] = [law.temperature for _, law in requests]
    plain, seconds = decode_all(model, requests, *plain_options)
    print(f"plain decoding: {seconds:.0f} s", flush=True)
    rows = []
    for pair in options:
        results, seconds = decode_all(model, requests, *pair)
        total = sum((r.metrics for r in results[1:]), start=results[0].metrics)
        row = {
            "lag": pair[1].lag,
            "page_size": pair[1].page_size,
            **compare(results, plain),
            "mean_accepted_draft_tokens": total.mean_accepted_draft_tokens,
            "wall_time_s": seconds,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        # After every row, so that a kill loses none.
        record.write_results(_OUTPUT.value, header | {"rows": rows})
    if any(row["num_differing_tokens"] for row in rows):
        sys.exit("tokens differ from plain decoding")


if __name__ == "__main__":
    launch.run(main)
