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

import dataclasses
import multiprocessing
import multiprocessing.connection
import signal
import sys
from multiprocessing import resource_tracker

from absl import flags

from experiments import launch, record, signals
from experiments.kv_trace import Replay, TraceOptions, make_shape
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


def replay_into(sender, options, policy):
    """Send what one policy over the trace cost."""
    sender.send(Replay(options, policy).run())


def replay_all(calls, num_workers):
    """Yield the row of each (options, policy) when its process ends; some at a time."""
    context = multiprocessing.get_context("spawn")  # jax has threads: no fork
    calls, running = list(calls), {}

    def stop():
        for process in running.values():
            process.terminate()

    with signals.at_end(stop):
        while calls or running:
            while calls and len(running) < num_workers:
                receiver, sender = context.Pipe(duplex=False)
                call = sender, *calls.pop(0)
                process = context.Process(target=replay_into, args=call, daemon=True)
                with signals.deferred():
                    _start_without_interrupts(process)
                    running[receiver] = process
                sender.close()
            for receiver in multiprocessing.connection.wait(running):
                process = running.pop(receiver)
                try:
                    yield receiver.recv()
                except EOFError:
                    sys.exit("a replay ended before its time; its error is above")
                process.join()


def _start_without_interrupts(process):
    """Start a process that leaves Ctrl-C to this one: it inherits what is blocked."""
    resource_tracker.ensure_running()  # to start that unblocks all signals
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def main():
    """Replay every policy and write the results file after each."""
    with launch.checking():
        options = TraceOptions(
            num_requests=_REQUESTS.value,
            num_slots=_SLOTS.value,
            pool_share=_SHARE.value,
            scale=_SCALE.value,
        )
        make_shape(options)
    own_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    header = record.results_header(own_flags, commit=_COMMIT.value)
    header["trace"] = dataclasses.asdict(options)
    shorter = dataclasses.replace(options, num_requests=_OTHERS.value)
    first, *others = _POLICIES.value
    calls = [(options, first), *((shorter, policy) for policy in others)]
    rows = []
    for row in replay_all(calls, _WORKERS.value):
        print({k: v for k, v in row.items() if k != "series"}, flush=True)
        rows.append(row)
        record.write_results(_OUTPUT.value, header | {"rows": rows})


if __name__ == "__main__":
    launch.run(main)
