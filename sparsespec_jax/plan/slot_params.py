"""The device's record of a request: one row of int32, packed and read here alone.

Floats travel as their bit patterns. No jax.
"""

import hashlib

import numpy as np

from sparsespec_jax.models.option_fields import MAX_INT

_SEED_LOW, _SEED_HIGH, _TEMPERATURE, _TOP_K, _TOP_P, _MIN_P = range(6)
_LIMIT, _LOGPROB_MODE, _BUDGET_RATIO, _MIN_BUDGET, _STOP_IDS = range(6, 11)
NUM_STOP_IDS = 8  # that the device looks for; the host looks for all
NUM_SLOT_PARAMS = _STOP_IDS + NUM_STOP_IDS
NO_TOKEN = -1
_SMALLEST = float(np.finfo(np.float32).tiny)  # that no device takes for 0


def stop_ids(eos_ids, sampling):
    """Token ids that end a request, a frozenset."""
    eos = () if sampling.ignore_eos else tuple(eos_ids)
    return frozenset(eos) | frozenset(sampling.stop_token_ids)


def is_greedy(sampling):
    """True if a law is the argmax: a temperature that a device may round to 0 is 0."""
    return sampling.temperature < _SMALLEST


def slot_params(sampling, sample, limit, stops, speculation):
    """The record of a request, int32 [NUM_SLOT_PARAMS].

    `sample` counts the samples of a prompt, `limit` the tokens at which the request
    ends, `stops` are its stop token ids, of which the first few fit.
    """
    params = np.full(NUM_SLOT_PARAMS, NO_TOKEN, np.int32)
    text = f"{sampling.seed}/{sample}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    params[_SEED_LOW : _SEED_HIGH + 1] = np.frombuffer(digest, np.int32)
    floats = {
        _TEMPERATURE: 0.0 if is_greedy(sampling) else sampling.temperature,
        _TOP_P: sampling.top_p,
        _MIN_P: sampling.min_p,
        _BUDGET_RATIO: speculation.budget_ratio,
    }
    params[list(floats)] = np.array(list(floats.values()), np.float32).view(np.int32)
    params[_MIN_BUDGET] = speculation.min_budget
    params[_TOP_K] = min(sampling.top_k, MAX_INT)
    params[_LIMIT] = limit
    params[_LOGPROB_MODE] = sampling.logprobs == "processed"
    known = sorted(i for i in stops if i <= MAX_INT)[:NUM_STOP_IDS]
    params[_STOP_IDS : _STOP_IDS + len(known)] = known
    return params


def _column(place, dtype, doc):
    """A property: the column (or columns) at `place` as what its bits stand for."""

    def get(self):
        bits = self._rows[:, place]
        return bits if dtype == "int32" else self._bits(bits, dtype)

    return property(get, doc=doc)


class SlotParams:
    """Rows of records [R, NUM_SLOT_PARAMS] (numpy or jax) by name.

    `bits` turns int32 bit patterns into what they stand for: a function (array, dtype
    name) that numpy and jax spell differently.
    """

    def __init__(self, rows, bits):
        self._rows, self._bits = rows, bits

    seed = _column(slice(_SEED_LOW, _SEED_HIGH + 1), "uint32", "uint32 [R, 2].")
    temperature = _column(_TEMPERATURE, "float32", "float32 [R], 0 is greedy.")
    top_k = _column(_TOP_K, "int32", "int32 [R], 0 keeps all.")
    top_p = _column(_TOP_P, "float32", "float32 [R].")
    min_p = _column(_MIN_P, "float32", "float32 [R].")
    budget_ratio = _column(_BUDGET_RATIO, "float32", "float32 [R], s.")
    min_budget = _column(_MIN_BUDGET, "int32", "int32 [R].")
    limit = _column(_LIMIT, "int32", "int32 [R], tokens at which the request ends.")
    stop_ids = _column(
        slice(_STOP_IDS, None), "int32", "int32 [R, NUM_STOP_IDS], NO_TOKEN if unused."
    )

    @property
    def processed_logprobs(self):
        """bool [R], log-probabilities of the law and not of the model."""
        return self._rows[:, _LOGPROB_MODE] != 0
