"""Small tokenizers with awkward vocabularies and every decoder there is."""

import random

import tokenizers
from tokenizers import decoders, models

from sparsespec_jax.loading.tokenizer import Tokenizer

# Text in which characters have one to four bytes, and bytes that are no text.
_WORDS = "a b . ' don't n't  xyz hello 中文 é 😀 \ufffd ▁ _ ## 's".split(" ")
_BROKEN = (
    b"\xff",
    b"\xc0",
    b"\xe0\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90",
    b"\x80",
    b"\xbd",
)


def spelled(data):
    """Bytes as byte-level vocabularies write them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable}
    table |= {b: chr(256 + i) for i, b in enumerate(others)}
    return "".join(table[b] for b in data)


def byte_level_tokens(rng=None):
    """Words cut at a random place, every byte of them, and bytes that are no text."""
    rng = rng or random.Random(0)
    tokens = [spelled(data) for data in _BROKEN]
    for word in _WORDS:
        data = word.encode()
        cut = rng.randint(0, len(data))
        tokens += [spelled(data[:cut]), spelled(data[cut:]), spelled(b" " + data)]
        tokens += [spelled(bytes([byte])) for byte in data]
    return [*tokens, "日本", "a b"]  # added tokens are written as they are


def _piece_tokens(rng):
    tokens = ["▁", "▁▁", " ", "", "_", "|", "##", "</w>", "\ufffd", "<0x4>", "<0x+1>"]
    for word in _WORDS:
        tokens += [word, "▁" + word, "##" + word, word + "</w>"]
    tokens += ["<pad>", " a", "a ", "b</w>c</w>", "▁<0x41>", "<0x▁41>"]
    text = "中😀é\ufffda \n".encode() + b"\xff\xc0\x80"
    return tokens + [f"<0x{byte:02X}>" for byte in text]


def _random_decoder(rng):
    """One step or several, in orders that files have and in others."""
    replace = [
        decoders.Replace("▁", " "),
        decoders.Replace("_", ""),
        decoders.Replace("▁", ""),
        decoders.Replace(tokenizers.Regex("[a▁]"), "x"),
        decoders.Replace(tokenizers.Regex(r"\s+\."), "."),
    ]
    own = [
        decoders.Metaspace(prepend_scheme=rng.choice(["always", "never", "first"])),
        decoders.WordPiece(cleanup=rng.random() < 0.5),
        decoders.Strip(rng.choice(" a"), rng.randint(0, 2), 0),
    ]
    steps = rng.sample(replace, rng.randint(0, 2))
    if rng.random() < 0.6:
        steps.append(decoders.ByteFallback())
    steps += rng.sample(own, rng.randint(0, 2))
    if rng.random() < 0.7:
        steps.append(decoders.Fuse())
        if rng.random() < 0.6:
            steps.append(decoders.Strip(rng.choice(" a"), rng.randint(1, 3), 0))
    if rng.random() < 0.15:
        steps.append(rng.choice(replace + own))
    return decoders.Sequence(steps) if steps else None


def llama_decoder():
    spaces = decoders.Replace("▁", " ")
    joined = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence([spaces, *joined])


class Backwards:
    """A decoder of which nothing is known."""

    def decode_chain(self, tokens):
        return tokens[::-1]


def make_tokenizer(tokens, decoder, *, added):
    """A tokenizer that only decodes; `added` are special tokens."""
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(added)
    return Tokenizer(backend)


def _random_tokenizer(tokens, decoder, rng):
    made = make_tokenizer(tokens, decoder, added=["<s>", "</s>", rng.choice(tokens)])
    added = tokenizers.AddedToken("added ", normalized=False)
    made.backend.add_tokens([added, "▁é"])
    return made


def make_tokenizers(count=64):
    """`count` of them, the same ones at every call."""
    rng = random.Random(0)
    made = [
        _random_tokenizer(byte_level_tokens(rng), decoders.ByteLevel(), rng)
        for _ in range(16)
    ]
    known = [None, llama_decoder(), llama_decoder(), decoders.Metaspace()]
    known += [decoders.WordPiece(), decoders.BPEDecoder(), decoders.CTC()]
    known += [decoders.Decoder.custom(Backwards())]
    known += [decoders.Sequence([decoders.Fuse(), decoders.Replace(" .", ".")])]
    made += [_random_tokenizer(_piece_tokens(rng), decoder, rng) for decoder in known]
    while len(made) < count:
        made.append(_random_tokenizer(_piece_tokens(rng), _random_decoder(rng), rng))
    return made
