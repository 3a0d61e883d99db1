"""Compares small products on a GPU with the reference before a model uses the GPU."""

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
"""Largest relative L2 error.

int8 activations alone cause about 0.01 after three products (docs/numerics.md).
"""
_HIDDEN, _INTERMEDIATE = 192, 320
"""Sizes of the expert; neither is a whole number of superblocks."""
_TOKENS = 1, 40
"""1 uses the kernels for single tokens, 40 those for prompts."""


def check_products(device: Device, packings: Iterable[str]) -> None:
    """Raise MoeConvertError if an expert in one of the tile `packings` has a wrong result.

    The error names the device, the packing and the relative error. Waits for the device.
    """
    for name in sorted(set(packings) & PACKINGS.keys()):
        for tokens in _TOKENS:
            error = _relative_error(device, PACKINGS[name], tokens)
            # False for NaN as well.
            if not error <= TOLERANCE:
                raise MoeConvertError(
                    f"{device.name}: an expert of {tokens} tokens in {name} is off by {error:.3g}"
                    f" (relative), at most {TOLERANCE} is expected: the kernels do not work on"
                    " this GPU",
                    "use device='cpu', and report this",
                )


def _relative_error(device: Device, packing: Packing, tokens: int) -> float:
    random = torch.Generator().manual_seed(0)
    layout = ExpertLayout(_HIDDEN, _INTERMEDIATE, packing, packing)
    blob = random_expert(layout, random)
    x = torch.randn(tokens, _HIDDEN, generator=random)
    index = torch.zeros(tokens, 1, dtype=torch.int64)
    weights = torch.ones(tokens, 1)
    layouts = {0: layout}
    expected = torch.zeros(tokens, _HIDDEN)
    TorchBackend().experts({0: blob}, layouts, x, index, weights, expected)
    gpu_blob, gpu_x, gpu_weights, out = (
        part.to(device.torch_device) for part in (blob, x, weights, torch.zeros_like(expected))
    )
    Products(device).add_experts({0: gpu_blob}, layouts, gpu_x, index, gpu_weights, out)
    return float((out.cpu() - expected).norm() / expected.norm())


def random_expert(layout: ExpertLayout, random: torch.Generator) -> Tensor:
    """Return an expert, uint8 [n_bytes], with random codes and scales.

    The super-scales give weights of a usual size.
    """
    blob = torch.randint(256, (layout.n_bytes,), generator=random, dtype=torch.uint8)
    gate_up = blob[: layout.gate_up_bytes].view(layout.gate_up_shape)
    down = blob[layout.gate_up_bytes :].view(layout.down_shape)
    for tiles, packing in ((gate_up, layout.gate_up), (down, layout.down)):
        heads = tiles[:, :HEAD_BYTES]
        scale = 0.05 / getattr(packing, "max_code", 1) / getattr(packing, "max_s", 1)
        half = torch.full((len(heads), HEAD_BYTES // 2), scale, dtype=torch.float16)
        heads.copy_(half.view(torch.uint8))
    return blob
