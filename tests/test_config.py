"""Option records: what counts as a number, what they store, and true refusals."""

import dataclasses
import fractions
import json

import jax.numpy as jnp
import numpy as np
import pytest

from sparsespec_jax import EngineConfig, SamplingParams, SpeculationConfig
from sparsespec_jax.policies.base import Policy
from sparsespec_jax.policies.mass import MassOptions
from sparsespec_jax.proposers.base import NGram
from sparsespec_jax.proposers.eagle import Eagle

# A value of every number of every record that none of the checks refuses.
NUMBERS = {
    SamplingParams: dict(
        temperature=0.5, top_k=3, top_p=0.5, min_p=0.25, seed=5, n=2, max_tokens=7
    ),
    SpeculationConfig: dict(
        num_draft_tokens=4, budget_ratio=0.5, min_budget=9, forced_acceptance=2.0,
        num_recent=2, num_sinks=3, draft_top_m=8, draft_steps=2, num_guesses=2,
    ),
    EngineConfig: dict(
        num_slots=2, page_size=8, num_pages=64, max_length=99, prefill_chunk=32,
        prefill_lanes=2, lag=2, host_pages=5, host_chunk_pages=4,
    ),
    Policy: dict(anchor_every=2, index_bits=4.0),
    MassOptions: dict(
        top_p=1.0, decay=0.5, window=1, max_churn=0.5, widen=0.5, smooth=3,
        recent_share=0.5,
    ),
    NGram: dict(min_match=2, max_match=3),
    Eagle: dict(window=4),
}  # fmt: skip
OTHERS = {
    "forced_acceptance": dict(acceptor="forced"),
    "draft_steps": dict(proposer="cascade"),
    "num_guesses": dict(proposer="cascade"),
    "anchor_every": dict(name="p", needs=(), select=print),
    "index_bits": dict(name="p", needs=(), select=print, per_step=True),
    "window": dict(config=None, params=None),
}
FIELDS = [(record, name) for record, fields in NUMBERS.items() for name in fields]


def make(record, name, value):
    others = OTHERS.get(name, {})
    if record is MassOptions:
        others = {}
    return record(**{**others, name: value})


def names(field):
    return f"{field[0].__name__}.{field[1]}"


def forms(value):
    """The same number as a program may come by it."""
    if isinstance(value, int):
        yield from (np.int64(value), np.uint8(value), np.array(value))
        yield jnp.int32(value)
    else:
        yield from (np.float32(value), np.float64(value), np.array(value))
        yield from (jnp.float32(value), jnp.bfloat16(value), fractions.Fraction(value))
        if value == int(value):
            yield from (int(value), np.int32(value))


@pytest.mark.parametrize("field", FIELDS, ids=names)
def test_numbers_of_numpy_and_jax_are_numbers(field):
    record, name = field
    value = NUMBERS[record][name]
    plain = make(record, name, value)
    for form in forms(value):
        got = make(record, name, form)
        assert type(getattr(got, name)) is type(value)
        if record is not Eagle:  # which is its own identity
            assert got == plain and hash(got) == hash(plain)
    if record in (SamplingParams, SpeculationConfig, EngineConfig):
        copy = record(**json.loads(json.dumps(dataclasses.asdict(plain))))
        assert copy == plain and hash(copy) == hash(plain)


@pytest.mark.parametrize("field", FIELDS, ids=names)
def test_what_is_no_number_is_refused_in_one_true_line(field):
    record, name = field
    is_int = isinstance(NUMBERS[record][name], int)
    bad = ["1", b"1", True, np.True_, np.array(True), [1], np.array([1]), 1j, -1, {}]
    bad += [float("nan"), np.float32("nan"), float("inf")]
    bad += [1.0, np.float32(1), fractions.Fraction(1)] if is_int else [np.complex64(1)]
    bad += [] if name == "top_k" else [10**400]  # which the vocabulary bounds
    for value in bad:
        with pytest.raises(ValueError, match=f"^{name} must be .*, got ") as error:
            make(record, name, value)
        message = str(error.value)
        assert "\n" not in message and len(message) < 160
        if not isinstance(value, int | float | np.floating):
            assert "must be a number" in message or "an integer" in message


def test_integers_of_int32_end_where_it_ends():
    for record, name in FIELDS:
        if isinstance(NUMBERS[record][name], int) and name not in ("seed", "top_k"):
            with pytest.raises(
                ValueError, match=f"{name} must be an integer in .*, got"
            ):
                make(record, name, 2**31)
    assert SamplingParams(max_tokens=2**31 - 1, top_k=2**70, seed=2**64 - 1)
    with pytest.raises(ValueError, match="each of stop_token_ids must be .*2147483648"):
        SamplingParams(stop_token_ids=[2**31])


def test_a_ratio_that_a_device_rounds_to_nothing_is_refused():
    """Host and device would count different numbers of pages."""
    with pytest.raises(ValueError, match=r"budget_ratio must be in \[1e-30, 1.0\]"):
        SpeculationConfig(budget_ratio=1e-40)


@pytest.mark.parametrize(
    "ids",
    [
        [3, 1],
        np.array([3, 1]),
        jnp.array([3, 1]),
        (np.int64(3), jnp.int32(1)),
        iter([3, 1]),
        range(3, 0, -2),
        dict.fromkeys([3, 1]).keys(),
    ],
)
def test_stop_token_ids_come_in_any_collection(ids):
    params = SamplingParams(stop_token_ids=ids)
    assert params == SamplingParams(stop_token_ids=(3, 1))
    assert [type(i) for i in params.stop_token_ids] == [int, int]


def test_sets_are_sorted_and_none_is_none():
    assert SamplingParams(stop_token_ids={30, 1, 9}).stop_token_ids == (1, 9, 30)
    assert SamplingParams(stop=frozenset("cab")).stop == ("a", "b", "c")
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()
    choices = SpeculationConfig(draft_token_choices=np.arange(3))
    assert choices.draft_token_choices == (0, 1, 2)
    assert SpeculationConfig(draft_token_choices=None) == SpeculationConfig()


def test_texts():
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=np.array(["ab", "c"])).stop == ("ab", "c")
    assert type(SamplingParams(stop=np.str_("ab")).stop[0]) is str
    assert type(SamplingParams(logprobs=np.str_("raw")).logprobs) is str


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(stop_token_ids="ab"), "stop_token_ids must be a list of integers"),
        (dict(stop_token_ids=b"ab"), "stop_token_ids must be a list of integers"),
        (dict(stop_token_ids=3), "stop_token_ids must be a list of integers, got 3"),
        (dict(stop_token_ids=np.array(3)), "stop_token_ids must be a list of integers"),
        (dict(stop_token_ids=["a"]), "each of stop_token_ids must be an integer in"),
        (dict(stop_token_ids=[[1]]), "each of stop_token_ids must be an integer in"),
        (dict(stop_token_ids=[True]), "each of stop_token_ids must be an integer in"),
        (dict(stop_token_ids=[1.0]), "each of stop_token_ids must be an integer in"),
        (dict(stop_token_ids=[-1]), "each of stop_token_ids must be an integer in"),
        (dict(stop=3), "stop must be a list of strings, got 3"),
        (dict(stop=b"ab"), "stop must be a list of strings, got b'ab'"),
        (dict(stop=[b"ab"]), "stop must hold non-empty strings, got b'ab'"),
        (dict(stop=[""]), "stop must hold non-empty strings, got ''"),
        (dict(ignore_eos="no"), "ignore_eos must be True or False, got 'no'"),
        (dict(ignore_eos=None), "ignore_eos must be True or False, got None"),
        (dict(logprobs=["raw"]), "logprobs must be one of"),
        (dict(logprobs=np.array(["raw"])), "logprobs must be one of"),
    ],
)
def test_what_is_no_list_text_or_flag_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_flags_of_numpy_are_flags():
    for flag in (np.True_, np.array(True), jnp.array(True)):
        assert SamplingParams(ignore_eos=flag).ignore_eos is True
    assert SamplingParams(ignore_eos=np.False_) == SamplingParams()
