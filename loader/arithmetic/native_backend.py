"""The backend over the native kernels (loader/arithmetic/kernels.py)."""

from itertools import groupby

import torch
from torch import Tensor

from formats.expert import ExpertLayout
from formats.packing import Packing
from loader.arithmetic import kernels
from loader.arithmetic.experts_step import ExpertsStep
from loader.arithmetic.plain_experts import PlainExperts
from loader.arithmetic.precise_backend import PreciseBackend
from loader.lifetime.copies import Shared


class NativeBackend(Shared):
    """Multiplies packed bytes directly; activations are rounded to int8 in groups of columns.

    docs/numerics.md gives the arithmetic.
    """

    name = "native"
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self._steps: dict[int, tuple[dict[int, ExpertLayout], ExpertsStep | None]] = {}
        self._plain = PlainExperts()
        self.for_gradients = PreciseBackend()

    def linear(self, tiles: Tensor, packing: Packing, rows: int, columns: int, x: Tensor) -> Tensor:
        return kernels.linear(x.contiguous(), tiles, packing.name, rows)

    def experts(
        self,
        blobs: dict[int, Tensor],
        layouts: dict[int, ExpertLayout],
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> None:
        x, index, weights = x.contiguous(), index.contiguous(), weights.contiguous()
        # One token's experts are always all in `blobs` (the smallest cache holds them).
        if x.shape[0] == 1 and (step := self._step(layouts)):
            step.add(blobs, x, index, weights, out)
            return
        # Runs of one kind: the sum must stay in ascending order of experts.
        for tiled, run in groupby(sorted(blobs), key=lambda expert: layouts[expert].is_tiled):
            calls = []
            for expert in run:
                token, rank = torch.where(index == expert)
                layout, score = layouts[expert], weights[token, rank]
                if tiled:
                    names = layout.gate_up.name, layout.down.name
                    calls.append(
                        kernels.ExpertCall(blobs[expert], *names, token.to(torch.int32), score)
                    )
                else:
                    result = self._plain.run(layout, blobs[expert], x[token])
                    out.index_add_(0, token, result * score[:, None])
            if calls:
                kernels.experts(x, calls, layout.intermediate, out)

    def _step(self, layouts: dict[int, ExpertLayout]) -> ExpertsStep | None:
        """Return the step for experts of one tiled layout, made once for each dict of layouts.

        None if the experts have several layouts, or plain rows.
        """
        known = self._steps.get(id(layouts))
        if known is None or known[0] is not layouts:
            kinds = set(layouts.values())
            layout = kinds.pop() if len(kinds) == 1 else None
            step = ExpertsStep(layout, len(layouts)) if layout and layout.is_tiled else None
            # The dict is kept too: while it lives, no other object has its id.
            known = self._steps[id(layouts)] = layouts, step
        return known[1]
