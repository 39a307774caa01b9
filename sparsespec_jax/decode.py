"""`decode()` and `stream()`: prompts in, results out, over an Engine of their own."""

import dataclasses
import time

from sparsespec_jax.config import EngineConfig, SamplingParams, SpeculationConfig
from sparsespec_jax.engine import Engine
from sparsespec_jax.results import DecodeResults
from sparsespec_jax.text import encode_prompt


def decode(
    model,
    prompts,
    *,
    sampling=None,
    speculation=None,
    engine=None,
    progress=None,
    on_result=None,
):
    """Decode every prompt and return DecodeResults in submission order.

    With the default acceptor the tokens equal those of plain decoding
    (`SpeculationConfig(num_draft_tokens=0)`) with the same seeds, whatever the other
    options are.

    >>> model = load_model("smollm2")  # doctest: +SKIP
    >>> decode(model, ["Why is the sky blue?"])[0].text  # doctest: +SKIP

    Args:
      model: a Model (see `load_model`).
      prompts: a list of prompts, each text, a list of chat messages, or token ids.
      sampling: SamplingParams for all prompts, or one per prompt. `n` samples of a
        prompt follow each other in the results.
      speculation: SpeculationConfig.
      engine: EngineConfig; `max_length=None` here means the longest prompt and
        output given.
      progress: True for a progress bar over output tokens, or a function called
        with each StreamEvent.
      on_result: called with each DecodeResult as it finishes.

    Raises:
      ValueError: before any work starts, for any prompt or option that is wrong.
    """
    runner = _prepare(model, prompts, sampling, speculation, engine)
    step, close = _progress(progress, runner)
    results = {}
    start = time.perf_counter()
    try:
        while runner.has_work:
            for result in step():
                results[result.request_id] = result
                if on_result is not None:
                    on_result(result)
    finally:
        close()
    stats = runner.stats(time.perf_counter() - start)
    return DecodeResults([results[i] for i in sorted(results)], stats)


def stream(model, prompts, *, sampling=None, speculation=None, engine=None):
    """Yield a StreamEvent whenever a request has new output; arguments as `decode`.

    Closing the generator early drops what is unfinished.
    """
    runner = _prepare(model, prompts, sampling, speculation, engine)

    def events():
        while runner.has_work:
            yield from runner.step_with_events()[1]

    return events()


def _prepare(model, prompts, sampling, speculation, engine):
    """Check everything, then build and warm up an Engine with all requests queued."""
    if isinstance(prompts, str | dict):
        raise ValueError("prompts must be a list of prompts; wrap a single one in []")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts is empty; give at least one prompt")
    sampling = _one_per_prompt(sampling, len(prompts))
    tokens = []
    for index, prompt in enumerate(prompts):
        try:
            tokens.append(
                encode_prompt(prompt, model.tokenizer, model.config.vocab_size)
            )
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from error
    engine = engine or EngineConfig()
    if engine.max_length is None:
        longest = max(
            len(t) + s.max_tokens for t, s in zip(tokens, sampling, strict=True)
        )
        if longest > model.config.max_length:
            raise ValueError(
                f"the longest prompt and max_tokens make {longest} tokens, the model "
                f"{model.name} was made for {model.config.max_length}: lower max_tokens"
            )
        engine = dataclasses.replace(engine, max_length=longest)
    runner = Engine(
        model, speculation=speculation or SpeculationConfig(), engine=engine
    )
    for prompt, params in zip(tokens, sampling, strict=True):
        runner.check_request(prompt, params)
    runner.warm_up(filters=any(params.filters for params in sampling))
    for index, (prompt, params) in enumerate(zip(tokens, sampling, strict=True)):
        runner.add_request(prompt, params, prompt_index=index)
    return runner


def _one_per_prompt(sampling, count):
    if sampling is None:
        sampling = SamplingParams()
    if isinstance(sampling, SamplingParams):
        return [sampling] * count
    sampling = list(sampling)
    if len(sampling) != count:
        raise ValueError(f"{len(sampling)} sampling params for {count} prompts")
    for params in sampling:
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling holds SamplingParams, got {params!r}")
    return sampling


def _progress(progress, runner):
    """(a function that runs one step and returns results, one that ends the display).

    Text is decoded on the way only if `progress` is a function that may want it.
    """
    if callable(progress):

        def step():
            results, events = runner.step_with_events()
            for event in events:
                progress(event)
            return results

        return step, lambda: None
    if not progress:
        return runner.step, lambda: None
    from tqdm.auto import tqdm  # a display only; not needed to decode

    bar = tqdm(total=runner.max_new_tokens, unit="tok")

    def step_with_bar():
        results = runner.step()
        bar.update(runner.num_emitted_tokens - bar.n)
        return results

    return step_with_bar, bar.close
