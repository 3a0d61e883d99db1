"""Whether a GPU computes what it should: small products, compared with the reference, before a
model relies on it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from formats.errors import MoeConvertError
from formats.expert import ExpertLayout
from formats.packing import HEAD_BYTES, PACKINGS, Packing
from loader.arithmetic.backend import TorchBackend
from loader.cuda.device.device import Device
from loader.cuda.products.packed_products import Products

TOLERANCE = 0.03
"""Relative L2 error; int8 activations alone bring about 0.01 after three products
(docs/numerics.md).
"""
_SIZES = 192, 320
"""Hidden and intermediate; neither is a whole number of superblocks."""
_TOKENS = 1, 40
"""One takes the kernels for single tokens, the other those for prompts."""


def check_products(device: Device, packings: Iterable[str]) -> None:
    """MoeConvertError naming device, packing and error if an expert in one of the tile `packings`
    comes out wrong.

    Waits for the device.
    """
    for name in sorted(set(packings) & PACKINGS.keys()):
        for tokens in _TOKENS:
            error = _error(device, PACKINGS[name], tokens)
            if not error <= TOLERANCE:
                raise MoeConvertError(
                    f"{device.name}: an expert of {tokens} tokens in {name} is off by {error:.3g} (relative), at most"
                    f" {TOLERANCE} is expected: the kernels do not work on this GPU",
                    "use device='cpu', and report this",
                )


def _error(device: Device, packing: Packing, tokens: int) -> float:
    random = torch.Generator().manual_seed(0)
    hidden, intermediate = _SIZES
    layout = ExpertLayout(hidden, intermediate, packing, packing)
    blob = random_expert(layout, random)
    x = torch.randn(tokens, hidden, generator=random)
    index, weights = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
    layouts, expected = {0: layout}, torch.zeros(tokens, hidden)
    TorchBackend().experts({0: blob}, layouts, x, index, weights, expected)
    there = [
        part.to(device.torch_device) for part in (blob, x, weights, torch.zeros_like(expected))
    ]
    Products(device).add_experts({0: there[0]}, layouts, there[1], index, there[2], there[3])
    return float((there[3].cpu() - expected).norm() / expected.norm())


def random_expert(layout: ExpertLayout, random: torch.Generator) -> Tensor:
    """Random codes and scales below super-scales of a weight's usual size."""
    blob = torch.randint(256, (layout.n_bytes,), generator=random, dtype=torch.uint8)
    sections = blob[: layout.gate_up_bytes], blob[layout.gate_up_bytes :]
    for section, shape, packing in zip(
        sections,
        (layout.gate_up_shape, layout.down_shape),
        (layout.gate_up, layout.down),
        strict=True,
    ):
        heads = section.view(shape)[:, :HEAD_BYTES]
        scale = 0.05 / getattr(packing, "max_code", 1) / getattr(packing, "max_s", 1)
        half = torch.full((len(heads), HEAD_BYTES // 2), scale, dtype=torch.float16)
        heads.copy_(half.view(torch.uint8))
    return blob
