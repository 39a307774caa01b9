"""Text that comes with its tokens is the text of all of them, for every tokenizer."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from sparsespec_jax.host.text import OutputText
from sparsespec_jax.loading.decoder_rules import decoder_rule
from sparsespec_jax.loading.tokenizer import Tokenizer
from tests.text_tokenizers import (
    Backwards,
    byte_level_tokens,
    llama_decoder,
    make_tokenizer,
    make_tokenizers,
    spelled,
)

MARK = "\ufffd"


def awkward_ids(tokenizer):
    """Ids of tokens that alone are spaces, unfinished characters or nothing."""
    ids = range(tokenizer.vocab_size)
    return [i for i in ids if not tokenizer.decode([i]).strip(" " + MARK)]


CASES = [(tokenizer, awkward_ids(tokenizer)) for tokenizer in make_tokenizers()]


def expected(tokenizer, ids, stops):
    """(tokens read, stop string or None, text): decode all tokens after each token."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        places = [(text.rstrip(MARK).find(stop), stop) for stop in stops]
        if found := min((p for p in places if p[0] >= 0), default=None):
            return count, found[1], text[: found[0]]
    return len(ids), None, tokenizer.decode(ids)


def read(tokenizer, ids, stops, sizes):
    """(OutputText, the text taken by number of tokens read) for groups of tokens."""
    text, taken, count = OutputText(tokenizer, stops), {0: ""}, 0
    for size in sizes:
        if count >= len(ids) or text.push(ids[count : count + size]):
            break
        before, count = taken[count], min(count + size, len(ids))
        taken[count] = before + text.take()
    return text, taken


def check(tokenizer, ids, stops, sizes):
    """Read one by one and in groups, and compare with decoding everything each time."""
    count, stop, whole = expected(tokenizer, ids, stops)
    singly, by_token = read(tokenizer, ids, stops, [1] * len(ids))
    text, taken = read(tokenizer, ids, stops, sizes)
    for output, pieces in (singly, by_token), (text, taken):
        assert (output.num_pushed, output.stop_string) == (count, stop)
        assert output.finish(ids[:count]) == whole
        given_out = pieces[max(pieces)] + output.take()
        assert given_out + output.rest(whole) == whole
    # What is given out depends on the tokens read, not on how they were grouped.
    assert all(by_token[n] == piece for n, piece in taken.items())
    # And it is as much as can be: all but what may begin a stop string.
    if tokenizer.decoder_rule.kind in ("tokens", "bytes"):
        held = max((len(stop) - 1 for stop in stops), default=0)
        for n, piece in by_token.items():
            assert len(piece) >= len(tokenizer.decode(ids[:n]).rstrip(MARK)) - held


def draw_case(data):
    """A tokenizer, ids, group sizes and stop strings out of some bytes.

    A few tokens come again and again, in half of the cases mostly such that have no
    text of their own. Stop strings are pieces of the text, or such and a character.
    """
    which, variety, shift, num_stops, *rest = data
    tokenizer, awkward = CASES[which % len(CASES)]
    everything = range(tokenizer.vocab_size + 2)  # some ids are unknown
    palette = [awkward, everything][which // len(CASES) % 2]
    stride = 1 + 6 * (variety % 2)  # neighbours are of one character
    few = [palette[(shift + stride * i) % len(palette)] for i in range(1 + variety % 7)]
    few.append(shift * variety % len(everything))
    half = len(rest) // 4
    ids = [few[byte % len(few)] for byte in rest[half:]]
    sizes = [1 + byte % 9 for byte in rest[:half]] + [9] * len(ids)
    text, stops = tokenizer.decode(ids), []
    for byte in rest[: num_stops % 4]:
        at = byte % max(1, len(text))
        if piece := text[at : at + 1 + byte % 4]:
            stops.append(piece + "Q" * (byte % 2))
    return tokenizer, ids, sizes, tuple(stops)


@settings(max_examples=18_000, derandomize=True, deadline=None, database=None)
@given(st.binary(min_size=5, max_size=40))
def test_texts_that_come_make_the_text_of_all_tokens(data):
    tokenizer, ids, sizes, stops = draw_case(data)
    check(tokenizer, ids, stops, sizes)


# --- Cases that are known to be hard


def small(*tokens, decoder):
    """A tokenizer of these tokens, and of </s> behind them, which is special."""
    return make_tokenizer([*tokens, "</s>"], decoder, added=["</s>"])


def events(tokenizer, ids, stops=()):
    """Text taken after each token, and what was left at the end."""
    text, pieces = OutputText(tokenizer, stops), []
    count = len(ids)
    for token in ids:
        if text.push([token]):
            count = text.num_pushed
            break
        pieces.append(text.take())
    return pieces, text.rest(text.finish(ids[:count]))


def test_a_stop_string_over_several_tokens_never_shows():
    tokenizer = small("a", "b", "c", "ab", decoder=decoders.Fuse())
    ids = [tokenizer.token_id(token) for token in ["c", "a", "b", "a", "b", "c", "a"]]
    assert events(tokenizer, ids) == (list("cababca"), "")
    # "ab" may go on to "abca" until it does not; what is cut was never given out.
    assert events(tokenizer, ids, ("abca",)) == (["c", "", "", "ab", "", ""], "")
    # Held back to the end, and released there.
    assert events(tokenizer, ids, ("cax",)) == (["", "", "cab", "a", "b", "", ""], "ca")
    # Of two that are complete with one token, the earlier one counts.
    found = OutputText(tokenizer, ("b", "ab"))
    assert found.push([tokenizer.token_id("ab")]) and found.stop_string == "ab"


def test_an_unfinished_character_comes_at_the_end():
    tokenizer = small(*(spelled(bytes([b])) for b in "中a".encode()), decoder=BYTES)
    assert events(tokenizer, [0, 1]) == (["", ""], MARK)
    assert events(tokenizer, [0, 1, 2]) == (["", "", "中"], "")
    assert events(tokenizer, [0, 1, 3]) == (["", "", MARK + "a"], "")
    # It is no text yet: it completes no stop string.
    assert events(tokenizer, [0, 1, 2, 0], (MARK,)) == (["", "", "中", ""], MARK)
    stopped = OutputText(tokenizer, (MARK,))
    assert stopped.push([0, 1, 3]) and stopped.num_pushed == 3


def test_special_tokens_between_words_keep_the_space():
    tokenizer = small("▁hello", "▁world", decoder=llama_decoder())
    ids = [tokenizer.token_id(token) for token in ["▁hello", "</s>", "▁world"]]
    assert tokenizer.decode(ids) == "hello world"
    for stops in (), ("never",), ("worlds",):
        pieces, rest = events(tokenizer, ids, stops)
        assert "".join(pieces) + rest == "hello world"
    assert events(tokenizer, ids) == (["hello", "", " world"], "")


def test_a_wrong_byte_undoes_the_characters_of_its_run():
    tokenizer = small(
        *("<0xE4>", "<0xB8>", "<0xAD>", "<0xFF>", "▁a"), decoder=llama_decoder()
    )
    assert tokenizer.decode([0, 1, 2]) == "中"
    assert tokenizer.decode([0, 1, 2, 3]) == MARK * 4
    assert events(tokenizer, [0, 1, 2]) == (["", "", ""], "中")
    assert events(tokenizer, [0, 1, 2, 4]) == (["", "", "", "中 a"], "")
    assert events(tokenizer, [0, 1, 2, 3, 4]) == ([""] * 4 + [MARK * 4 + " a"], "")
    # A stop string counts as soon as the text holds it.
    assert events(tokenizer, [0, 1, 2, 3, 4], ("中",)) == (["", ""], "")


BYTES = decoders.ByteLevel()
HARD = {
    # The beginning of a text, where spaces go, may take several tokens.
    "spaces first": (
        ["▁", "▁a", "##b", "##"],
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.WordPiece(),
                decoders.Fuse(),
                decoders.Strip(" ", 3, 0),
            ]
        ),
        [[0, 3, 1, 1], [0, 3, 0, 3, 1, 2], [2, 0, 0, 1], [0, 0, 0, 0, 0, 1, 1]],
        ["  ", "a  a"],
    ),
    "a first space": (["▁", "▁a"], llama_decoder(), [[0, 0, 1, 1, 0, 1]], ["  "]),
    "empty pieces": (["##", "a"], decoders.WordPiece(), [[0, 0, 1, 0, 0, 1]], [" a"]),
    "no decoder": (["", "a"], None, [[0, 0, 1, 0, 0, 1, 0]], ["  "]),
    # Replacement marks that were set aside count once there is text behind them.
    "runs and marks": (
        ["<0xFF>", "<0x0A>", "▁", "a"],
        decoders.Sequence(
            [decoders.Replace("▁", ""), decoders.ByteFallback(), decoders.Fuse()]
        ),
        [[0, 0, 2, 1, 3], [0, 2, 0, 2, 1, 1, 0, 3], [3, 2, 0, 1, 2, 1, 3]],
        [MARK * 2, MARK + "\n", "\n"],
    ),
    # Broken bytes without end, and characters that begin among them.
    "broken bytes": (
        [spelled(bytes([b])) for b in b"\xff\xf0\x9f\x98\x80a"],
        BYTES,
        [[0] * 9 + [5], [0, 0, 0, 0, 1, 2, 3, 0, 5], [0] * 6 + [1, 2, 3, 4, 0, 0]],
        [MARK + "a", "😀", MARK],
    ),
    # A token may be nothing at all; it ends no character.
    "empty bytes": (
        ["", *(spelled(bytes([b])) for b in b"\xad\xe2")],
        BYTES,
        [[1, 2, 0, 0, 0, 0, 0, 0, 1, 1], [2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]],
        ["\u2b6d"],
    ),
    "the last token differs": (
        ["a</w>", "b</w>c</w>"],
        decoders.BPEDecoder(),
        [[0, 1, 0, 1, 1]],
        ["b c", "bc"],
    ),
    "repeated tokens": (["a", "<pad>"], decoders.CTC(), [[0, 0, 1, 0, 0]], ["aa"]),
    "the text as one": (
        ["a", " ", "."],
        decoders.Sequence([decoders.Fuse(), decoders.Replace(" .", ".")]),
        [[0, 1, 2, 0, 1, 1, 2]],
        ["a ", "a."],
    ),
}


@pytest.mark.parametrize("tokens, decoder, outputs, stops", HARD.values(), ids=HARD)
def test_hard_cases(tokens, decoder, outputs, stops):
    tokenizer = small(*tokens, decoder=decoder)
    end = tokenizer.token_id("</s>")
    for ids in outputs:
        for given_stops in [(), *((stop,) for stop in stops), tuple(stops)]:
            for size in range(1, len(ids) + 1):
                check(tokenizer, ids, given_stops, [size] * len(ids))
                between = [i for token in ids for i in (token, end, 99)]
                check(tokenizer, between, given_stops, [size] * len(between))


# --- What a decoder lets be cut, and what that costs


def sequence(*steps):
    return decoders.Sequence(list(steps))


REPLACE, FALLBACK = decoders.Replace("▁", " "), decoders.ByteFallback()
PATTERN = decoders.Replace(tokenizers.Regex("▁+"), " ")
FUSE, STRIP = decoders.Fuse(), decoders.Strip(" ", 1, 0)
KINDS = [
    (None, "tokens"),
    (BYTES, "bytes"),
    (sequence(BYTES), "bytes"),
    (decoders.Metaspace(), "tokens"),
    (decoders.WordPiece(), "tokens"),
    (sequence(PATTERN, FUSE, STRIP), "tokens"),
    (llama_decoder(), "runs"),
    (sequence(sequence(REPLACE, FALLBACK), FUSE), "runs"),
    (sequence(REPLACE, FALLBACK, decoders.Metaspace()), "runs"),
    # What comes before could make bytes of tokens, in ways not followed here.
    (sequence(PATTERN, FALLBACK, FUSE), "whole"),
    (sequence(decoders.WordPiece(), FALLBACK), "whole"),
    (sequence(FALLBACK, FALLBACK), "whole"),
    # The end of a text, or all of it, can change what is before.
    (sequence(FUSE, REPLACE), "whole"),
    (sequence(FUSE, decoders.Strip(" ", 0, 1)), "whole"),
    (sequence(BYTES, STRIP), "whole"),
    (decoders.BPEDecoder(), "whole"),
    (decoders.CTC(), "whole"),
    (decoders.Decoder.custom(Backwards()), "whole"),
]


@pytest.mark.parametrize("decoder, kind", KINDS, ids=range(len(KINDS)))
def test_rules_of_decoders(decoder, kind):
    assert decoder_rule(decoder).kind == kind


class Counting(Tokenizer):
    """Counts the tokens that it decodes."""

    num_decoded = 0

    def decode(self, ids, **options):
        ids = list(ids)
        self.num_decoded += len(ids)
        return super().decode(ids, **options)


CHARACTER = [f"<0x{byte:02X}>" for byte in "😀".encode()]
LONG = {
    "bytes": (byte_level_tokens(), BYTES, None),
    "broken bytes": ([spelled(b"\xff"), spelled(b"\xf0")], BYTES, None),
    "llama": (["▁a", "b", ",", *CHARACTER], llama_decoder(), [0, 1, 2, 3, 4, 5, 6, 1]),
    "one run": (CHARACTER, llama_decoder(), [0, 1, 2, 3]),
    "spaces": (["▁"], llama_decoder(), None),
    "marks": ([MARK], llama_decoder(), None),
    "special": (["a"], llama_decoder(), [1]),
    "wordpiece": (["a", "##a", "."], decoders.WordPiece(), None),
    "metaspace": (["a", "▁a", "▁"], decoders.Metaspace(), None),
    "no decoder": (["a", ""], None, None),
}


@pytest.mark.parametrize("tokens, decoder, cycle", LONG.values(), ids=LONG)
@pytest.mark.parametrize("stops", [(), ("never", "\n\nUser:")], ids=["plain", "stops"])
def test_long_outputs_cost_a_few_decoded_tokens_each(tokens, decoder, cycle, stops):
    small_one = small(*tokens, decoder=decoder)
    tokenizer, size = Counting(small_one.backend), 20_000
    cycle = cycle or range(len(tokens))
    ids = [cycle[i * i % 7 % len(cycle)] for i in range(size)]
    if len(cycle) == 4:
        ids = list(cycle) * (size // 4)  # valid characters, in one run
    text, pieces = OutputText(tokenizer, stops), []
    for token in ids:
        assert not text.push([token])
        pieces.append(text.take())
    assert tokenizer.num_decoded <= 60 * size
    whole = text.finish(ids)
    assert "".join(pieces) + text.rest(whole) == whole
