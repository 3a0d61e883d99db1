"""The gradient of one expert; its weights are dequantized a few rows at a time."""

from torch import Tensor
from torch.nn import functional

from formats.expert import ExpertLayout, split
from loader.arithmetic.torch_product import chunks, input_gradient


def expert_gradients(
    layout: ExpertLayout, blob: Tensor, x: Tensor, weights: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weights in weights · down(silu(gate(x)) · up(x)), float32.

    blob: the expert, uint8 [n_bytes], in `layout`. x: [T, hidden]. weights: [T]. grad: the
    result's gradient, [T, hidden]. The intermediate values are recomputed; each weight is
    dequantized once.
    """
    gate, up, down = split(layout, blob)
    shape = layout.intermediate, layout.hidden
    x_grad = x.new_zeros(x.shape)
    weights_grad = weights.new_zeros(weights.shape)
    inner_grad = input_gradient(down, layout.down, layout.hidden, layout.intermediate, grad)
    both = zip(
        chunks(gate, layout.gate_up, *shape), chunks(up, layout.gate_up, *shape), strict=True
    )
    for (part, gate_rows), (_, up_rows) in both:
        gated = functional.linear(x, gate_rows)
        raised = functional.linear(x, up_rows)
        sigmoid = gated.sigmoid()
        silu = gated * sigmoid
        unweighted = inner_grad[:, part]
        # <down(inner), grad> = <inner, gradient of inner>: the output itself is not needed.
        weights_grad += (unweighted * silu * raised).sum(1)
        part_grad = unweighted * weights[:, None]
        x_grad.addmm_(part_grad * raised * (sigmoid + silu * (1 - sigmoid)), gate_rows)
        x_grad.addmm_(part_grad * silu, up_rows)
    return x_grad, weights_grad
