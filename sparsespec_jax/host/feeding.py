"""Which known tokens of a request are fed how: by prompt chunks or by seed verifies.

Fast: chunks feed all tokens but the last ones, which fit into one seed verify.
Exact: the KV row of a token comes from the same kernel whenever it is computed, and
for every k: chunks feed the prompt but its last token, seed verifies feed the rest. A
request that comes back with emitted tokens feeds them by several, its replays. So does
one that is scored, whatever the rule, and feeds the last token of each again in the
next one: a verification scores all tokens that it feeds but its first. No jax.
"""


def reads_of_chunk(start, count):
    """KV tokens that `count` rows from position `start` on read, their own included."""
    return count * start + count * (count + 1) // 2


class Feeding:
    """The rule of one scheduler; `exact` chooses which."""

    def __init__(self, *, exact):
        self.exact = exact

    def _by_verifies(self, request):
        """True if chunks feed the prompt alone, but for its last token."""
        return self.exact or request.is_scored

    def prefill_target(self, request, shape):
        """Tokens that prompt chunks feed."""
        if self._by_verifies(request):
            return request.num_prompt - 1
        return max(0, len(request.tokens) - shape.num_queries)

    def next_chunk(self, request, shape):
        """(first token, number of tokens) of the next prompt chunk."""
        left = self.prefill_target(request, shape) - request.prefilled
        # A chunk that tells of its tokens has room for the one behind its last.
        room = shape.prefill_chunk - (request.prompt_logprobs is not None)
        return request.prefilled, min(room, left)

    def seed_start(self, request, shape):
        """The first token of the next seed verify."""
        if self._by_verifies(request):
            return request.prefilled
        return self.prefill_target(request, shape)

    def next_seed(self, request, shape):
        """(first token, tokens, whether none is left) of the next seed verify."""
        start = self.seed_start(request, shape)
        tail = request.tokens[start : start + shape.num_queries]
        return start, tail, start + len(tail) == len(request.tokens)

    def fed_by(self, request, start, tail):
        """Tokens that are not fed again behind a seed verify."""
        return start + len(tail) - (request.is_scored and not request.is_seeded)

    def num_shared_pages(self, request, shape):
        """Pages of the prompt that no sample of it writes again once they are full."""
        seeded = 1 if self._by_verifies(request) else shape.num_queries
        return max(0, request.num_prompt - seeded) // shape.page_size
