"""`decode()`, `stream()`, `score()`: prompts in, results out, each by its own Engine.

The engine is closed on the way out, whichever way that is: with all results, by an
exception, by Ctrl-C, or because nobody wants the rest of a stream.
"""

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from reprlib import repr as short

from sparsespec_jax.config import EngineConfig, SamplingParams, SpeculationConfig
from sparsespec_jax.engine import Engine
from sparsespec_jax.host.intake import prepare, prepare_all
from sparsespec_jax.host.progress_bar import compiling
from sparsespec_jax.host.results import DecodeResults
from sparsespec_jax.sizes import check_types, with_length

SCORED_ROWS = 16  # tokens of a known text that a step feeds
# Nothing is drafted: what counts is that every slot verifies these rows in every step.
_SCORING = SpeculationConfig(
    num_draft_tokens=SCORED_ROWS - 1, proposer="ngram", policy="full"
)


def decode(
    model,
    prompts,
    *,
    sampling=None,
    speculation=None,
    engine=None,
    chat_template_kwargs=None,
    progress=None,
    on_result=None,
):
    """Decode every prompt and return DecodeResults in submission order.

    With the default acceptor the tokens equal those of plain decoding
    (`SpeculationConfig(num_draft_tokens=0)`) with the same seeds, whatever the other
    options are.

    A text depends on its prompt, its law and its seed alone. So a prompt given twice
    with one seed gives one text twice: several texts of a prompt are
    `SamplingParams(n=...)`, or SamplingParams of another seed each.

    >>> model = load_model("smollm2")  # doctest: +SKIP
    >>> decode(model, ["Why is the sky blue?"])[0].text  # doctest: +SKIP

    Args:
      model: a Model (see `load_model`).
      prompts: a list of prompts, each text, a list of chat messages, or token ids. The
        content of a message is a text or a list of `{"type": "text", "text": ...}`.
      sampling: SamplingParams for all prompts, or one per prompt. `n` samples of a
        prompt follow each other in the results.
      speculation: SpeculationConfig.
      engine: EngineConfig; `max_length=None` here means room for the longest prompt
        and output given, rounded up so that the next call compiles nothing.
      chat_template_kwargs: variables of the chat template, `{"enable_thinking": False,
        "tools": [...]}` say: a dict for all prompts, which are chats then, or a list
        of a dict or None per prompt. One that the template never reads is refused.
      progress: True for a progress bar over output tokens, which says at first for how
        long it has been compiling; or a function called with each StreamEvent.
      on_result: called with each DecodeResult as it finishes.

    Raises:
      ValueError: before any work starts, for any prompt or option that is wrong.
      KeyboardInterrupt: Ctrl-C, when the step under way has ended.

    Any exception that ends decoding early (Ctrl-C, one of a callback or of the device)
    carries what had been generated: `results`, the DecodeResults of the requests that
    had finished, and `unfinished`, a RequestProgress of each other one that had begun.
    `Engine.resume_request` goes on from it to the text that it would have had.
    """
    runner = _prepare(
        model, prompts, sampling, speculation, engine, chat_template_kwargs
    )
    step, bar = _progress(progress, runner)
    with contextlib.nullcontext() if bar is None else contextlib.closing(bar):
        with compiling(bar):
            runner.warm_up()
        finished = _Finished(runner)
        with finished.carried_by_exceptions():
            with runner:
                while runner.has_work:
                    for result in finished.add(step()):
                        if on_result is not None:
                            on_result(result)
            return finished.as_results()


def stream(
    model,
    prompts,
    *,
    sampling=None,
    speculation=None,
    engine=None,
    chat_template_kwargs=None,
):
    """Yield a StreamEvent whenever a request has new output; arguments as `decode`.

    Closing the generator early drops what is unfinished.

    Raises:
      ValueError: at once, for any prompt or option that is wrong.
      KeyboardInterrupt: Ctrl-C while the generator runs. It carries what exceptions of
        `decode` do.
    """
    runner = _prepare(
        model, prompts, sampling, speculation, engine, chat_template_kwargs
    )
    runner.warm_up()

    def events():
        finished = _Finished(runner)
        with finished.carried_by_exceptions(), runner:
            while runner.has_work:
                results, new = runner.step_with_events()
                finished.add(results)
                yield from new

    return events()


def score(
    model, prompts, outputs, *, sampling=None, engine=None, chat_template_kwargs=None
):
    """Log-probabilities of the tokens of given outputs, each behind its prompt.

    Texts go through the step that decodes: prompts by chunks, outputs by verifications.
    A prompt's own tokens behind its first one are an output too: `score(model,
    [ids[:1]], [ids[1:]])`; `SamplingParams(prompt_logprobs=0)` tells of them beside
    decoding.

    >>> results = decode(model, prompts, engine=engine)  # doctest: +SKIP
    >>> outputs = [result.token_ids for result in results]  # doctest: +SKIP
    >>> score(model, prompts, outputs, engine=engine)[0]  # doctest: +SKIP

    Args:
      model: a Model (see `load_model`).
      prompts: a list of prompts, each text, a list of chat messages, or token ids.
      outputs: as many lists of token ids, what follows each prompt.
      sampling: SamplingParams for all prompts, or one per prompt: `logprobs` says
        whether those of the model ("raw") or of the law ("processed", of all steps
        that SamplingParams lists) are wanted. Nothing else of it counts.
      engine: EngineConfig; with `numerics="exact"` the results are those of `decode`
        with exact numerics in every bit, whatever the other options of both were.
      chat_template_kwargs: as `decode` takes them.

    Returns:
      A list with a tuple of floats per output, natural logarithms. A token that the law
      excludes has -inf; a greedy law (temperature 0) excludes all but the likeliest.

    Raises:
      ValueError: before any work starts, for any argument that is wrong.
    """
    engine = engine or EngineConfig()
    check_types(model, _SCORING, engine)
    prompts, outputs = _listed(prompts), list(outputs)
    if len(prompts) != len(outputs):
        raise ValueError(
            f"{len(outputs)} outputs for {len(prompts)} prompts: give one for each"
        )
    known = [_token_ids(model, number, ids) for number, ids in enumerate(outputs)]
    laws = _one_per_prompt(sampling, len(prompts))
    laws = [_scored_law(law, len(ids)) for law, ids in zip(laws, known, strict=True)]
    variables = _variables_per_prompt(chat_template_kwargs, len(prompts))
    prepared = [
        dataclasses.replace(prompt, stop_ids=frozenset())
        for prompt in prepare_all(model, prompts, laws, variables)
    ]
    if engine.max_length is None:
        longest = max(prompt.limit for prompt in prepared)
        engine = with_length(model, _SCORING, engine, longest)
    with Engine(model, speculation=_SCORING, engine=engine) as runner:
        for index, (prompt, ids) in enumerate(zip(prepared, known, strict=True)):
            runner.submit(prompt, prompt_index=index, scored=ids)
        results = []
        while runner.has_work:
            results += runner.step()
    results.sort(key=lambda result: result.prompt_index)
    return [result.logprobs for result in results]


def _scored_law(law, num_tokens):
    """What of SamplingParams counts when `num_tokens` tokens are scored."""
    ends = dict(max_tokens=num_tokens, n=1, stop=(), ignore_eos=True, top_logprobs=0)
    ends |= dict(prompt_logprobs=None)
    if law.logprobs == "raw":
        return SamplingParams(**ends)
    least = min(law.min_tokens, num_tokens)
    stops = law.stop_token_ids if least else ()
    return dataclasses.replace(law, **ends, min_tokens=least, stop_token_ids=stops)


class _Finished:
    """The results of an engine so far."""

    def __init__(self, runner):
        self._runner, self._start = runner, time.perf_counter()
        self._results = {}

    def add(self, results):
        """Keep these DecodeResults, and return them."""
        self._results |= {result.request_id: result for result in results}
        return results

    def as_results(self):
        """DecodeResults in submission order."""
        stats = self._runner.stats(time.perf_counter() - self._start)
        return DecodeResults([self._results[i] for i in sorted(self._results)], stats)

    @contextlib.contextmanager
    def carried_by_exceptions(self):
        """Give an exception that leaves the block what had been generated."""
        try:
            yield
        except GeneratorExit:  # the reader of a stream wants no more
            raise
        except BaseException as error:
            self.add(self._runner.last_finished)
            error.results = self.as_results()
            error.unfinished = tuple(self._runner.progress({}))
            error.add_note(
                f"{len(error.results)} requests had finished: see .results of this "
                f"exception; {len(error.unfinished)} others had begun: see .unfinished"
            )
            raise


def _prepare(model, prompts, sampling, speculation, engine, chat_template_kwargs):
    """An Engine with all requests queued and everything checked."""
    speculation = speculation or SpeculationConfig()
    engine = engine or EngineConfig()
    check_types(model, speculation, engine)
    prompts = _listed(prompts)
    sampling = _one_per_prompt(sampling, len(prompts))
    variables = _variables_per_prompt(chat_template_kwargs, len(prompts))
    prepared = prepare_all(model, prompts, sampling, variables)
    if engine.max_length is None:
        longest = max(prompt.limit for prompt in prepared)
        if longest > model.config.max_length:
            raise ValueError(
                f"the longest prompt and max_tokens make {longest} tokens, the model "
                f"{model.name} was made for {model.config.max_length}: lower max_tokens"
            )
        engine = with_length(model, speculation, engine, longest)
    runner = Engine(model, speculation=speculation, engine=engine)
    for index, prompt in enumerate(prepared):
        runner.submit(prompt, prompt_index=index)
    return runner


def _listed(prompts):
    """The prompts as a list; ValueError if they are none, or there is none."""
    if isinstance(prompts, str | bytes | dict) or not hasattr(prompts, "__iter__"):
        raise ValueError(
            "prompts must be a list of prompts, each text, chat messages or token ids, "
            f"got {type(prompts).__name__}; wrap a single one in []"
        )
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts is empty; give at least one prompt")
    return prompts


def _one_per_prompt(sampling, count):
    if sampling is None:
        sampling = SamplingParams()
    if isinstance(sampling, SamplingParams):
        return [sampling] * count
    if not hasattr(sampling, "__iter__"):
        raise ValueError(
            "sampling must be SamplingParams or a list of them, one per prompt, got "
            f"{sampling!r}"
        )
    sampling = list(sampling)
    if len(sampling) != count:
        raise ValueError(f"{len(sampling)} sampling params for {count} prompts")
    for params in sampling:
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling holds SamplingParams, got {params!r}")
    return sampling


def _variables_per_prompt(given, count):
    """Chat-template variables of every prompt: a dict or None each."""
    if given is None or isinstance(given, Mapping):
        return [given] * count
    if not isinstance(given, list | tuple) or len(given) != count:
        raise ValueError(
            "chat_template_kwargs must be a dict, or a list of a dict or None for each "
            f"of the {count} prompts, got {short(given)}"
        )
    return list(given)


def _progress(progress, runner):
    """(a function that runs one step and returns results, a tqdm bar or None).

    Text is decoded on the way only if `progress` is a function that may want it.
    """
    if callable(progress):

        def step():
            results, events = runner.step_with_events()
            for event in events:
                progress(event)
            return results

        return step, None
    if not progress:
        return runner.step, None
    from tqdm.auto import tqdm  # a display only; not needed to decode

    bar = tqdm(total=runner.max_new_tokens, unit="tok")

    def step_with_bar():
        results = runner.step()
        # Requests that end early leave less to do.
        bar.total = runner.num_emitted_tokens + runner.max_new_tokens
        if hasattr(bar, "container"):  # a notebook's widget has its own maximum
            bar.container.children[1].max = bar.total
        bar.update(runner.num_emitted_tokens - bar.n)
        return results

    return step_with_bar, bar


def _token_ids(model, number, output):
    """The token ids of an output, checked as those of a prompt."""
    if isinstance(output, str):
        raise ValueError(
            f"output {number} is text, which has no one way back to the tokens that it "
            "was made of: give token ids"
        )
    try:
        return prepare(model, output, SamplingParams()).token_ids
    except ValueError as error:
        raise ValueError(f"output {number}: {error}") from error
