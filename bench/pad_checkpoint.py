"""Pad a Mixtral checkpoint with zeros to widths that K-quants take, without changing its function.

    python bench/pad_checkpoint.py examples/tiny-mixtral /tmp/padded

Hidden and intermediate size become multiples of 256, the width of a K-quant's superblock, and
attention gets heads of zeros up to the new hidden size. The mean of squares in RMSNorm falls by
old / new hidden size; weights and epsilon of the norms compensate it. These norms and the model's
dtype are float32, because bfloat16 would round the factor.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

MULTIPLE = 256


@dataclass(frozen=True)
class Widths:
    """Sizes that padding changes, and the head counts that give its layout."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Widths:
        """Return the widths of a config.json."""
        return cls(
            config["hidden_size"],
            config["intermediate_size"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
        )

    def padded(self) -> Widths:
        """Return the next multiples of MULTIPLE.

        Raises ValueError if whole heads cannot fill the new hidden size.
        """
        hidden = -(-self.hidden // MULTIPLE) * MULTIPLE
        head = self.hidden // self.heads
        if hidden % (head * self.kv_heads):
            raise ValueError(
                f"hidden size {hidden} is no multiple of {self.kv_heads} key-value heads "
                f"of {head} channels"
            )
        intermediate = -(-self.intermediate // MULTIPLE) * MULTIPLE
        return Widths(hidden, intermediate, hidden // head, self.kv_heads)


def pad_checkpoint(source: Path, out: Path) -> None:
    """Write the padded checkpoint of `source` to the new folder `out`."""
    out.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    old = Widths.of(config)
    new = old.padded()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = {
                name: _padded(name, weight, old, new) for name, weight in load_file(file).items()
            }
            save_file(tensors, out / file.name, {"format": "pt"})
        elif file.is_file():
            shutil.copyfile(file, out / file.name)
    config |= {
        "hidden_size": new.hidden,
        "intermediate_size": new.intermediate,
        "num_attention_heads": new.heads,
        "rms_norm_eps": config["rms_norm_eps"] * old.hidden / new.hidden,
        "torch_dtype": "float32",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))


def _padded(name: str, weight: Tensor, old: Widths, new: Widths) -> Tensor:
    """Return the tensor `name` with zeros at the ends of its hidden, inner and head axes."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    hidden = new.hidden - old.hidden
    inner = new.intermediate - old.intermediate
    if weight.dim() == 1:
        return pad(weight.float() * (old.hidden / new.hidden) ** 0.5, (0, hidden))
    if kind in ("embed_tokens", "lm_head", "gate", "k_proj", "v_proj"):
        return pad(weight, (0, hidden))
    if kind == "q_proj":
        return pad(_with_heads(weight, old, new), (0, hidden))
    if kind == "o_proj":
        return pad(_with_heads(weight.T, old, new).T, (0, 0, 0, hidden)).contiguous()
    if kind in ("w1", "w3"):
        return pad(weight, (0, hidden, 0, inner))
    if kind == "w2":
        return pad(weight, (0, inner, 0, hidden))
    raise ValueError(f"{name} is not a tensor of a Mixtral checkpoint")


def _with_heads(rows: Tensor, old: Widths, new: Widths) -> Tensor:
    """Return `rows`, [heads * channels, columns], with heads of zeros in each key-value group."""
    groups = rows.unflatten(0, (old.kv_heads, old.heads // old.kv_heads, -1))
    more = (new.heads - old.heads) // old.kv_heads
    return pad(groups, (0, 0, 0, 0, 0, more)).flatten(0, 2)


def logit_difference(source: Path, padded: Path, tokens: int = 256) -> float:
    """Return the largest difference of both models' float32 logits on random tokens."""
    from loader.hf.loading.plain_checkpoint import load_checkpoint

    ids = torch.randint(5, 4096, (2, tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first, second = (
            load_checkpoint(folder).float()(input_ids=ids).logits for folder in (source, padded)
        )
    return float((first - second).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    pad_checkpoint(options.source, options.out)
    difference = logit_difference(options.source, options.out)
    print(f"{options.out}: logits differ by at most {difference:.2g}")


if __name__ == "__main__":
    main()
