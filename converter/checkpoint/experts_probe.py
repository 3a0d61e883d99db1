"""A numeric probe: does an experts module compute what packed experts compute?"""

from typing import Any

import torch
from torch.nn import functional

HIDDEN = 32
INTERMEDIATE = 24
_TOLERANCE = 1e-4
FUSED = ("gate_up_proj", "down_proj")
"""An experts module's parameters, [experts, 2 * intermediate, hidden] and [experts, hidden,
intermediate].
"""


def computes_gated_silu(module: Any) -> bool:
    """True if the module's own forward gives silu(gate)·up → down, by the weights of the experts
    that tokens choose.

    The module is on the meta device. It runs with small random weights, of which one expert's stand
    for all.
    """
    count = len(module.down_proj)
    if set(dict(module.named_parameters())) != set(FUSED) or count < 1:
        return False
    random = torch.Generator().manual_seed(0)
    gate_up = torch.randn(1, 2 * INTERMEDIATE, HIDDEN, generator=random) / HIDDEN**0.5
    down = torch.randn(1, HIDDEN, INTERMEDIATE, generator=random) / INTERMEDIATE**0.5
    x = torch.randn(3, HIDDEN, generator=random)
    weights = torch.rand(3, 2, generator=random)
    index = torch.tensor([[0, count // 2], [count - 1, 0], [0, count - 1]])
    parameters = dict(module._parameters)
    try:
        module._parameters["gate_up_proj"] = gate_up.expand(count, -1, -1)
        module._parameters["down_proj"] = down.expand(count, -1, -1)
        with torch.inference_mode():
            found = module(x, index, weights)
    except (
        Exception
    ):  # a forward of other arguments or other shapes: whatever it raises, it is not ours
        return False
    finally:
        module._parameters.update(parameters)
    gate, up = (x @ gate_up[0].T).chunk(2, dim=1)
    expected = (functional.silu(gate) * up) @ down[0].T * weights.sum(1, keepdim=True)
    return (
        isinstance(found, torch.Tensor)
        and found.shape == expected.shape
        and bool(torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE))
    )
