"""Texts in bfloat16, bit by bit: every option of the engine against plain decoding.

    python -m experiments.exactness --model smollm2 --output experiments/results/exact

Decodes the same requests by plain decoding, then with other k, policies, lags, slots,
orders, page sizes, prompt chunks, with too small a pool, and by two engines of which
the second goes on where the first was closed. With `--numerics exact` every token and
every bit of every log-probability must be the same, `score` must find the same bits,
and half way the KV pools of plain and speculative decoding must hold the same bytes.
The exit status is 1 if something differs.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from experiments import context_files, experiment, kv_rows, models
from experiments import contexts as contexts_lib
from experiments.experiment import Experiment
from experiments.options import Options, option
from sparsespec_jax import EngineConfig, SamplingParams, SpeculationConfig, score
from sparsespec_jax.config import NUMERICS
from sparsespec_jax.host.intake import prepare

_DENSE = dict(policy="full", budget_ratio=1.0)
# (name, SpeculationConfig, EngineConfig) beside those of the run; "share" is that of
# the pool that all requests need.
_SETTINGS = (
    ("plain, half the slots", dict(num_draft_tokens=0), dict(num_slots=0.5)),
    ("plain, chunks four times as long", dict(num_draft_tokens=0), dict(chunk=4)),
    ("k = 2, lag 0", dict(num_draft_tokens=2), dict(lag=0)),
    ("k = 4, lag 2, more slots", dict(num_draft_tokens=4), dict(lag=2, num_slots=2)),
    ("k = 8", dict(), dict()),
    ("k = 8, dense drafts", _DENSE, dict()),
    ("k = 8, a window", dict(policy="window"), dict()),
    ("k = 8, prompt lookup", dict(proposer="ngram"), dict()),
    ("k = 8, shuffled, pages twice as long", dict(), dict(shuffled=True, page=2)),
    ("k = 8, two chunks at once", dict(), dict(prefill_lanes=2)),
    ("k = 8, a third of the pool, offload", dict(), dict(share=0.34)),
    ("k = 8, a third of the pool, recompute", dict(),
     dict(share=0.34, kv_policy="recompute")),
    ("k = 8, stopped and resumed", dict(), dict(resumed=True)),
    ("k = 8, aligned", dict(schedule="aligned"), dict(prefill_lanes=2)),
    ("k = 8, aligned, drafts of 8 bits, a third of the pool",
     dict(schedule="aligned", draft_weights="int8"), dict(share=0.34)),
)  # fmt: skip
_KV_ROWS, _SCORE = "k = 8, KV rows half way", "score of plain decoding's texts"


_MUST_AGREE = (  # how many there are, how many are the same
    ("texts", "identical_texts"),
    ("texts", "identical_logprobs"),
    ("tokens", "identical_tokens"),
    ("kv_rows", "identical_kv_rows"),
    ("scored_tokens", "identical_scores"),
)
_COUNTED = tuple(dict.fromkeys(name for pair in _MUST_AGREE for name in pair))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactnessConfig(Options):
    """What is decoded, and by which numerics."""

    model: str = option("smollm2")
    dtype: str = option("bfloat16", "Type.", choices=models.DTYPES)
    random_weights: bool = option(False, "Random weights of a published shape.")
    numerics: str = option("exact", "Of the engine.", choices=NUMERICS)
    tensor_parallel: int = option(1, "Devices that share the model.")
    num_requests: int = option(32, "Requests of each temperature.", at_least=1)
    temperatures: tuple[float, ...] = option((0.0, 0.65, 1.0), "Temperatures.")
    file_lengths: tuple[int, ...] = option(
        (), "Chats over files of so many tokens, in turn; none: short chats.", of=int,
        at_least=1,
    )  # fmt: skip
    prompt_lengths: tuple[int, ...] = option(
        (), "Prompts of so many random tokens, in turn, instead.", of=int,
        at_least=1,
    )  # fmt: skip
    max_tokens: int = option(2000, "New tokens per request.", at_least=1)
    num_slots: int = option(32, "Requests decoded at the same time.", at_least=2)
    page_size: int = option(64, "Tokens per KV page.", at_least=1)
    prefill_chunk: int = option(256, "Prompt tokens prefilled per step.", at_least=1)


def compare(results, plain):
    """Texts, tokens and log-probabilities that are the same, and how many there are."""
    pairs = list(zip(results, plain, strict=True))
    tokens = [
        sum(x == y for x, y in zip(a.token_ids, b.token_ids, strict=False))
        for a, b in pairs
    ]
    bits = [
        np.float32(a.logprobs).tobytes() == np.float32(b.logprobs).tobytes()
        for a, b in pairs
    ]
    return {
        "texts": len(pairs),
        "identical_texts": sum(a.token_ids == b.token_ids for a, b in pairs),
        "identical_logprobs": sum(bits),
        "tokens": sum(len(b.token_ids) for b in plain),
        "identical_tokens": sum(tokens),
    }


class Exactness(Experiment):
    """Plain decoding once, then every setting."""

    claim = "texts do not depend on anything but their own tokens, in bfloat16 either"
    Config = ExactnessConfig
    SMOKE = models.smoke(
        "model", "max_tokens", "page_size", "prefill_chunk", "num_slots",
        dtype="float32", numerics="fast", num_requests=2, temperatures=(0.65,),
        prompt_lengths=(9, 40),
    )  # fmt: skip

    def __init__(self, config, **how):
        super().__init__(config, **how)
        make = models.random_model if config.random_weights else models.load
        how = dict(dtype=config.dtype, tensor_parallel=config.tensor_parallel)
        self.model = make(config.model, **how)
        self.requests = self._requests()
        self.parts["prompts"] = [list(r.token_ids) for r in self.requests]

    def _requests(self):
        """PreparedPrompts, temperature by temperature."""
        config = self.config
        heats = [t for t in config.temperatures for _ in range(config.num_requests)]
        if config.file_lengths:
            found = context_files.file_prompts(
                self.model.require_tokenizer(),
                lengths=config.file_lengths,
                count=-(-len(heats) // len(config.file_lengths)),
                seed=0,
            )
            prompts = [list(prompt.ids) for prompt in found][: len(heats)]
        elif lengths := config.prompt_lengths:
            rng, vocab = np.random.default_rng(0), self.model.config.vocab_size
            prompts = [
                rng.integers(0, vocab, lengths[i % len(lengths)]).tolist()
                for i in range(len(heats))
            ]
        else:
            prompts = contexts_lib.prompt_ids(self.model, config.num_requests, False)
            prompts = [prompts[i % len(prompts)] for i in range(len(heats))]
        options = dict(max_tokens=config.max_tokens, ignore_eos=True)
        return [
            prepare(self.model, ids, SamplingParams(temperature=t, seed=i, **options))
            for i, (ids, t) in enumerate(zip(prompts, heats, strict=True))
        ]

    def engine(
        self, speculation, *, num_slots=1, page=1, chunk=1, share=None, **options
    ):
        """A ReadableEngine; sizes are factors of those of the run."""
        config = self.config
        longest = max(request.limit for request in self.requests)
        page_size, slots = config.page_size * page, int(config.num_slots * num_slots)
        if share is not None:
            # Drafts need pages too; one request must fit alone.
            rows = max(longest * slots * share, 2 * longest + 256)
            options["num_pages"] = -(-int(rows) // page_size)
        sizes = dict(num_slots=slots, page_size=page_size, max_length=longest)
        return kv_rows.ReadableEngine(
            self.model,
            speculation=SpeculationConfig(**speculation),
            engine=EngineConfig(
                **sizes,
                prefill_chunk=config.prefill_chunk * chunk,
                numerics=config.numerics,
                tensor_parallel=config.tensor_parallel,
                **options,
            ),
        )

    def decode(self, speculation, options):
        """(results by request, what page pressure cost)."""
        options = dict(options)
        order = np.arange(len(self.requests))
        if options.pop("shuffled", False):
            order = np.random.default_rng(1).permutation(order)
        resumed = options.pop("resumed", False)
        with self.engine(speculation, **options) as engine:
            self._submit(engine, order)
            if not resumed:
                results = contexts_lib.finish(engine)
                return results, engine.kv_usage
            results = _first_half(engine)
            begun = {p.prompt_index: p for p in engine.progress({})}
        with self.engine(speculation, **options) as engine:
            done = {result.prompt_index for result in results}
            for index in sorted({*order.tolist()} - done):
                place = dict(prompt_index=index, progress=begun.get(index))
                engine.submit(self.requests[index], **place)
            results += contexts_lib.finish(engine)
            return sorted(results, key=lambda r: r.prompt_index), engine.kv_usage

    def _submit(self, engine, order):
        for index in order:
            engine.submit(self.requests[int(index)], prompt_index=int(index))

    @functools.cached_property
    def plain(self):
        """Results of plain decoding."""
        return self.decode(dict(num_draft_tokens=0), {})[0]

    def rows(self):
        """The settings by name; of a smoke run the last ones."""
        settings = _SETTINGS[-2:] if self.is_smoke else _SETTINGS
        names = *(name for name, _, _ in settings), _KV_ROWS, _SCORE
        return [{"setting": name} for name in names]

    def measure(self, row):
        """How much of the texts of a setting is plain decoding's."""
        if row["setting"] == _KV_ROWS:
            return self._compare_pools()
        if row["setting"] == _SCORE:
            return self._compare_scores()
        options = {name: how for name, *how in _SETTINGS}[row["setting"]]
        results, usage = self.decode(*options)
        total = sum((r.metrics for r in results[1:]), start=results[0].metrics)
        return compare(results, self.plain) | {
            "mean_accepted_draft_tokens": total.mean_accepted_draft_tokens
            if total.num_draft_tokens
            else 0.0,
            "spilled_pages": usage["spilled_pages"],
            "recomputed_tokens": usage["recomputed_tokens"],
        }

    def _compare_pools(self):
        """KV rows of plain decoding and of k = 8, in the midst of the same texts."""
        order = range(min(len(self.requests), self.config.num_slots))
        with self.engine(dict(num_draft_tokens=0)) as plain, self.engine({}) as other:
            for engine in plain, other:
                self._submit(engine, order)
                _first_half(engine)
            return kv_rows.compare(plain, other)

    def _compare_scores(self):
        """Log-probabilities of `score` and of the decoding that made the texts."""
        config, plain = self.config, self.plain
        found = score(
            self.model,
            [request.token_ids for request in self.requests],
            [result.token_ids for result in plain],
            sampling=[request.sampling for request in self.requests],
            engine=EngineConfig(
                num_slots=config.num_slots, page_size=config.page_size,
                prefill_chunk=config.prefill_chunk, numerics=config.numerics,
                tensor_parallel=config.tensor_parallel,
            ),
        )  # fmt: skip
        pairs = [
            np.float32([result.logprobs, scored])
            for result, scored in zip(plain, found, strict=True)
        ]
        return {
            "scored_tokens": sum(pair.shape[1] for pair in pairs),
            "identical_scores": int(
                sum(np.equal(*pair.view(np.int32)).sum() for pair in pairs)
            ),
            "largest_score_difference": float(
                max(np.abs(pair[0] - pair[1]).max() for pair in pairs)
            ),
        }

    def describe(self, records):
        """Sums over the settings."""
        found = {name: sum(r.get(name, 0) for r in records) for name in _COUNTED}
        largest = (r.get("largest_score_difference", 0.0) for r in records)
        return found | {"largest_score_difference": max(largest)}

    def fault(self, records):
        """A bit that differs, of exact numerics."""
        found = self.describe(records)
        wrong = [
            f"{total} {found[total]}, {same} {found[same]}"
            for total, same in _MUST_AGREE
            if found[same] != found[total]
        ]
        if self.config.numerics == "exact" and wrong:
            return f"not as plain decoding: {'; '.join(wrong)}"
        return ""


def _first_half(engine):
    """Decode half of the tokens; returns what has ended."""
    results, half = [], engine.max_new_tokens // 2
    while engine.num_emitted_tokens < half:
        results += engine.step()
    return results + engine.pause()


if __name__ == "__main__":
    experiment.run(Exactness)
