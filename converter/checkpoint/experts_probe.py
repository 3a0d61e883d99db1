"""A numeric probe: does an experts module compute what packed experts compute?"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FUSED = ("gate_up_proj", "down_proj")
"""Parameters of an experts module: [experts, 2 * intermediate, hidden] and
[experts, hidden, intermediate].
"""
_HIDDEN = 32
_INTERMEDIATE = 24
_TOLERANCE = 1e-4


def computes_gated_silu(module: Any) -> bool:
    """True if the module's forward gives down(silu(gate) * up), weighted, for each chosen expert.

    The module is on the meta device. It runs with small random weights; all experts share those of
    one.
    """
    count = len(module.down_proj)
    if set(dict(module.named_parameters())) != set(FUSED) or count < 1:
        return False
    random = torch.Generator().manual_seed(0)
    gate_up = torch.randn(1, 2 * _INTERMEDIATE, _HIDDEN, generator=random) / _HIDDEN**0.5
    down = torch.randn(1, _HIDDEN, _INTERMEDIATE, generator=random) / _INTERMEDIATE**0.5
    x = torch.randn(3, _HIDDEN, generator=random)
    scores = torch.rand(3, 2, generator=random)
    chosen = torch.tensor([[0, count // 2], [count - 1, 0], [0, count - 1]])
    output = _output(module, gate_up, down, (x, chosen, scores))
    gate, up = (x @ gate_up[0].T).chunk(2, dim=1)
    expected = (functional.silu(gate) * up) @ down[0].T * scores.sum(1, keepdim=True)
    return (
        isinstance(output, Tensor)
        and output.shape == expected.shape
        and bool(torch.allclose(output, expected, rtol=_TOLERANCE, atol=_TOLERANCE))
    )


def _output(module: Any, gate_up: Tensor, down: Tensor, inputs: tuple[Tensor, ...]) -> Any:
    """Return the output of the module with these weights in every expert; None if it fails."""
    count = len(module.down_proj)
    parameters = dict(module._parameters)
    try:
        module._parameters["gate_up_proj"] = gate_up.expand(count, -1, -1)
        module._parameters["down_proj"] = down.expand(count, -1, -1)
        with torch.inference_mode():
            return module(*inputs)
    # A forward with other arguments or shapes raises anything; the module is then not supported.
    except Exception:
        return None
    finally:
        module._parameters.update(parameters)
