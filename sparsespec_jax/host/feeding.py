"""Which known tokens of a request are fed how: by prompt chunks or by seed verifies.

Fast: chunks feed all tokens but the last ones, which fit into one seed verify.
Exact: the KV row of a token comes from the same kernel whenever it is computed, and
for every k: chunks feed the prompt but its last token, seed verifies feed the rest. A
request that comes back with emitted tokens feeds them by several, its replays. No jax.
"""


def reads_of_chunk(start, count):
    """KV tokens that `count` rows from position `start` on read, their own included."""
    return count * start + count * (count + 1) // 2


class Feeding:
    """The rule of one scheduler; `exact` chooses which."""

    def __init__(self, *, exact):
        self.exact = exact

    def prefill_target(self, request, shape):
        """Tokens that prompt chunks feed."""
        if self.exact:
            return request.num_prompt - 1
        return max(0, len(request.tokens) - shape.num_queries)

    def next_chunk(self, request, shape):
        """(first token, number of tokens) of the next prompt chunk."""
        left = self.prefill_target(request, shape) - request.prefilled
        return request.prefilled, min(shape.prefill_chunk, left)

    def seed_start(self, request, shape):
        """The first token of the next seed verify."""
        return request.prefilled if self.exact else self.prefill_target(request, shape)

    def next_seed(self, request, shape):
        """(first token, tokens, whether none is left) of the next seed verify."""
        start = self.seed_start(request, shape)
        tail = request.tokens[start : start + shape.num_queries]
        return start, tail, start + len(tail) == len(request.tokens)

    def num_shared_pages(self, request, shape):
        """Pages of the prompt that no sample of it writes again once they are full."""
        seeded = 1 if self.exact else shape.num_queries
        return max(0, request.num_prompt - seeded) // shape.page_size
