"""Write a seeded random Mixtral checkpoint with the layer shapes of a real one, for benchmarks and
tests.

    python bench/make_checkpoint.py /tmp/mixtral-4 --shape 8x7b --layers 4

Weights depend on seed, layer, expert and projection only: they are the same for every layout and
number of shards. Memory stays under 1 GiB for every shape.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from formats.safetensors_header import DTYPE_BYTES, TensorEntry
from formats.writer import PlacedFile

TOKENIZER = Path(__file__).parent.parent / "examples" / "tiny-mixtral"
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class Shape:
    """The numbers of a model; the vocabulary is the example tokenizer's 4096."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    experts: int = 8
    vocabulary: int = 4096


SHAPES = {
    "8x7b": Shape(4096, 14336, 32, 8),
    "8x22b": Shape(6144, 16384, 48, 8),
    "mini": Shape(64, 96, 4, 2, experts=4),
}


def make_checkpoint(
    folder: Path,
    shape: Shape,
    layers: int,
    *,
    layout: str = "experts",
    dtype: str = "BF16",
    shards: int = 1,
    tied: bool = False,
    seed: int = 0,
) -> None:
    """Writes the checkpoint. `layout` is "experts" (w1, w2, w3 of each) or "fused" (transformers
    5's keys).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = list(_tensors(shape, layers, layout, tied))
    sizes = [prod(dims) for _, dims, _ in tensors]
    names = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    )
    parts: list[list[int]] = [[] for _ in names]
    done, total = 0, sum(sizes)
    for i, size in enumerate(sizes):
        parts[min(shards - 1, done * shards // total)].append(i)
        done += size
    for name, part in zip(names, parts, strict=True):
        entries: list[TensorEntry] = []
        for i in part:
            begin = entries[-1].end if entries else 0
            entries.append(
                TensorEntry(
                    tensors[i][0],
                    dtype,
                    tensors[i][1],
                    begin,
                    begin + sizes[i] * DTYPE_BYTES[dtype],
                )
            )
        with PlacedFile(folder / name, entries, {"format": "pt"}) as file:
            for i in part:
                _write(file, tensors[i], dtype, seed)
            file.finish()
    if shards > 1:
        weight_map = {
            tensors[i][0]: name for name, part in zip(names, parts, strict=True) for i in part
        }
        index = {"metadata": {"total_size": total * DTYPE_BYTES[dtype]}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_config(folder, shape, layers, dtype, tied)


Part = tuple[str, tuple[int, int], float]
"""(what seeds it, its shape, standard deviation): tensors are rows of parts."""


def _tensors(
    shape: Shape, layers: int, layout: str, tied: bool
) -> Iterator[tuple[str, tuple[int, ...], list[Part]]]:
    """(name, shape, parts) of every tensor in the order of a real checkpoint."""
    h, i, n = shape.hidden, shape.intermediate, shape.experts
    head = h // shape.heads

    def plain(
        name: str, dims: tuple[int, ...], std: float
    ) -> tuple[str, tuple[int, ...], list[Part]]:
        return name, dims, [(name, (dims[0], dims[1] if len(dims) > 1 else 1), std)]

    yield plain("model.embed_tokens.weight", (shape.vocabulary, h), 1.0)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        gate = [(f"{layer}.{e}.gate", (i, h), h**-0.5) for e in range(n)]
        up = [(f"{layer}.{e}.up", (i, h), h**-0.5) for e in range(n)]
        down = [(f"{layer}.{e}.down", (h, i), i**-0.5) for e in range(n)]
        if layout == "fused":
            both = [part for e in range(n) for part in (gate[e], up[e])]
            yield f"{prefix}.mlp.experts.gate_up_proj", (n, 2 * i, h), both
            yield f"{prefix}.mlp.experts.down_proj", (n, h, i), down
            router = f"{prefix}.mlp.gate.weight"
        else:
            for e in range(n):
                for name, parts in (("w1", gate), ("w2", down), ("w3", up)):
                    yield (
                        f"{prefix}.block_sparse_moe.experts.{e}.{name}.weight",
                        parts[e][1],
                        [parts[e]],
                    )
            router = f"{prefix}.block_sparse_moe.gate.weight"
        yield router, (n, h), [(f"{layer}.router", (n, h), h**-0.5)]
        for name, rows, columns in (
            ("q_proj", shape.heads * head, h), ("k_proj", shape.kv_heads * head, h),
            ("v_proj", shape.kv_heads * head, h), ("o_proj", h, shape.heads * head),
        ):  # fmt: skip
            yield plain(f"{prefix}.self_attn.{name}.weight", (rows, columns), columns**-0.5)
        yield plain(f"{prefix}.input_layernorm.weight", (h,), 0.0)
        yield plain(f"{prefix}.post_attention_layernorm.weight", (h,), 0.0)
    yield plain("model.norm.weight", (h,), 0.0)
    if not tied:
        yield plain("lm_head.weight", (shape.vocabulary, h), h**-0.5)


def _write(
    file: PlacedFile, tensor: tuple[str, tuple[int, ...], list[Part]], dtype: str, seed: int
) -> None:
    """Writes a tensor part by part, in pieces; a standard deviation of 0 means ones."""
    name, _, parts = tensor
    position = 0
    for key, (rows, columns), std in parts:
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8], "little") >> 1
        )
        step = max(1, CHUNK_BYTES // (4 * columns))
        for begin in range(0, rows, step):
            count = min(step, rows - begin)
            values = (
                torch.randn(count, columns, generator=generator) * std
                if std
                else torch.ones(count, columns)
            )
            data = values.to(TORCH[dtype]).view(torch.uint8)
            file.write(name, data, position)
            position += data.numel()


def _write_config(folder: Path, shape: Shape, layers: int, dtype: str, tied: bool) -> None:
    config = json.loads((TOKENIZER / "config.json").read_text())
    config |= {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_local_experts": shape.experts,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
        "torch_dtype": str(TORCH[dtype]).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        shutil.copyfile(TOKENIZER / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8x7b")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--layout", choices=["experts", "fused"], default="experts")
    parser.add_argument("--dtype", choices=TORCH, default="BF16")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--tied", action="store_true", help="tie lm_head to the embeddings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_checkpoint(
        options.folder,
        SHAPES[options.shape],
        options.layers,
        layout=options.layout,
        dtype=options.dtype,
        shards=options.shards,
        tied=options.tied,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
