"""What the paper claims (arXiv 2512.01278), and what a results file says of it.

A judge takes the content of one run, its "flags", "rows" and figures by name. It
returns (verdict, what was measured in words). Differences within two standard errors
are "undecided".
"""

from __future__ import annotations

import math

MET, MISSED = "met", "missed"
UNDECIDED, NOT_MEASURED = "undecided", "not measured"

ACCEPTED = 6.16  # of 8 drafts at s = 0.05
SPEEDUP = 2.13
EAGLE = 2.0


def figure(value):
    """A number, or a mean with its standard error, in three digits."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{value['mean']:.3g} +- {value['standard_error']:.2g}"
    return f"{value:.3g}"


def _is_larger(a, b):
    """True or False for means that differ by two standard errors, else None."""
    error = math.hypot(a["standard_error"], b["standard_error"])
    difference = a["mean"] - b["mean"]
    return None if abs(difference) <= 2 * error else difference > 0


def _of_pillar(data, name="mean_accepted_draft_tokens"):
    """Decoded rows in which the model drafts for itself with PillarAttn."""
    own = ("pillar", "self")
    return [
        row
        for row in data["rows"]
        if (row["policy"], row.get("proposer", "self")) == own and name in row
    ]


def accepted(data):
    """6.16 of 8 at s = 0.05."""
    rows = [r for r in _of_pillar(data) if r["budget_ratio"] == 0.05]
    if not rows:
        return NOT_MEASURED, "no row of PillarAttn at s = 0.05"
    (row, *_) = rows
    found = row["mean_accepted_draft_tokens"]
    bar = {"mean": ACCEPTED, "standard_error": 0}
    verdict = {True: MET, None: UNDECIDED, False: MISSED}[_is_larger(found, bar)]
    num_drafts = row.get("num_draft_tokens") or data["flags"]["num_draft_tokens"]
    return verdict, f"{figure(found)} of {num_drafts} ({data['flags']['model']})"


def _saturates(data, name, at):
    """No more accepted at the largest value of an option than at `at`."""
    rows = _of_pillar(data)
    found = {row[name]: row["mean_accepted_draft_tokens"] for row in rows}
    if at not in found:
        return NOT_MEASURED, f"no row of PillarAttn at {name} = {at}"
    more = _is_larger(found[max(found)], found[at])
    verdict = {True: MISSED, None: UNDECIDED, False: MET}[more]
    return verdict, ", ".join(f"{figure(found[x])} at {x:g}" for x in sorted(found))


def saturates_in_budget(data):
    """No more accepted beyond s = 0.05."""
    return _saturates(data, "budget_ratio", 0.05)


def saturates_in_k(data):
    """No more accepted beyond k = 8; whether 8 is fastest is not asked."""
    return _saturates(data, "num_draft_tokens", 8)


def better_than_fixed(data):
    """PillarAttn above Quest and a window, at every temperature of a study."""
    by = {(row["policy"], row["temperature"]): row for row in data["rows"]}
    answers, texts = [], []
    for temperature in sorted({t for _, t in by}):
        means = {
            name: by[name, temperature]["expected_accepted"]
            for name in ("pillar", "window", "quest")
        }
        answers += [
            _is_larger(means["pillar"], means[name]) for name in ("window", "quest")
        ]
        values = ", ".join(f"{name} {figure(v)}" for name, v in means.items())
        texts.append(f"T = {temperature:g}: {values}")
    verdict = MISSED if False in answers else UNDECIDED if None in answers else MET
    return verdict, "expected of 8: " + "; ".join(texts)


def lossless(data):
    """Every token that of plain decoding; of `lossless` or of the demo."""
    if "comparison" in data:
        same = data["comparison"]
        total, equal = same["num_tokens"], same["num_identical"]
        length = data["speculative"]["total"]["mean_acceptance_length"]
        more = f"; acceptance length {length:.2f}"
    else:
        total = sum(row["num_tokens"] for row in data["rows"])
        equal = total - sum(row["num_differing_tokens"] for row in data["rows"])
        more = f"; {len(data['rows'])} pairs of lag and page size"
    return (
        MET if equal == total else MISSED,
        f"{equal} of {total} tokens identical{more}",
    )


def throughput(data):
    """Up to 2.13 times plain decoding, in a whole run."""
    whole = data["spec_tokens_per_s"] / data["ar_tokens_per_s"]
    spec = next(row for row in data["rows"] if row["mode"] == "speculative")
    clock = spec.get("device_clock")  # with --clock
    text = (
        f"{data['speedup']:.2f} times while all slots are busy, byte bound "
        f"{data['speed_of_light']:.2f}; {whole:.2f} times in all"
    )
    if data["forced_acceptance"] is not None:
        text += "; acceptance forced, random weights"
    if data.get("flags", {}).get("trace_steps", 0) > 100:
        text += f"; profiler on for {data['flags']['trace_steps']} steps"
    if clock:
        share, window = clock["idle_between_steps_share"], clock["window_s"]
        text += f"; device idle between steps for {100 * share:.2g} % of {window:.1f} s"
    return MET if data["speedup"] >= SPEEDUP else MISSED, text


def speedup_map(data):
    """The chosen k is nowhere slower than plain decoding."""
    gains = [row["chosen_speedup"] for row in data["rows"]]
    worst = min(row["chosen_of_best"] for row in data["rows"])
    assumed = data.get("flags", {}).get("acceptance")
    return (
        MET if min(gains) >= 1 else MISSED,
        f"the chosen k makes {min(gains):.2f} to {max(gains):.2f} times plain decoding "
        f"at {len(gains)} points, at least {worst:.2f} of the best fixed k; random "
        f"weights, acceptance of {assumed} a draft assumed",
    )


def attention(data):
    """17.1 ms become 5.2: only loads of our own have been timed."""
    splits = [row["time_split"] for row in data["rows"] if "time_split" in row]
    if len(splits) != 2:
        return NOT_MEASURED, "no traces of a plain and of a speculative step"
    plain, sparse = (split["ms_per_step"] for split in splits)
    context = data["flags"]["contexts"][-1]
    return (
        NOT_MEASURED,
        f"at another load, {data['load']['num_slots']} slots of {context} tokens: "
        f"{plain['attention']:.1f} -> {sparse['attention']:.1f} ms a step; random "
        "weights",
    )


def simulator(data):
    """A full pool without recomputation: 95 % or more, no token twice."""
    rows = {row["policy"]: row for row in data["rows"]}
    used = ", ".join(f"{name} {r['utilisation']:.3f}" for name, r in rows.items())
    own = rows["offload"]
    full = own["utilisation"] >= 0.95 and own["recompute_ratio"] == 0
    return MET if full else MISSED, f"simulated, share of the pool in use: {used}"


def eagle(data):
    """A trained head has fewer than 2 drafts accepted."""
    found = {row["proposer"]: row["accepted_drafts"] for row in data["rows"]}
    bar = {"mean": EAGLE, "standard_error": 0}
    verdict = {True: MISSED, None: UNDECIDED, False: MET}[
        _is_larger(found["eagle"], bar)
    ]
    counts = ", ".join(f"{name} {figure(value)}" for name, value in found.items())
    return verdict, f"{counts} (head of {data['num_texts']} texts)"


def offload(data):
    """Copies to host memory cost 5 % at most."""
    ratios = [
        f"{data[key]:.2f} times {name}"
        for key, name in {
            "offload_over_offload_without_copies": "the same schedule without copies",
            "offload_over_recompute": "recomputing",
            "offload_over_reserve": "reserving",
        }.items()
        if key in data
    ]
    text = "spilling to host memory runs at " + ", ".join(ratios)
    hidden = data.get("copies", {}).get("recorded_copies", {}).get("hidden_share")
    text += f"; {hidden:.2f} of the copies beside kernels" if hidden else ""
    cost = data.get("offload_over_offload_without_copies")
    return NOT_MEASURED if cost is None else MET if cost >= 0.95 else MISSED, text


def unified_schedule(data):
    """Mixed steps over aligned ones, in full precision."""
    return _worth(data, "aligned schedule", 1.23)


def delayed_verification(data):
    """A lag of one step over none."""
    return _worth(data, "lag 0", 1.12)


def _worth(data, change, bar):
    gains = {row["load"]: row["whole_run_over"][change] for row in data["by_load"]}
    text = ", ".join(f"{name} {gain:.2f}" for name, gain in gains.items())
    verdict = MET if min(gains.values()) >= bar else MISSED
    return verdict, f"{text}; random weights, forced acceptance"


def kv_manager(data):
    """Spilling over reserving the longest output."""
    gain = data.get("offload_over_reserve")
    if gain is None:
        return NOT_MEASURED, "no run that reserves"
    over = data.get("offload_over_recompute")
    text = f"{gain:.2f} times reserving"
    text += f", {over:.2f} times recomputing" if over else ""
    return MET if gain >= 1.61 else MISSED, f"{text}; random weights"


def kernels(data):
    """Shares of the read rate; no bar of the paper's."""
    found = [
        f"{row['case']} {row['fraction_of_read']:.2f}"
        for row in data["rows"]
        if "fraction_of_read" in row
    ]
    return "", "of the read rate: " + ", ".join(found)


def host(data):
    """Microseconds a step; no bar of the paper's."""

    def loop(by_lag):
        times = ", ".join(f"{ms:.2f}" for ms in by_lag or ())
        return f", from step to step {times} ms at lag 0, 1, 2" if times else ""

    return "", "; ".join(
        f"{row['num_requests']} requests: plan {row['plan_us']:.0f} us, commit "
        f"{row['commit_us']:.0f} us" + loop(row.get("loop_ms_by_lag"))
        for row in data["rows"]
    )


# (claim, {whose figure: judge}), in the order of the page: an experiment, "study:NAME",
# or the benchmark of kernels. Without a judge nothing here measures the claim.
CLAIMS = (
    (
        "the output equals plain decoding's, token by token",
        {"generate": lossless, "lossless": lossless},
    ),
    (
        "6.16 of 8 drafts accepted at s = 0.05 (section 5)",
        {"acceptance": accepted, "study:policies": accepted},
    ),
    (
        "PillarAttn has more drafts accepted than Quest and a window (section 5)",
        {"study:policies_replay": better_than_fixed},
    ),
    (
        "acceptance saturates at s = 0.05 (ablation)",
        {"acceptance": saturates_in_budget, "study:sweep_budget": saturates_in_budget},
    ),
    ("acceptance saturates at k = 8 (ablation)", {"study:sweep_k": saturates_in_k}),
    ("up to 2.13 times plain decoding (section 6)", {"throughput": throughput}),
    (
        "own: speculation is not slower than plain decoding",
        {"speedup_map": speedup_map},
    ),
    ("attention of a step takes 5.2 ms instead of 17.1", {"step_time": attention}),
    (
        "the unified schedule makes 1.23 times the tokens",
        {"ablations": unified_schedule},
    ),
    (
        "delayed verification makes 1.12 times the tokens",
        {"ablations": delayed_verification},
    ),
    ("the KV manager makes 1.61 times the tokens", {"offload": kv_manager}),
    (
        "the pool is full without recomputation (section 4.4)",
        {"simulate": simulator},
    ),
    ("KV offloading costs next to nothing (section 4.4)", {"offload": offload}),
    (
        "an EAGLE-3 head has fewer than 2 drafts accepted (section 5)",
        {"train_eagle": eagle},
    ),
    ("own: kernels run near the memory's rate", {"bench": kernels}),
    ("own: the host keeps ahead of the device", {"host_cost": host}),
)
