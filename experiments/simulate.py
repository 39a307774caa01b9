"""The KV manager and the scheduler over a long trace: no model and no device.

    python -m experiments.simulate --output experiments/results/kv_simulator

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

from experiments import drawing, experiment, signals
from experiments.experiment import Experiment
from experiments.kv_trace import Replay, TraceOptions, make_shape
from experiments.options import Options, option
from sparsespec_jax.config import KV_POLICIES


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulateConfig(Options):
    """The trace, and how it is replayed."""

    num_requests: int = option(100_000, "Requests of the trace.", at_least=1)
    num_baseline_requests: int = option(
        20_000, "The same for all policies but the first.", at_least=1
    )
    num_slots: int = option(256, "Requests decoded at the same time.", at_least=1)
    pool_share: float = option(
        0.75, "Pool over what the slots would hold.", at_least=0.01
    )
    scale: int = option(32, "Tokens per simulated token.", at_least=1)
    policies: tuple[str, ...] = option(
        KV_POLICIES, "KV policies to replay.", choices=KV_POLICIES
    )
    num_workers: int = option(
        2, "Processes at a time; 1: in this one.", at_least=1, is_recorded=False
    )


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


class Simulate(Experiment):
    """Every policy over the trace."""

    claim = "offloading keeps the pool full and computes no token twice"
    Config = SimulateConfig
    SMOKE = dict(
        num_requests=30, num_baseline_requests=30, num_slots=8, scale=64,
        policies=("offload", "recompute"), num_workers=1,
    )  # fmt: skip

    def __init__(self, config, **how):
        super().__init__(config, **how)
        make_shape(self.options_of(config.policies[0]))

    def options_of(self, policy):
        """The trace that a policy replays; the first policy has all of it."""
        config = self.config
        is_first = policy == config.policies[0]
        return TraceOptions(
            num_requests=config.num_requests
            if is_first
            else config.num_baseline_requests,
            num_slots=config.num_slots,
            pool_share=config.pool_share,
            scale=config.scale,
        )

    def rows(self):
        """One for each policy."""
        return [{"policy": policy} for policy in self.config.policies]

    def measure(self, row):
        """The replay of a policy in this process."""
        return Replay(self.options_of(row["policy"]), row["policy"]).run()

    def measure_all(self, rows):
        """Some replays at a time, each in a process of its own."""
        if self.config.num_workers == 1:
            yield from super().measure_all(rows)
            return
        calls = [(self.options_of(row["policy"]), row["policy"]) for row in rows]
        for found in replay_all(calls, self.config.num_workers):
            yield {"policy": found["policy"]}, found

    def describe(self, records):
        """What was replayed, and how full the pool was."""
        trace = dataclasses.asdict(self.options_of(self.config.policies[0]))
        used = {f"utilisation {r['policy']}": r["utilisation"] for r in records}
        return {"trace": trace} | used

    @staticmethod
    def figure(axes, summary, records):
        """The pool's use over the steps."""
        del summary
        lines = {
            record["policy"]: list(
                zip(
                    record["series"]["step"],
                    record["series"]["utilisation"],
                    strict=True,
                )
            )
            for record in records
        }
        drawing.curves(axes, lines, x="step", y="share of the pool in use")


if __name__ == "__main__":
    experiment.run(Simulate)
