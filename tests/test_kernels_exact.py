"""Rows that are summed in pieces have the same bits in any company.

In the interpreter, small: several rows of a request at once, other lanes, orders,
pages, tables and numbers of CTAs, with and without mass. Tests marked `gpu` do it at
real sizes on the device.
"""

import dataclasses
import functools

import jax.numpy as jnp
import kernel_inputs as ki
import numpy as np
import pytest
from gpu_interpreter import PLAIN, RACES, compile_interpreted

from pallas_kernels.paged_attention import (
    LaneGroup,
    gpu_attend,
    gpu_finish,
    paged_attention,
)
from pallas_kernels.paged_attention import bench_pieces as bench
from pallas_kernels.paged_attention.bits import (
    BitsCase,
    Call,
    Lane,
    Requests,
    compute,
    count_differing,
    variations,
)
from pallas_kernels.paged_attention.cases import AttentionCase
from pallas_kernels.paged_attention.gpu import paged_attention_gpu

# Three keys, an edge of a piece, an own key that begins a piece, eleven pieces. Nine
# rows of eight heads are two tiles.
CASE = BitsCase(
    name="small",
    lengths=(3, 64, 130, 700),
    piece=64,
    num_heads=1,
    group_size=8,
    head_size=64,
    page_size=16,
    other_page_size=8,
    num_queries=(2, 5, 9),
    num_ctas=3,
    other_num_ctas=5,
    draft_lengths=(70, 20),
)
CALLS = dict(variations(CASE))
with_ = dataclasses.replace


class Interpreted:
    """Compiles every program once: calls of one shape share it."""

    def __init__(self, interpret=PLAIN):
        self.interpret, self.programs = interpret, {}

    def __call__(self, requests, call):
        return compute(requests, call, run=self.run, interpret=self.interpret)

    def run(self, fn, arguments):
        shapes = tuple((x.shape, x.dtype) for x in arguments)
        key = (*map(str, fn.keywords.items()), shapes)
        if key not in self.programs:
            self.programs[key] = compile_interpreted(fn, arguments)
        return self.programs[key](arguments)


@pytest.fixture(scope="module")
def plain():
    """The requests, the rows alone in one call, and what computes such calls."""
    requests, interpreted = Requests(CASE), Interpreted()
    return requests, interpreted(requests, CALLS["plain"]), interpreted


def assert_same_rows(actual, expected, num_rows):
    """Asserts that so many rows are in both, with the same bits."""
    assert count_differing(actual, expected) == (0, num_rows)


@pytest.mark.parametrize("name", ["plain, other order", "plain, other neighbours"])
def test_other_lanes_change_no_bit(plain, name):
    requests, expected, interpreted = plain
    actual = interpreted(requests, CALLS[name])
    assert_same_rows(actual, expected, 30 if "order" in name else 16)


COMPANY = {
    "2 rows": dict(page_size=8, num_ctas=5),
    # Edges stand in front, so the last tile has row 7, which must not see row 8's key.
    "9 rows": dict(mass_rows="edges", extra_columns=64, num_ctas=7),
}


@pytest.mark.parametrize("name", COMPANY)
def test_rows_together_have_the_bits_of_rows_alone(plain, name):
    requests, expected, interpreted = plain
    actual = interpreted(requests, with_(CALLS[name], **COMPANY[name]))
    assert_same_rows(actual, expected, {"2": 8, "9": 30}[name[0]])


def test_mass_depends_on_the_rows_of_its_lane_alone(plain):
    requests, expected, interpreted = plain
    call = with_(CALLS["5 rows"], mass_rows="all", draft_lengths=CASE.draft_lengths)
    actual = interpreted(requests, call)
    others = tuple(lane._replace(length=lane.length // 2 + 1) for lane in call.lanes)
    changed = with_(call, lanes=(*others[:3], call.lanes[3]))
    again = interpreted(requests, changed)
    assert_same_rows(actual, expected, 18)
    np.testing.assert_array_equal(actual.mass[3], again.mass[3])
    assert not np.array_equal(actual.mass[2][:, :50], again.mass[2][:, :50])


def test_pieces_have_no_races():
    """And equal the reference, with drafts whose shares end before pieces begin."""
    case = AttentionCase(
        name="races",
        groups=((3, 1), (3, 5, 64)),
        kv_lengths=(90, 0, 200, 200, 133, 0),
        q_lengths=(1, 0, 1, 5, 3, 0),
        head_step=70,
        num_heads=2,
        page_size=16,
        mass_group=1,
    )
    inputs, expected = ki.attention_and_reference(case)
    kernel = functools.partial(paged_attention_gpu, **case.options, interpret=RACES)
    run = compile_interpreted(kernel, inputs)
    ki.assert_attention_close(run(inputs), expected, "bfloat16")


# -- planted faults --------------------------------------------------------------------


def test_a_cut_that_follows_the_neighbours_is_seen():
    """Without pieces, and with enough CTAs that every long lane is cut."""
    requests, interpreted = Requests(with_(CASE, piece=None)), Interpreted()
    calls = [with_(CALLS["plain"], num_ctas=16, lanes=lanes) for lanes in _SHIFTED]
    expected, actual = (interpreted(requests, call) for call in calls)
    assert count_differing(actual, expected)[0]


_LAST = Lane(3, 700, 1)
_SHIFTED = ((Lane(3, 690, 1), _LAST, _LAST), (Lane(3, 300, 1), _LAST, _LAST))


class Cancelling(Requests):
    """Equal keys, and pieces whose values cancel: the order of their sum is seen."""

    def __init__(self, case):
        super().__init__(case)
        size = [2.0**30, 1.0, -(2.0**30), 3.0]
        place = np.concatenate([np.arange(n) // 64 for n in self.lengths])
        values = np.where(place < 4, np.array(size)[place % 4], 0.0)
        self._texts = jnp.broadcast_to(values[:, None, None], self._texts.shape)
        self._texts = self._texts.astype(jnp.bfloat16)
        self._queries *= 0


def _reversed_parts(carry, loaded, *, add=gpu_finish._add_parts):
    return add(carry, loaded[::-1])


def _start_at_eight(shape, value, layout, *, full=gpu_attend.full):
    return full(shape, 8.0 if value < 0 else value, layout)


@pytest.mark.parametrize(
    "kind, module, name, fault, num_ctas",
    [
        (Cancelling, gpu_finish, "_add_parts", _reversed_parts, 4),
        (Requests, gpu_attend, "full", _start_at_eight, 6),
    ],
    ids=["merged in another order", "a maximum that is not the row's"],
)
def test_other_arithmetic_is_seen(monkeypatch, kind, module, name, fault, num_ctas):
    requests = kind(CASE)
    call = with_(CALLS["plain"], lanes=(_LAST, _LAST._replace(length=699)))
    expected = Interpreted()(requests, call)
    monkeypatch.setattr(module, name, fault)
    # Another number of CTAs changes no bit, but makes jax trace the kernel again.
    actual = Interpreted()(requests, with_(call, num_ctas=num_ctas))
    assert count_differing(actual, expected) == (2, 2)


# -- what is refused, and other implementations ----------------------------------------


def test_groups_whose_bits_could_not_be_kept_are_refused():
    """Free groups behind pieces, and chunks that would not get their own launch."""
    for queries, last, message in (
        (2, LaneGroup(1, 2), "put those without one first"),
        (65, LaneGroup(1, 65, 64), "put it last"),
    ):
        lanes = (Lane(3, 130, 2),) * 2
        call = with_(CALLS["2 rows"], lanes=lanes, num_queries=queries)
        q, *rest = map(jnp.asarray, Requests(CASE).arguments(call))
        groups = LaneGroup(1, queries, 64), last
        options = dict(groups=groups, mass_group=1, impl="gpu_interpret")
        with pytest.raises(NotImplementedError, match=message):
            paged_attention(q, *rest, **options)


@pytest.mark.parametrize("impl", ["reference", "tpu_interpret"])
def test_other_implementations_take_pieces(impl):
    case = AttentionCase(
        name="one", groups=((1, 1),), kv_lengths=(9,), num_heads=2, page_size=16
    )
    inputs = tuple(map(jnp.asarray, ki.attention_inputs(case)))
    expected = paged_attention(*inputs, groups=(LaneGroup(1, 1),), impl=impl)
    actual = paged_attention(*inputs, groups=(LaneGroup(1, 1, 64),), impl=impl)
    ki.assert_same_bits(actual.out, expected.out)


# -- the device ------------------------------------------------------------------------

_BITS = [case for case in bench.CASES if isinstance(case, BitsCase)]


def test_variations_of_large_cases_cover_every_company():
    for case in _BITS:
        calls = list(variations(case))
        assert len(dict(calls)) == len(calls)
        assert {call.num_queries for _, call in calls} == {1, 2, 3, 5, 9, 256, 512}
        assert {call.mass_rows for _, call in calls} == {None, "edges", "all"}
        assert all(isinstance(call, Call) for _, call in calls)


@pytest.mark.gpu
@ki.each_case(_BITS)
def test_rows_keep_their_bits_on_the_device(case):
    for name, found in bench.compare(case).items():
        assert found["rows"] and not found["differing"], name
        assert not found.get("differing_masses"), name
