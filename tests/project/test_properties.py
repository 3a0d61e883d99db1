"""Properties that hold for any shape, dtype, packing, header, index and small model; inputs by
hypothesis, seeded.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from bad_folders import VECTORS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_checkpoint import Shape, make_checkpoint
from make_vectors import quantized, random_matrix
from safetensors import safe_open

import loader
from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.config.strict_json import dump
from formats.errors import FormatError, MoeConvertError
from formats.index import parse_index
from formats.packing import PACKINGS
from formats.reading.verify import verify_folder
from formats.safetensors_header import DTYPE_BYTES, TensorEntry, build_header, header_from
from formats.tiles import dequantize, matrix_weights, pack, unpack
from loader.arithmetic import kernels
from loader.arithmetic.backend import TorchBackend

settings.register_profile(
    "seeded", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("seeded")

PACKAGE_DTYPES = sorted(set(DTYPE_BYTES) - {"F8_E8M0", "C64"})
"""Those that torch has in every supported release."""
tiles = st.sampled_from(sorted(PACKINGS))
names = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Cf", "Zl", "Zp")), min_size=1, max_size=40
)
values: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
    st.just([]),
    st.just({}),
    st.just([[0]]),
)


@st.composite
def tensors(draw: st.DrawFn) -> list[TensorEntry]:
    """Tensors that lie one after the other."""
    entries: list[TensorEntry] = []
    for name in draw(
        st.lists(names.filter(lambda n: n != "__metadata__"), unique=True, max_size=6)
    ):
        dtype = draw(st.sampled_from(PACKAGE_DTYPES))
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        begin = entries[-1].end if entries else 0
        size = DTYPE_BYTES[dtype]
        for dimension in shape:
            size *= dimension
        entries.append(TensorEntry(name, dtype, tuple(shape), begin, begin + size))
    return entries


@given(tensors(), st.dictionaries(names, names, max_size=3))
@settings(max_examples=60)
def test_any_header_that_is_written_is_read_by_us_and_by_the_safetensors_package(
    entries: list[TensorEntry], metadata: dict[str, str]
) -> None:
    header = build_header(entries, metadata)
    data = header + bytes(entries[-1].end if entries else 0)
    found = header_from(lambda offset, length: data[offset : offset + length], len(data), "file")
    assert (list(found.entries.values()), found.metadata, found.data_offset) == (
        entries,
        metadata,
        len(header),
    )
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(data)
        file.flush()
        with safe_open(file.name, "pt") as f:
            assert {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()} == {  # noqa: SIM118
                entry.name: entry.shape for entry in entries
            }


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside `value`."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [place for key, inner in items for place in [(*path, key), *places(inner, (*path, key))]]


@given(st.data())
@settings(max_examples=150)
def test_any_value_in_any_field_of_an_index_is_refused_with_its_place_or_stays_what_it_is(
    data: st.DataObject,
) -> None:
    index = json.loads((VECTORS / "folder/moe_index.json").read_bytes())
    place = data.draw(st.sampled_from(places(index)))
    parent: Any = index
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = data.draw(values)
    try:
        read = parse_index(json.dumps(index).encode(), "here")
    except MoeConvertError as e:
        assert isinstance(e, FormatError)
        assert e.message.startswith("here")
        return
    assert msgspec.to_builtins(read) == {**index, "recipe": msgspec.to_builtins(read.recipe)}
    assert parse_index(dump(read), "here") == read


@given(st.data())
@settings(max_examples=100)
def test_any_value_in_any_field_of_a_header_is_refused_or_covers_the_file(
    data: st.DataObject,
) -> None:
    entries = [TensorEntry("a", "BF16", (3, 4), 0, 24), TensorEntry("b", "U8", (8,), 24, 32)]
    header = build_header(entries, {"format": "pt"})
    body = json.loads(header[8:])
    place = data.draw(st.sampled_from(places(body)))
    parent: Any = body
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = data.draw(values)
    text = json.dumps(body).encode()
    file = len(text).to_bytes(8, "little") + text + bytes(32)
    try:
        found = header_from(
            lambda offset, length: file[offset : offset + length], len(file), "here"
        )
    except FormatError as e:
        assert e.message.startswith("here")
        return
    assert sum(entry.n_bytes for entry in found.entries.values()) == 32


@given(tiles, st.integers(1, 100), st.integers(1, 700), st.integers(0, 2**32))
@settings(max_examples=60)
def test_matrix_of_any_shape_is_stored_in_the_stated_bytes_and_comes_back(
    name: str, rows: int, columns: int, seed: int
) -> None:
    packing = PACKINGS[name]
    matrix = quantized(random_matrix(name, rows, columns, seed))
    stored = pack(matrix, packing)
    assert (tuple(stored.shape), stored.numel()) == (
        packing.stored_shape(rows, columns), packing.matrix_bytes(rows, columns)
    )  # fmt: skip
    back = unpack(stored, packing, rows, columns)
    for field in ("codes", "s", "m", "ds", "dm"):
        assert torch.equal(getattr(back, field), getattr(matrix, field))
    assert torch.equal(
        matrix_weights(packing, stored, rows, columns), dequantize(matrix, packing.group_size)
    )


@pytest.mark.skipif(not kernels.available(), reason="native kernels are not built")
@given(tiles, st.integers(1, 100), st.integers(1, 700), st.integers(1, 20), st.integers(0, 2**32))
@settings(max_examples=60)
def test_native_product_of_any_shape_is_the_reference(
    name: str, rows: int, columns: int, tokens: int, seed: int
) -> None:
    packing = PACKINGS[name]
    stored = pack(quantized(random_matrix(name, rows, columns, seed)), packing)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    expected = TorchBackend().linear(stored, packing, rows, columns, x)
    # docs/numerics.md: activations are rounded to 8 bits for each group of columns.
    scale = x.abs().amax() * matrix_weights(packing, stored, rows, columns).abs().sum(1).amax()
    assert (
        float((kernels.linear(x, stored, name, rows) - expected).abs().max())
        <= float(scale) / 127 + 1e-6
    )


@st.composite
def models(draw: st.DrawFn) -> tuple[Shape, dict[str, Any], str]:
    """(shape, further arguments of make_checkpoint, recipe)."""
    head_dim = draw(st.sampled_from((8, 16, 20)))
    kv = draw(st.sampled_from((1, 2)))
    heads = kv * draw(st.sampled_from((1, 2)))
    experts = draw(st.integers(2, 6))
    shape = Shape(heads * head_dim, draw(st.integers(1, 12)) * 8, heads, kv, experts)
    options = {
        "layers": draw(st.integers(1, 3)),
        "layout": draw(st.sampled_from(("experts", "fused"))),
        "dtype": draw(st.sampled_from(("BF16", "F16", "F32"))),
        "shards": draw(st.integers(1, 3)),
        "tied": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }
    return (
        shape,
        options,
        draw(st.sampled_from(("16bit", "2bit", "3bit", "4bit", "paper-2bit", "paper-3bit"))),
    )


@given(models())
@settings(max_examples=6)
def test_model_of_any_shape_dtype_and_recipe_converts_verifies_and_predicts(
    model: tuple[Shape, dict[str, Any], str],
) -> None:
    from transformers import AutoModelForCausalLM

    shape, options, name = model
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "source", Path(scratch) / "out"
        make_checkpoint(source, shape, **options)
        exact = {"attn_bits": 16} if name == "16bit" else {"solver": "hqq"}
        convert_checkpoint(source, out, make_recipe(name, **exact))
        report = verify_folder(out, read_data=True)
        assert (report.problems, report.experts) == ([], options["layers"] * shape.experts)
        ids = torch.randint(3, 4000, (1, 9), generator=torch.Generator().manual_seed(0))
        ours = loader.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            found = ours(ids).logits
            if name == "16bit" and options["dtype"] != "F32":
                plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
                expected = plain(ids).logits
                assert float((found - expected).abs().max() / expected.std()) < 1e-4
        assert found.shape == (1, 9, 4096)
        assert bool(torch.isfinite(found).all())
