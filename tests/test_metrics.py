"""Counting conventions and the byte model, against numbers worked out by hand."""

import json
import math

import pytest

from sparsespec_jax.host import cost_model, metrics
from sparsespec_jax.host.metrics import DecodeStats, KvTokens, RequestMetrics


def request(accepted, *, k=4, prompt=10, outputs=None):
    """A finished request with one verify step per entry of `accepted`."""
    result = RequestMetrics(max_draft_tokens=k, num_prompt_tokens=prompt)
    for count in accepted:
        result.record_verification(num_accepted=count, num_drafted=k)
    committed = 1 + sum(accepted) + len(accepted)
    result.finish(num_output_tokens=committed if outputs is None else outputs)
    return result


def test_acceptance_conventions_by_hand():
    # Four cycles of k = 4 accept 4, 0, 2, 2 drafts: 8 of 16, and 12 tokens commit.
    m = request([4, 0, 2, 2])
    assert m.num_verify_steps == 4
    assert m.num_draft_tokens == 16
    assert m.num_accepted_draft_tokens == 8
    assert m.mean_accepted_draft_tokens == 2.0
    assert m.mean_acceptance_length == 3.0  # with the bonus token
    assert m.draft_acceptance_rate == 0.5
    assert m.accepted_histogram == [1, 0, 2, 0, 1]
    assert m.accepted_at_position == [3, 3, 1, 1]
    assert m.acceptance_at_position == [0.75, 0.75, 0.25, 0.25]
    assert m.num_output_tokens == 13  # 4 + 0 + 2 + 2 drafts, 4 bonus, 1 from prefill
    assert m.num_decode_tokens == 12


def test_a_cascade_by_hand():
    # Two cycles of k = 4: 3 drafts in 2 steps that checked 5 guesses, 4 in 1 of 3.
    m = RequestMetrics(max_draft_tokens=4, max_draft_steps=2)
    for accepted, drafted, steps, guesses in [(2, 3, 2, 5), (4, 4, 1, 3)]:
        m.record_verification(
            num_accepted=accepted,
            num_drafted=drafted,
            num_draft_steps=steps,
            num_guesses=guesses,
        )
    assert (m.num_draft_steps, m.num_guesses, m.num_accepted_guesses) == (3, 8, 4)
    assert m.steps_per_cycle == 2.5 and m.guess_hit_rate == 0.5
    assert m.mean_accepted_draft_tokens == 3.0
    assert (m + m).max_draft_steps == 2 and (m + m).guess_hit_rate == 0.5
    assert RequestMetrics.from_dict(m.to_dict()) == m
    plain = request([4, 0])
    assert plain.steps_per_cycle == 5 and math.isnan(plain.guess_hit_rate)


def test_identities_hold_between_the_conventions():
    m = request([4, 0, 2, 2, 1, 3, 4])
    assert sum(m.accepted_at_position) == m.num_accepted_draft_tokens
    assert sum(m.acceptance_at_position) == pytest.approx(m.mean_accepted_draft_tokens)
    falling = m.acceptance_at_position
    assert all(a >= b for a, b in zip(falling, falling[1:], strict=False))
    assert m.num_decode_tokens == m.num_verify_steps + m.num_accepted_draft_tokens


def test_short_drafts_lower_the_judged_count_only():
    m = RequestMetrics(max_draft_tokens=4)
    m.record_verification(num_accepted=1, num_drafted=2)
    assert (m.num_draft_tokens, m.accepted_histogram) == (2, [0, 1, 0, 0, 0])


@pytest.mark.parametrize("accepted, drafted", [(-1, 4), (3, 2), (5, 5)])
def test_impossible_counts_raise(accepted, drafted):
    m = RequestMetrics(max_draft_tokens=4)
    with pytest.raises(ValueError, match="num_accepted"):
        m.record_verification(num_accepted=accepted, num_drafted=drafted)
    assert m.num_verify_steps == 0


def test_plain_decoding_has_length_one_and_undefined_rate():
    m = request([0, 0, 0], k=0)
    assert m.mean_acceptance_length == 1.0
    assert m.acceptance_at_position == []
    assert math.isnan(m.draft_acceptance_rate)


def test_plain_reads_by_hand():
    # Prompt 10, output 4: tokens 1, 2, 3 read 11, 12, 13 keys (own key included).
    assert metrics.plain_kv_tokens(num_prompt_tokens=10, num_output_tokens=4) == 36
    assert metrics.plain_kv_tokens(num_prompt_tokens=10, num_output_tokens=1) == 0
    assert metrics.plain_kv_tokens(num_prompt_tokens=10, num_output_tokens=0) == 0


def test_a_gathered_token_counts_as_read_and_write():
    m = request([0, 0, 0], outputs=4)
    m.kv_tokens_read = KvTokens(draft=3, verify=20, prefill=100, gather=2)
    assert m.kv_tokens_read.decode == 27  # prefill is the same in plain decoding
    assert m.kv_read_ratio == 27 / 36
    assert m.kv_tokens_per_output_token == 9.0


def test_totals_are_ratios_of_sums_and_means_over_requests():
    # 2 steps accepting 4 each, and 8 steps accepting none: 8 / 10 against (4 + 0) / 2.
    stats = DecodeStats(
        requests=(request([4, 4]), request([0] * 8)),
        num_slots=2,
        num_steps=40,
        wall_time_s=2.0,
        kv_bytes_per_token=8,
        weight_bytes=1000,
    )
    assert stats.total.num_requests == 2
    assert stats.total.mean_accepted_draft_tokens == 0.8
    assert stats.mean_over_requests("mean_accepted_draft_tokens") == 2.0
    assert stats.total.num_decode_tokens == 18
    assert stats.tokens_per_s == 10.0


def test_mean_over_requests_leaves_out_the_undefined():
    stats = DecodeStats(
        requests=(request([4, 2]), request([], outputs=1)),
        num_slots=1,
        num_steps=1,
        wall_time_s=0.0,
        kv_bytes_per_token=1,
        weight_bytes=1,
    )
    assert stats.mean_over_requests("mean_acceptance_length") == 4.0
    assert math.isnan(stats.tokens_per_s)


def test_sums_of_different_draft_lengths_pad_the_histogram():
    total = request([1], k=1) + request([3], k=3)
    assert total.max_draft_tokens == 3
    assert total.accepted_histogram == [0, 1, 0, 1]
    assert metrics.sum_metrics([]).num_output_tokens == 0


def bound(**changed):
    """speed_of_light at k = 8, a = 6, s = 0.05, W = KV = 1, but for what is given."""
    options = dict(
        num_draft_tokens=8,
        mean_accepted_draft_tokens=6,
        weight_bytes=1.0,
        kv_bytes=1.0,
        budget_ratio=0.05,
    )
    return cost_model.speed_of_light(**options | changed)


def test_speed_of_light_by_hand():
    # No weights: 7 / (0.4 + 1 + 0.1) = 4.666...
    assert bound(weight_bytes=0, kv_bytes=3.0) == pytest.approx(7 / 1.5)
    # W = KV = 1: 7 * 2 / (9 + 1.5)
    assert bound() == pytest.approx(14 / 10.5)


def test_weights_count_as_more_where_arithmetic_takes_longer():
    # 128 slots: 128 rows in a plain step, 128 * 17 / 9 in one of a cycle, of 200.
    found = bound(num_slots=128, balance_tokens=200.0)
    assert found == pytest.approx(14 / (128 * 17 / 200 + 1.5))
    # And in a plain step too: all arithmetic, 17 / 7 token forwards per token.
    found = bound(num_slots=128, balance_tokens=1.0, kv_bytes=0.0)
    assert found == pytest.approx(7 / 17)


def test_aligned_steps_read_the_weights_of_drafts_by_hand():
    # Eight times 0.5 W, then W: 7 * 2 / (4 + 1 + 1.5).
    aligned = dict(is_aligned=True, draft_weight_bytes=0.5)
    assert bound(**aligned) == pytest.approx(14 / 6.5)
    assert bound(is_aligned=True) == bound()
    # 64 slots of a balance of 100: drafts take 0.64 of W, verifications 64 * 9 / 100.
    found = bound(**aligned, num_slots=64, balance_tokens=100.0)
    assert found == pytest.approx(14 / (8 * 0.64 + 5.76 + 1.5))


def test_speed_of_light_of_plain_decoding_is_one():
    plain = dict(num_draft_tokens=0, mean_accepted_draft_tokens=0, budget_ratio=0.3)
    for overhead in (None, 0.0):
        found = bound(**plain, weight_bytes=5.0, kv_bytes=7.0, overhead_ratio=overhead)
        assert found == pytest.approx(1.0)


def test_speculation_cannot_pay_when_weights_are_everything():
    found = bound(mean_accepted_draft_tokens=8, kv_bytes=0.0)
    assert found == pytest.approx(1.0)


def test_speed_of_light_of_a_run_uses_its_own_reads():
    # Prompt 10, 13 tokens out: plain reads 11 + ... + 22 = 198 over 12 steps, so 16.5.
    m = request([4, 0, 2, 2])
    assert m.plain_kv_tokens == 198
    m.kv_tokens_read = KvTokens(draft=32, verify=80, gather=4)
    stats = DecodeStats(
        requests=(m,),
        num_slots=2,
        num_steps=20,
        wall_time_s=1.0,
        kv_bytes_per_token=10,
        weight_bytes=330,
    )
    # W = KV = 2 slots * 16.5 * 10 B; k s = 32 / 80, m = 8 / 80; a = 2, k = 4.
    assert stats.speed_of_light == pytest.approx(3 * 660 / ((5 + 1.5) * 330))


def test_token_forwards():
    forwards = cost_model.token_forwards_per_token(
        num_draft_tokens=8, mean_accepted_draft_tokens=6.16
    )
    assert forwards == pytest.approx(17 / 7.16)


def test_json_round_trip_is_strict():
    m = request([4, 0, 2])
    m.kv_tokens_read = KvTokens(draft=1, verify=2, prefill=3, gather=4)
    text = json.dumps(m.to_dict(), allow_nan=False)
    assert RequestMetrics.from_dict(json.loads(text)) == m
    empty = json.dumps(RequestMetrics().to_dict(), allow_nan=False)
    assert RequestMetrics.from_dict(json.loads(empty)) == RequestMetrics()
