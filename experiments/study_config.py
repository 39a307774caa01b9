"""What a study is: rows to measure and the axes of their figure."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import pkgutil
from dataclasses import dataclass

from sparsespec_jax import SpeculationConfig
from sparsespec_jax.policies.select import POLICIES

MODES = ("decode", "replay")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement; ValueError if a field is wrong."""

    mode: str = "decode"
    policy: str = "pillar"  # or replay.HINDSIGHT in replay
    budget_ratio: float = 0.05
    min_budget: int = 0
    num_draft_tokens: int = 8
    temperature: float = 0.65
    mass_rows: str = "all"
    scope: str = "kv_head"
    acceptor: str = "shared_noise"
    num_recent: int = 0
    proposer: str = "self"
    draft_steps: int | None = None  # cascade
    num_guesses: int | None = None  # cascade
    text_temperature: float | None = None  # replay: of the text; None: temperature
    contexts: tuple[int, int] = (0, 1 << 20)  # only those of a length in [low, high)
    # The bytes that a draft step reads of the policy's index come off its budget. It
    # takes a model to say how many that is: see `for_model`.
    less_index: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if self.text_temperature is not None and self.mode != "replay":
            raise ValueError("text_temperature is of mode 'replay': decoding has one")
        if self.less_index and self.index_bits is None:
            raise ValueError(f"less_index: policy {self.policy!r} reads no index")
        self.speculation("pillar")

    @property
    def index_bits(self):
        """Bits per key and KV head that the policy's index has, or None."""
        return POLICIES[self.policy].index_bits if self.policy in POLICIES else None

    def for_model(self, *, head_dim, kv_bits):
        """The row as it is measured, with the budget that `less_index` leaves.

        Args:
          head_dim: of the model.
          kv_bits: of a value in its KV cache.

        Raises:
          ValueError: the index alone takes the whole budget.
        """
        if not self.less_index:
            return self
        share = self.index_bits / (2 * kv_bits * head_dim)
        left = round(self.budget_ratio - share, 4)
        if left <= 0:
            raise ValueError(
                f"the index of policy {self.policy!r} has the bytes of {share:.3f} of "
                f"the KV of heads of {head_dim} x {kv_bits} bits, budget_ratio is "
                f"{self.budget_ratio}: --skip the policy, or take a larger model"
            )
        return dataclasses.replace(self, budget_ratio=left, less_index=False)

    def speculation(self, policy):
        """SpeculationConfig of the row with `policy`."""
        names = {f.name for f in dataclasses.fields(SpeculationConfig)}
        values = {n: v for n, v in dataclasses.asdict(self).items() if n in names}
        return SpeculationConfig(**values | {"policy": policy})


def grid(**values):
    """Rows of every combination; the last field changes fastest."""
    choices = itertools.product(*values.values())
    return tuple(Row(**dict(zip(values, chosen, strict=True))) for chosen in choices)


def as_json(row):
    """The row as it is recorded."""
    return json.loads(json.dumps(dataclasses.asdict(row)))


def as_row(found):
    """The Row of a record, whatever else that holds.

    Fields that came later than the record have their defaults.
    """
    names = [field.name for field in dataclasses.fields(Row)]
    values = {name: found[name] for name in names if name in found}
    if "contexts" in values:
        values["contexts"] = tuple(values["contexts"])
    return Row(**values)


def split(check, rows):
    """([check(row) of those that can be measured], [(row, why not)])."""
    possible, impossible = [], []
    for row in rows:
        try:
            possible.append(check(row))
        except ValueError as error:
            impossible.append((row, str(error)))
    return possible, impossible


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a module of experiments/studies returns from get_study()."""

    claim: str  # of the paper, and where it stands
    x: str  # field of Row on the horizontal axis of the figure
    series: str  # field of Row that tells the lines apart
    y: str = "mean_accepted_draft_tokens"
    rows: tuple[Row, ...]


def study_names():
    """Names of the modules in experiments/studies."""
    from experiments import studies

    return sorted(module.name for module in pkgutil.iter_modules(studies.__path__))


def load_study(name):
    """(Study, header text) of a module; ValueError if there is none of that name."""
    if name not in study_names():
        raise ValueError(f"study must be one of {study_names()}, got {name!r}")
    module = importlib.import_module(f"experiments.studies.{name}")
    return module.get_study(), module.__doc__


def smoke_rows(rows):
    """At most one row per mode and policy, at most four, with cycles of two drafts."""
    kept = {}
    for row in rows:
        kept.setdefault((row.mode, row.policy, row.proposer), row)
    small = dict(num_draft_tokens=2, contexts=(0, 1 << 20))
    return [
        dataclasses.replace(row, **small, budget_ratio=max(0.2, row.budget_ratio))
        for row in list(kept.values())[:4]
    ]
