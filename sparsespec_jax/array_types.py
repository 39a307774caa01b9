"""The glossary: axis letters, terms and array types used across the package.

Axes (one letter, one meaning), beside those of `pallas_kernels/array_types.py`, which
are T, N, H, G, D, KV, P, ps, W, X, M and L::

    S  slots: requests that can be decoded at the same time
    K  drafts per cycle (`num_draft_tokens`); Q = K + 1 rows of a verification
    E  verify lanes of one step, ceil(S / (K + 1))
    A  draft lanes of one step, at least S - floor(S / (K + 1)); 0 if nothing drafts
    Qd rows of a draft lane: 1, or with a cascade 1 + m, m guesses
    F  prefill lanes of one step;  C  tokens of one prefill chunk
    T  tokens of one step are A * Qd + E * Q (+ F * C)
    B  selected tokens of a draft cache (budget)
    V  vocabulary;  R  rows of logits of one step: A * Qd + E * Q

A word names the other axes (`most_queries`: Q of the largest K that an engine may
take). Functions of one kind of lane write `lanes` where each kind can call them.

Terms::

    committed length  tokens of a request whose KV is final (written by full attention)
    pending token     the newest emitted token; it has no KV yet
    cycle             K draft steps and one verify step; commits a + 1 tokens
    cascade           draft steps that check guesses: fewer of them make the K drafts
    guess             a looked-up token that a draft step feeds behind its newest one
    accepted drafts   a, the longest prefix of the drafts that the target confirms
    acceptance length a + 1, bonus token included
    full table        page table of all tokens of a slot, read by verification
    draft table       page table of the compact copy that drafting reads
    selection         the positions copied into the draft cache (PillarAttn: top mass)
    index             codes of all keys in few bits, by which some policies select
    mass              softmax probability of a key, averaged over query rows and group
    seed verify       the first verification of a request: it feeds the last prompt
                      tokens, so it gives the first token and the first selection
    lag               steps between dispatching a step and reading its outcome
    phase             which step of every cycle, 0..K, verifies a request
    preempted         keeps its slot, but some of its pages were spilled to host memory
                      or dropped; they are restored or recomputed before it goes on
    chunk             pages copied together to host memory or back
    degree            devices that share a model (`tensor_parallel`); letters are then
                      those of one device, but for tokens, which all have
    shard             what one of these devices has of an array
"""

from pallas_kernels.array_types import (
    AbstractDtype,
    Array,
    Float32,
    Int32,
    KeyCodes,
    KvFloat,
    KvPages,
    KvPagesOfD,
    NewRows,
    PageTable,
    PerLane,
    Queries,
    RowsOfHeads,
    Stream,
    StreamParts,
)

__all__ = [
    "Array",
    "KeyCodes",
    "KvPages",
    "KvPagesOfD",
    "NewRows",
    "PageTable",
    "PerLane",
    "Queries",
    "RowsOfHeads",
    "Stream",
    "StreamParts",
]


class Bool(AbstractDtype):
    """Flags."""

    dtypes = ("bool",)


class UInt32(AbstractDtype):
    """Seeds of noise."""

    dtypes = ("uint32",)


# The token axis of a step or of a text, and what the model makes of it.
PerToken = Int32[Array, "T"]
RopeTable = Float32[Array, "T pairs"]  # pairs = D / 2
Frequencies = Float32[Array, "pairs"]
Features = KvFloat[Array, "T features"]  # n * M, streams of n layers
Floats = KvFloat[Array, "..."]  # [T, *features], or parts of a product
TokenInputs = KvFloat[Array, "T size_in"]
StreamRows = KvFloat[Array, "R M"]
# Of one group of a step's tokens: as many rows as the group has, T in all.
GroupStream = KvFloat[Array, "_ M"]
GroupAddend = KvFloat[Array, "... M"]  # or parts of it
GroupAngles = Float32[Array, "_ pairs"]

# Rows of logits, the laws of their requests, and what these pick.
Logits = Float32[Array, "R V"]
TokenFlags = Bool[Array, "R V"]
RowParams = Int32[Array, "R params"]
RowInts = Int32[Array, "R"]
RowFloats = Float32[Array, "R"]
RowFlags = Bool[Array, "R"]
RowSeeds = UInt32[Array, "R 2"]
TopIds = Int32[Array, "R top"]
TopLogprobs = Float32[Array, "R top"]
# Of known tokens: those behind the rows of verifications, then of prompt chunks.
ToldLogprobs = Float32[Array, "told"]
ToldTopIds = Int32[Array, "told top"]
ToldTopLogprobs = Float32[Array, "told top"]
NoiseIds = Int32[Array, "ids"] | Int32[Array, "R ids"]
Noise = Float32[Array, "R ids"]

# The law of drafts: their likeliest tokens.
KeptIds = Int32[Array, "*drafts kept"]
KeptProbs = Float32[Array, "*drafts kept"]

# Slots, and what the host sends.
PerSlot = Int32[Array, "S"]
SlotFlags = Bool[Array, "S"]
SlotParams = Int32[Array, "S params"]
SlotTokens = Int32[Array, "S most_queries"]
SlotTexts = Int32[Array, "S text"]
SlotCounters = Int32[Array, "S 3"]
SlotMemory = Float32[Array, "S ..."]
SameCounts = Int32[Array, "S 1"]
HeadCounts = Int32[Array, "S H"]
SlotCounts = Int32[Array, "S #H"]
FullTable = Int32[Array, "S W"]
DraftTable = Int32[Array, "S Wd"]
# What requests change of their logits, of all slots.
SlotPenalties = Float32[Array, "S 3"]
SlotLengths = Int32[Array, "S 2"]
SlotBiases = Float32[Array, "S V"]
SlotTokenFlags = Bool[Array, "S V"]
SlotTokenCounts = Int32[Array, "S V"]
SlotWordStarts = Int32[Array, "S phrases before"]
SlotWordEnds = Int32[Array, "S phrases"]
SlotRecent = Int32[Array, "S before"]
LaneTokens = Int32[Array, "lanes after"]
RowCounts = Int32[Array, "lanes rows"]
PlanBuffer = Int32[Array, "words"]
TableUpdates = Int32[Array, "updates 4"]

# Verify lanes.
PerVerify = Int32[Array, "E"]
VerifyFlags = Bool[Array, "E"]
VerifySeeds = UInt32[Array, "E 2"]
VerifyTokens = Int32[Array, "E Q"]
VerifyDrafts = Int32[Array, "E Q-1"]  # beside rows, which have Q
VerifyScores = Float32[Array, "E Q V"]
VerifyMass = Float32[Array, "E H X"]
MassOfLayers = Float32[Array, "layers E H X"]
VerifyCounters = Int32[Array, "E 4"]
Outcome = Int32[Array, "E columns"]

# Draft lanes.
PerDraft = Int32[Array, "A"]
DraftFlags = Bool[Array, "A"]
DraftSeeds = UInt32[Array, "A 2"]
DraftTokens = Int32[Array, "A Qd"]
Guesses = Int32[Array, "A m"]
DraftsOfGuesses = Int32[Array, "A m+1"]  # Qd, beside guesses
DraftScores = Float32[Array, "A*(m+1) V"]  # of all rows, beside guesses

# Prefill lanes.
PerChunk = Int32[Array, "F"]
ChunkTokens = Int32[Array, "F C"]

# Lanes of any kind, and rows of K and V.
LaneFlags = Bool[Array, "lanes rows"]
RowPlace = Int32[Array, "rows heads"]  # heads = H, or 1 for all
RowsOfTables = KvFloat[Array, "lanes H W*ps KV"]

# What a policy sees and gives: candidates and the selected ones.
ViewQueries = KvFloat[Array, "E Q N D"]
KeyScores = Float32[Array, "E #H X"]
KeyFlags = Bool[Array, "E #H X"]
CandidateFlags = Bool[Array, "E 1 X"]
KeyRows = Float32[Array, "E H X D"]
ChannelRanges = Float32[Array, "E H D"]
PolicyMemory = Float32[Array, "E ..."]
Selected = Int32[Array, "E #H cap"]
SelectedCounts = Int32[Array, "E #H"]

# What a proposer sees and gives.
Texts = Int32[Array, "lanes text"]
Proposed = Int32[Array, "lanes drafts"]
ViewTexts = Int32[Array, "E text"]
ViewFeatures = KvFloat[Array, "E Q features"]

# Attention of a drafting head over texts.
TextQueries = KvFloat[Array, "texts rows N D"]
TextKeys = KvFloat[Array, "texts keys H D"]
TextVisible = Bool[Array, "texts rows keys"]
