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
    mass              softmax probability of a key, averaged over query rows and group
    seed verify       the first verification of a request: it feeds the last prompt
                      tokens, so it gives the first token and the first selection
    lag               steps between dispatching a step and reading its outcome
    phase             which step of every cycle, 0..K, verifies a request
    preempted         keeps its slot, but some of its pages were spilled to host memory
                      or dropped; they are restored or recomputed before it goes on
    chunk             pages copied together to host memory or back
"""

from pallas_kernels.array_types import KvPages, Mass, PageTable, Queries

__all__ = ["KvPages", "Mass", "PageTable", "Queries"]
