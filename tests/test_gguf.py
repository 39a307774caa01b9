"""GGUF files: the index, and tensors read piece by piece, against the gguf package."""

import gc
import time
import weakref

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsespec_jax.loading import gguf_file
from sparsespec_jax.loading.gguf_file import GgufFile
from sparsespec_jax.loading.weights import assemble, layer_shapes, outer_shapes
from sparsespec_jax.models.transformer import param_shapes
from tests.model_files import VOCABULARY, write_gguf

KINDS = [
    kind
    for kind in gguf.GGMLQuantizationType
    if kind in gguf.quants._type_traits or kind.name in ("F16", "F32")
]
ROWS, WIDTH = 6, 512


def stored(kind, seed):
    """Bytes of a random tensor; its scales, of two bytes, are finite."""
    values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    shape = (ROWS, WIDTH // values * num_bytes)
    data = rng.integers(0, 256, shape, dtype=np.uint8)
    data[:, 1::2] &= 0x3B  # no exponent of all ones, wherever a scale may begin
    data[:, ::2] &= 0x3B
    return data


def written(path, tensors):
    writer = gguf.GGUFWriter(path, "llama")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_has_the_packages_bits(tmp_path, monkeypatch, kind):
    data = stored(kind, int(kind))
    path = written(tmp_path / "x.gguf", {"a": (data, kind), "b": (data[::-1], kind)})
    wanted = gguf.quants.dequantize(data, kind)
    for chunk in (gguf_file._CHUNK, 512, 1):  # whole; a row; a block at a time
        monkeypatch.setattr(gguf_file, "_CHUNK", chunk)
        file = GgufFile(path)
        found = file.tensor("a")
        assert found.dtype == np.float32 and found.shape == (ROWS, WIDTH)
        assert (as_bits(found) == as_bits(wanted)).all()
        assert (as_bits(file.tensor("b")) == as_bits(wanted[::-1])).all()
        narrow = file.tensor("a", jnp.bfloat16)
        cast = jnp.asarray(wanted).astype(jnp.bfloat16)
        assert (as_bits(narrow) == as_bits(cast)).all()


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path):
    kind = gguf.GGMLQuantizationType.I32
    path = written(tmp_path / "x.gguf", {"a": (np.zeros((2, 4), np.int32), kind)})
    with pytest.raises(ValueError, match="x.gguf: tensor a is of type I32"):
        GgufFile(path).tensor("a")


def test_the_index_is_the_packages(tmp_path):
    extra = {"general.alignment": 64, "x.low": -7, "x.half": 0.1}
    extra |= {"x.yes": True, "x.no": [True, False], "x.texts": ["", "\u00e9"]}
    path = write_gguf(tmp_path / "x.gguf", "mistral", metadata=VOCABULARY | extra)
    file, reader = GgufFile(path), gguf.GGUFReader(path)
    known = {key: reader.get_field(key).contents() for key in reader.fields}
    known = {k: v for k, v in known.items() if not k.startswith("GGUF.")}
    assert file.fields.values == known
    assert [*map(type, file.fields.values.values())] == [*map(type, known.values())]
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = file.tensors[tensor.name]
        assert ours.shape == tuple(tensor.shape.tolist()[::-1])
        assert (ours.offset, ours.num_bytes) == (tensor.data_offset, tensor.n_bytes)


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        (4, b"\0\0\0\3", "version 50331648"),  # of a machine that counts otherwise
        (4, b"\1\0\0\0", "version 1"),
        (8, b"\xff" * 8, "ends amid"),
        (16, b"\xff" * 8, "ends amid"),
    ],
)
def test_a_head_that_cannot_be(tmp_path, place, content, message):
    path = write_gguf(tmp_path / "x.gguf", "mistral")
    whole = bytearray(path.read_bytes())
    whole[place : place + len(content)] = content
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=f"x.gguf cannot be read as GGUF.*{message}"):
        GgufFile(path)


def test_a_key_given_twice_is_refused(tmp_path):
    texts = {"x.one": "a", "x.two": "b"}
    path = write_gguf(tmp_path / "x.gguf", "mistral", metadata=texts)
    path.write_bytes(path.read_bytes().replace(b"x.two", b"x.one"))
    with pytest.raises(ValueError, match="metadata 'x.one' are there twice"):
        GgufFile(path)


def test_a_file_that_is_cut_after_it_was_opened(tmp_path):
    """An error, where a mapped file would end the process."""
    path = write_gguf(tmp_path / "x.gguf", "mistral")
    file = GgufFile(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="x.gguf: tensor .* is cut: the file has"):
        for name in file.tensors:
            file.tensor(name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_was_read_is_dropped(tiny_config, dtype):
    """At most one layer's tensors, or one table, live beside the parameters."""
    sizes = layer_shapes(tiny_config) | outer_shapes(tiny_config)
    alive, most = [], 0

    def living():
        return [at for ref, at in alive if ref() is not None]

    def read(name, layer):
        nonlocal most
        for patience in (0.0, 0.02, 0.1):  # until a thread of the device lets go
            time.sleep(patience)
            gc.collect(0)  # JAX drops then what its threads let go
            if not (others := set(living()) - {None, layer}):
                break
        most = max(most, len(others))
        array = np.ones(sizes[name], np.float16)  # no type of parameters: never aliased
        alive.append((weakref.ref(array), layer))
        return array, name

    params = assemble(tiny_config, read, dtype=dtype)
    assert most == 0
    shapes = param_shapes(tiny_config, dtype)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, shapes)
    gc.collect(0)
    assert len(living()) <= 1  # the last one read
