"""Kinds of source folders: each function changes an ordinary one, in one file, into its kind."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import SHAPES, make_checkpoint
from safetensors.torch import load_file, save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
W1 = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
Tensors = dict[str, torch.Tensor]


def make_single(folder: Path) -> Path:
    """Writes an ordinary checkpoint in one file."""
    make_checkpoint(folder, SHAPES["mini"], 2)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    tensors = load_file(folder / SINGLE)
    tensors = change(tensors) or tensors
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        folder / SINGLE,
        metadata={"format": "pt"},
    )


def shard(
    folder: Path, shards: dict[str, Tensors], weight_map: dict[str, str] | None = None
) -> None:
    """Writes `shards` and their index in place of the one file."""
    (folder / SINGLE).unlink(missing_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = weight_map or {
        tensor: name for name, tensors in shards.items() for tensor in tensors
    }
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def plain(folder: Path) -> None:
    """Nothing is changed."""


def sharded(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    halves = names[::2], names[1::2]
    shard(
        folder,
        {
            f"model-0000{i + 1}-of-00002.safetensors": {n: tensors[n] for n in halves[i]}
            for i in (0, 1)
        },
    )


def index_that_misplaces_tensors(folder: Path) -> None:
    sharded(folder)
    index = json.loads((folder / INDEX).read_text())
    first, *_, last = index["weight_map"]
    weight_map = index["weight_map"] | {first: index["weight_map"][last]}
    edit_json(folder / INDEX, weight_map=weight_map)


def single_beside_an_older_index(folder: Path) -> None:
    older = {name: t * -1 for name, t in load_file(folder / SINGLE).items()}
    save_file(older, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(older, "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shards_that_the_index_does_not_name(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    sharded(folder)
    save_file({W1: tensors[W1] * -1}, folder / "model-00003-of-00003.safetensors")


def second_index(folder: Path) -> None:
    sharded(folder)
    (folder / "model.fp16.safetensors.index.json").write_text("{}")


def overlay(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    base_name, overlay_name = "model-00001-of-00001.safetensors", "model-overlay-00001.safetensors"
    weight_map = dict.fromkeys(tensors, base_name) | {W1: overlay_name}
    shard(folder, {base_name: tensors, overlay_name: {W1: tensors[W1] * -2}}, weight_map)


def links(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(elsewhere / f"blob{number}")
        path.symlink_to(elsewhere / f"blob{number}")


def tied_with_an_equal_head(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    rewrite(folder, lambda t: t | {HEAD: t[EMBEDDING].clone()})


def tied_without_a_head(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    rewrite(folder, lambda t: {name: tensor for name, tensor in t.items() if name != HEAD})


def tied_with_a_head_of_its_own(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)


def tied_with_a_head_of_its_own_in_float32(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    rewrite(folder, lambda t: t | {HEAD: t[HEAD].float()})


def tied_with_the_head_alone(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    rewrite(folder, lambda t: {name: tensor for name, tensor in t.items() if name != EMBEDDING})


def untied_with_an_equal_head(folder: Path) -> None:
    rewrite(folder, lambda t: t | {HEAD: t[EMBEDDING].clone()})


def inv_freq_in_each_layer(folder: Path) -> None:
    inv_freq = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in (0, 1)}
    rewrite(folder, lambda t: t | inv_freq)


def inv_freq_of_the_model(folder: Path) -> None:
    rewrite(folder, lambda t: t | {"model.rotary_emb.inv_freq": torch.ones(8)})


def without_the_model_prefix(folder: Path) -> None:
    rewrite(folder, lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()})


def head_under_the_model_prefix(folder: Path) -> None:
    rewrite(folder, lambda t: {f"model.{n}" if n == HEAD else n: tensor for n, tensor in t.items()})


def router_of_the_fused_layout(folder: Path) -> None:
    rewrite(
        folder,
        lambda t: {
            n.replace("block_sparse_moe.gate", "mlp.gate"): tensor for n, tensor in t.items()
        },
    )


def fused(folder: Path) -> None:
    (folder / SINGLE).unlink()
    make_checkpoint(folder, SHAPES["mini"], 2, layout="fused")


def float16(folder: Path) -> None:
    edit_json(folder / "config.json", torch_dtype="float16")
    rewrite(folder, lambda t: {name: tensor.half() for name, tensor in t.items()})


def float32_under_a_config_of_bfloat16(folder: Path) -> None:
    rewrite(folder, lambda t: {name: tensor.float() for name, tensor in t.items()})


def prefixed(prefix: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(
        folder, lambda t: {prefix + name: tensor for name, tensor in t.items()}
    )


def compiled_layer_by_layer(folder: Path) -> None:
    rewrite(
        folder,
        lambda t: {
            re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", n): tensor for n, tensor in t.items()
        },
    )


def switch_mlp(folder: Path) -> None:
    def stack(t: Tensors) -> Tensors:
        for layer in (0, 1):
            prefix = f"model.layers.{layer}.block_sparse_moe"
            for old, new in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                parts = [t.pop(f"{prefix}.experts.{e}.{old}.weight") for e in range(4)]
                t[f"{prefix}.switch_mlp.{new}.weight"] = torch.stack(parts)
        return t

    rewrite(folder, stack)


def extra_layer(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=1)


def missing_layer(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=3)


def extra_experts(folder: Path) -> None:
    edit_json(folder / "config.json", num_local_experts=3)
    rewrite(
        folder, lambda t: {n: tensor[:3] if "moe.gate." in n else tensor for n, tensor in t.items()}
    )


def overlay_without_a_say(folder: Path) -> None:
    overlay(folder)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    del weight_map[W1]
    edit_json(
        folder / INDEX, weight_map=weight_map | {EMBEDDING: "model-overlay-00001.safetensors"}
    )


def adapter_tensors(folder: Path) -> None:
    lora = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    rewrite(folder, lambda t: t | {lora: torch.zeros(2, 64)})


def mlx_quantized(folder: Path) -> None:
    switch_mlp(folder)
    name = "model.layers.0.block_sparse_moe.switch_mlp.gate_proj"
    rewrite(folder, lambda t: t | {f"{name}.weight": torch.zeros(4, 96, 8, dtype=torch.int32)})
    # safetensors 0.5 does not write torch's uint32.
    path = folder / SINGLE
    path.write_bytes(path.read_bytes().replace(b'"dtype":"I32"', b'"dtype":"U32"', 1))


def only(*names: str) -> Callable[[Path], None]:
    """A folder of files with these names and no weights of transformers' layout."""

    def make(folder: Path) -> None:
        (folder / SINGLE).unlink()
        for name in names:
            (folder / name).write_text("{}")

    return make


def beside(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text("{}")

    return write


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def one_folder_too_high(folder: Path) -> None:
    inner = folder / "checkpoint-500"
    inner.mkdir()
    for path in [p for p in folder.iterdir() if p.is_file()]:
        path.rename(inner / path.name)


def lfs_pointer(name: str) -> Callable[[Path], None]:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 7\n"

    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def untied_without_a_head(folder: Path) -> None:
    rewrite(folder, lambda t: {name: tensor for name, tensor in t.items() if name != HEAD})


def missing_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def other_vocabulary(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=4097)


def dangling_link(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("/gone/blob")


def other_weights(folder: Path) -> None:
    edit_json(folder / "config.json", transformers_weights="ema.safetensors")


def put(name: str, value: float, *place: int) -> Callable[[Tensors], None]:
    """Puts `value` at `place` of a tensor."""

    def change(t: Tensors) -> None:
        t[name][place or (5, 7)] = value

    return change
