"""The KV manager and the scheduler over a long trace: no model and no device.

    python -m experiments.simulate --output experiments/results/kv_simulator.json

Replays lognormal output lengths (the paper's AIME runs: 13,000 tokens on average,
arXiv 2512.01278) through the real Scheduler under every KV policy and predicts the
pool's utilisation, page traffic and the balance of verification. The pool holds three
quarters of what the slots would hold on average. One simulated token stands for
`--scale` tokens. Expected: `offload` uses at least 97 % of the pool where `reserve`
uses a third, and the heaviest phase reads at most 1.15 times the mean. Each policy runs
in a process of its own; about 2 minutes on two cores.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import sys

from absl import flags

from experiments import launch, record
from experiments.kv_trace import Replay, TraceOptions
from sparsespec_jax.config import KV_POLICIES

_REQUESTS = flags.DEFINE_integer(
    "num_requests", 100_000, "Requests of the trace.", lower_bound=1
)
_OTHERS = flags.DEFINE_integer(
    "num_baseline_requests",
    20_000,
    "The same for all policies but the first.",
    lower_bound=1,
)
_SLOTS = flags.DEFINE_integer(
    "num_slots", 256, "Requests decoded at the same time.", lower_bound=1
)
_SHARE = flags.DEFINE_float(
    "pool_share", 0.75, "Pool over what the slots would hold.", lower_bound=0.01
)
_SCALE = flags.DEFINE_integer("scale", 32, "Tokens per simulated token.", lower_bound=1)
_POLICIES = flags.DEFINE_list("policies", list(KV_POLICIES), "KV policies to replay.")
flags.register_validator(
    "policies",
    lambda names: names and set(names) <= set(KV_POLICIES),
    f"policies takes some of {KV_POLICIES}",
)
_WORKERS = flags.DEFINE_integer("num_workers", 2, "Processes at a time.", lower_bound=1)
_COMMIT = flags.DEFINE_string("commit", None, "Commit to record if git cannot say.")
_OUTPUT = flags.DEFINE_string("output", None, "Results file.", required=True)


def replay(options, policy):
    """One policy over the trace."""
    return Replay(options, policy).run()


def main():
    """Replay every policy and write the results file after each."""
    options = TraceOptions(
        num_requests=_REQUESTS.value,
        num_slots=_SLOTS.value,
        pool_share=_SHARE.value,
        scale=_SCALE.value,
    )
    own_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    header = record.results_header(own_flags, commit=_COMMIT.value)
    header["trace"] = dataclasses.asdict(options)
    rows = []
    context = multiprocessing.get_context("spawn")  # jax has threads: no fork
    with concurrent.futures.ProcessPoolExecutor(_WORKERS.value, context) as pool:
        shorter = dataclasses.replace(options, num_requests=_OTHERS.value)
        first, *others = _POLICIES.value
        futures = [pool.submit(replay, options, first)]
        futures += [pool.submit(replay, shorter, policy) for policy in others]
        for future in concurrent.futures.as_completed(futures):
            row = future.result()
            print({k: v for k, v in row.items() if k != "series"}, flush=True)
            rows.append(row)
            record.write_results(_OUTPUT.value, header | {"rows": rows})


if __name__ == "__main__":
    launch.run(main)
