"""What page pressure costs: one over-subscribed load under every KV policy.

    python -m experiments.offload --output experiments/results/offload_h100

Re-measures the KV manager's share of the paper's gain (arXiv 2512.01278, section 4.4)
on random weights of a preset's shapes. The pool holds `--pool_share` of what the load
needs, so requests are spilled and restored all the time. `offload_without_copies` is
the yardstick: the same schedule, step for step, with the page copies left out (its text
is wrong and nobody reads it), so the ratio of both rates is what the copies cost.
Acceptance is forced, as weights are random. Expected on an H100: a ratio of at least
0.97. About 4 minutes, half of it compilation.
"""

from __future__ import annotations

import dataclasses
import gc

from experiments import experiment, pressure, time_split
from experiments.experiment import Experiment
from experiments.loads import check_requests
from experiments.models import DTYPES, random_model, shapes
from experiments.options import Options, option
from sparsespec_jax import EngineConfig, SpeculationConfig

TRACE = "trace"  # a mode beside those of pressure: what copies add to some steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadConfig(Options):
    """The load, and the pool that it does not fit into."""

    model: str = option("qwen3-8b")
    dtype: str = option("bfloat16", "Type of weights and KV.", choices=DTYPES)
    num_requests: int = option(64, "Requests, and slots.", at_least=1)
    prompt_length: int = option(512, "Tokens of a prompt.", at_least=1)
    new_tokens: int = option(1024, "Mean output; half to 1.5 times it.", at_least=1)
    pool_share: float = option(0.5, "Pool over what the load needs.", at_least=0.01)
    num_draft_tokens: int = option(8, "Drafts per cycle.", at_least=1)
    forced_acceptance: float = option(6.16, "Mean accepted drafts.")
    page_size: int = option(64, "Tokens per page.", at_least=1)
    chunk_pages: int = option(16, "Pages copied at a time.", at_least=1)
    lag: int = option(1, "Steps between dispatch and outcome.", at_least=0)
    repeats: int = option(2, "Runs of each of the first two modes.", at_least=1)
    rivals: bool = option(True, "Run recompute and reserve, too.")
    trace: bool = option(True, "Trace copies (needs a GPU).")


class Offload(Experiment):
    """Every KV policy under pressure, and where the copies go."""

    claim = "copies of pages to host memory and back cost 5 % of the rate at most"
    Config = OffloadConfig
    SMOKE = dict(
        model="tiny", dtype="float32", num_requests=2, prompt_length=8, new_tokens=16,
        pool_share=0.9, num_draft_tokens=2, forced_acceptance=1.5, page_size=4,
        chunk_pages=2, repeats=1, rivals=False, trace=False,
    )  # fmt: skip

    def __init__(self, config, **how):
        super().__init__(config, **how)
        self.speculation = SpeculationConfig(
            num_draft_tokens=config.num_draft_tokens,
            acceptor="forced",
            forced_acceptance=config.forced_acceptance,
        )
        if config.trace:
            time_split.check_can_trace("--notrace")
        self.load = pressure.make_load(
            shapes(config.model).vocab_size,
            num_requests=config.num_requests,
            prompt_length=config.prompt_length,
            new_tokens=config.new_tokens,
        )
        self.parts["prompts"] = self.load[0]
        self.num_pages = pressure.pool_pages(
            self.load,
            share=config.pool_share,
            page_size=config.page_size,
            speculation=self.speculation,
        )
        modes = dict.fromkeys(row["mode"] for row in self.rows())
        engines = list(map(self.engine_config, modes))
        self.model = random_model(config.model, config.dtype)
        for engine in engines:
            check_requests(self.model, *self.load, self.speculation, engine)

    def engine_config(self, mode: str) -> EngineConfig:
        """The engine's sizes under one of pressure.MODES."""
        config = self.config
        return EngineConfig(
            num_slots=config.num_requests,
            page_size=config.page_size,
            num_pages=self.num_pages,
            max_length=config.prompt_length + config.new_tokens * 3 // 2,
            prefill_chunk=min(512, config.prompt_length),
            prefill_lanes=4,
            lag=config.lag,
            kv_policy=mode if mode in ("recompute", "reserve") else "offload",
            host_chunk_pages=config.chunk_pages,
        )

    def rows(self):
        """Runs of each mode, the first two repeatedly; then the trace of copies."""
        first, others = pressure.MODES[:2], pressure.MODES[2:]
        config = self.config
        runs = [(mode, i) for i in range(config.repeats) for mode in first]
        runs += [(mode, 0) for mode in others * config.rivals]
        runs += [(TRACE, 0)] * config.trace
        return [{"mode": mode, "repeat": repeat} for mode, repeat in runs]

    def measure(self, row):
        """One run, or the trace of the busiest steps of the first one."""
        mode = row["mode"]
        load = self.model, self.load, self.speculation, self.engine_config(mode)
        if mode == TRACE:
            return pressure.trace_copies(*load, self._busiest_step())
        found = pressure.run_mode(*load, copies=mode != "offload_without_copies")
        gc.collect()  # the pool must go before the next one comes
        return found

    def _busiest_step(self):
        first = {"mode": "offload", "repeat": 0}
        (found,) = experiment.records_of(self.directory.records, [first])
        if not found["spilled_gib"]:
            raise ValueError("no page moved: lower --pool_share")
        return found["busiest_step"]

    def describe(self, records):
        """Rates of the modes, and their ratios."""
        runs = {mode: [] for mode in pressure.MODES}
        for record in records:
            if record["mode"] != TRACE:
                runs[record["mode"]].append(record)
        copies = [record for record in records if record["mode"] == TRACE]
        found = {"num_pages": self.num_pages} | pressure.metrics_of(runs)
        return found | ({"copies": copies[0]} if copies else {})


if __name__ == "__main__":
    experiment.run(Offload)
