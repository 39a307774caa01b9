"""Decode prompts plainly and speculatively, and compare them token by token.

    python -m experiments.generate --max_tokens 256 --output_dir runs/first

Both modes run in one process on the same prompts, seeds and kernels; plain decoding
is the same engine without drafts. The exit status is 1 if a token differs that must
not. Writes config.json, environment.json, results.jsonl and summary.json to
--output_dir; after an interruption, --resume decodes what is missing.
"""

from __future__ import annotations

import dataclasses
import time

from absl import app, flags
from tqdm import tqdm

from experiments import config as config_lib
from experiments import record, report
from experiments.prompts import load_prompts
from sparsespec_jax import Engine, load_model

_CONFIG = flags.DEFINE_string(
    "config", "demo", "Name of a module in experiments/configs; flags override it."
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Run directory. Default: runs/generate-DATE-TIME."
)
_RESUME = flags.DEFINE_bool("resume", False, "Continue the run in --output_dir.")


def _define_option_flags():
    define = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
    }
    for field in dataclasses.fields(config_lib.GenerateConfig):
        text = f"{field.metadata['help']} (demo: {field.default!r})"
        define[type(field.default)](field.name, None, text)


_define_option_flags()


def config_from_flags() -> config_lib.GenerateConfig:
    """The named config with the given flags in place of its values."""
    base = config_lib.load_config(_CONFIG.value)
    names = [field.name for field in dataclasses.fields(base)]
    given = {name: flags.FLAGS[name].value for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(base, **given)


def decode_missing(engine, prompts, config, *, mode, directory, describe=None):
    """Decode the prompts that `directory` has no record of in this mode.

    Each finished request is recorded before the next step is taken.
    """
    done = {r["index"] for r in directory.records if r["mode"] == mode}
    pending = {}
    for index, prompt in enumerate(prompts):
        if index not in done:
            pending[engine.add_request(prompt, config.sampling(index))] = index
    start, num_steps = time.perf_counter(), 0
    bar = tqdm(total=len(prompts), initial=len(done), desc=mode, unit="request")
    with bar:
        while pending:
            results, num_steps = engine.step(), num_steps + 1
            for result in results:
                directory.append(
                    {
                        "mode": mode,
                        "index": pending.pop(result.request_id),
                        "session": directory.session,
                        "step": num_steps,
                        "elapsed_s": time.perf_counter() - start,
                        "prompt_token_ids": list(result.prompt_token_ids),
                        "token_ids": list(result.token_ids),
                        "text": result.text,
                        "logprobs": list(result.logprobs),
                        "finish_reason": result.finish_reason,
                        "stop_reason": result.stop_reason,
                        "metrics": result.metrics.to_dict(),
                    }
                )
                bar.update()
