"""How the Hopper launch is cut: what a CTA has, and what is chosen for a shape."""

import dataclasses

BLOCK = 64, 128  # outputs and inputs that a warpgroup multiplies at once
BLOCK_SHAPE = 32, 256  # of a block in memory: a copy takes 256 of an axis at most
ROW_UNIT = 8  # rows of a tile of shared memory
MOST_ROWS = 256  # columns of a product of the matrix unit
_SHARED_BYTES = 222 << 10  # of a multiprocessor that CTAs may take
_MOST_STAGES, _LEAST_STAGES = 8, 2
_MULTIPROCESSORS = 132  # of an H100 and an H200
_REGISTERS, _REGISTER_UNIT = 512, 8  # of a multiprocessor by threads of a warpgroup
COPY_REGISTERS = 40  # of a thread that copies
_OTHERS, _OTHERS_AHEAD = 68, 92  # of one that multiplies, beside those of the sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How one launch is cut.

    Raises:
      ValueError: a size that the kernel does not have.
    """

    groups: int = 1  # warpgroups of a CTA that multiply, 64 outputs each
    parts: int = 1  # cuts of the inputs
    ctas: int = 1  # of a multiprocessor, which share its memory
    turn: int = 1  # steps whose weights are widened while others are multiplied

    def __post_init__(self):
        for name, most in (("groups", 4), ("parts", 64), ("ctas", 4), ("turn", 8)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{self}: {name} lies in 1..{most}")

    @property
    def registers(self) -> int | None:
        """Registers of a thread that multiplies, if it takes those of copying ones.

        Two sets of widened weights want more than an equal share.
        """
        if self.turn == 1 or self.groups == 1 or self.ctas > 1:
            return None
        each = _REGISTERS // (self.groups + 1) // _REGISTER_UNIT * _REGISTER_UNIT
        left = each * (self.groups + 1) - COPY_REGISTERS
        return left // self.groups // _REGISTER_UNIT * _REGISTER_UNIT

    def stages(self, num_rows: int) -> int:
        """Returns how many steps of weights and rows are in flight."""
        outputs, inputs = BLOCK
        step = inputs * (self.groups * outputs + 2 * num_rows)
        return min(_MOST_STAGES, _SHARED_BYTES // self.ctas // step)

    def resident(self, num_rows: int) -> int:
        """Returns how many CTAs the registers of a multiprocessor have room for.

        By what ptxas takes: half a register for each row, and about as many others
        for all rows. 0: it would have to make do with fewer.
        """
        each = (_OTHERS_AHEAD if self.turn > 1 else _OTHERS) + padded_rows(
            num_rows
        ) // 2
        each = -(-each // _REGISTER_UNIT) * _REGISTER_UNIT
        return _REGISTERS // (each * (self.groups + 1))

    def tiles(self, size_out: int) -> int:
        """Returns the number of CTAs along the outputs."""
        return -(-size_out // (self.groups * BLOCK[0]))

    def fill(self, size_out: int) -> float:
        """Returns how evenly multiprocessors share CTAs: 1 if all have as many."""
        ctas = self.tiles(size_out) * self.parts
        return ctas / (-(-ctas // _MULTIPROCESSORS) * _MULTIPROCESSORS)

    def why_not(self, num_rows: int, size_in: int, size_out: int) -> str | None:
        """Returns what keeps the kernel from being cut like this, or None."""
        if num_rows > MOST_ROWS:
            return f"x has {num_rows} rows, {MOST_ROWS} at most"
        for name, size in (("inputs", size_in), ("outputs", size_out)):
            if size % BLOCK[0]:
                return f"the weight has {size} {name}, which {BLOCK[0]} must divide"
        if self.parts > 1 and size_in % (self.parts * BLOCK[1]):
            return (
                f"{size_in} inputs are cut into {self.parts} parts, which must be "
                f"multiples of {BLOCK[1]}"
            )
        if self.stages(padded_rows(num_rows)) < _LEAST_STAGES:
            return f"{self} has no shared memory for {num_rows} rows"
        return None


def padded_rows(num_rows: int) -> int:
    """Returns the rows that the kernel computes."""
    return -(-num_rows // ROW_UNIT) * ROW_UNIT


def num_blocks(size_in: int, size_out: int) -> tuple[int, int]:
    """Returns the blocks of a weight along outputs and inputs."""
    return -(-size_out // BLOCK[0]), -(-size_in // BLOCK[1])


# The fastest of those tried on an H200: (in, out) -> (most rows, tiling) ..., of
# experiments/results/int8_matmul_h200.json.
_MEASURED = {
    (4096, 6144): (
        (24, Tiling(groups=1, parts=2, ctas=2, turn=4)),
        (64, Tiling(groups=3, parts=4, turn=4)),
        (128, Tiling(groups=3, parts=4)),
    ),
    (4096, 4096): (
        (24, Tiling(groups=1, parts=2)),
        (64, Tiling(groups=1, parts=4, ctas=2, turn=2)),
        (128, Tiling(groups=2, parts=4, turn=2)),
    ),
    (4096, 24576): (
        (24, Tiling(groups=3, turn=4)),
        (128, Tiling(groups=3)),
    ),
    (12288, 4096): (
        (24, Tiling(groups=1, parts=4, ctas=2, turn=4)),
        (64, Tiling(groups=1, parts=4, ctas=2)),
        (128, Tiling(groups=2, parts=4, turn=2)),
    ),
    (4096, 151936): (
        (24, Tiling(groups=1, ctas=3)),
        (64, Tiling(groups=4)),
        (128, Tiling(groups=2)),
    ),
}

# (groups, ctas) for other shapes, the best first. Few rows want several small CTAs of a
# multiprocessor; with many, outputs of a CTA should share the rows that it reads.
_FEW_ROWS = 32
_FOR_FEW = ((1, 3), (1, 2), (2, 2), (2, 1), (3, 1), (4, 1), (1, 1))
_FOR_MANY = ((3, 1), (2, 1), (1, 2), (4, 1), (1, 1))
PARTS = (1, 2, 3, 4, 5, 6, 7, 8)
_LEAST_STEPS = 4  # of a part, if there are several
_PART_COST, _PLACE_COST = 0.02, 0.03  # what they take off the share that is filled
_FEW_STAGES, _STAGE_COST = 2, 0.1


def choose_tiling(
    num_rows: int, size_in: int, size_out: int, parts: int | None = None
) -> Tiling:
    """Returns the tiling that is expected to be fastest, of `parts` parts if given.

    Raises:
      NotImplementedError: no tiling serves the shape; says why.
    """
    for most, tiling in _MEASURED.get((size_in, size_out), ()):
        if num_rows <= most and parts in (None, tiling.parts):
            return tiling
    order = _FOR_FEW if num_rows <= _FEW_ROWS else _FOR_MANY
    counts = [n for n in PARTS if is_worth_cutting(n, num_rows, size_in)]
    best, score, reason = None, 0.0, None
    for count in counts if parts is None else (parts,):
        for place, (groups, ctas) in enumerate(order):
            tiling = Tiling(groups=groups, parts=count, ctas=ctas)
            why = tiling.why_not(num_rows, size_in, size_out)
            reason = reason or why
            cost = _PART_COST * (count - 1) + _PLACE_COST * place
            if tiling.stages(padded_rows(num_rows)) <= _FEW_STAGES:
                cost += _STAGE_COST
            worth = tiling.fill(size_out) * (1 - min(cost, 0.9))
            if tiling.resident(num_rows) < ctas:
                continue
            if why is None and worth > score:
                best, score = tiling, worth
    if best is None:
        raise NotImplementedError(
            f"{reason} in the GPU kernel; impl='reference' serves every size"
        )
    return best


def is_worth_cutting(parts: int, num_rows: int, size_in: int) -> bool:
    """Returns whether parts have several steps, and no more bytes than the weight."""
    has_steps = size_in >= parts * _LEAST_STEPS * BLOCK[1]
    return parts == 1 or (has_steps and 4 * parts * num_rows <= size_in)


def choose_parts(num_rows: int, size_in: int, size_out: int) -> int:
    """Returns the `parts` that are fast on a GPU for x [T, in] and a weight [out, in].

    Raises:
      NotImplementedError: the GPU kernel cannot serve the shape; says why.
    """
    return choose_tiling(num_rows, size_in, size_out).parts
