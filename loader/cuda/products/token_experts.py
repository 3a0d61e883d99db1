"""One token's experts on a GPU, by launches that are prepared once."""

import ctypes
from collections.abc import Callable, Sequence

from torch import Tensor

from formats.expert import ExpertLayout
from formats.packing import blocks_of, tiles_of
from loader.cuda.device.device import Device
from loader.cuda.products.kernel_layouts import packing_suffix, tile_packings
from loader.cuda.products.structures import MAX_EXPERTS, DownShape, Experts
from loader.cuda.products.tensor_checks import check_bytes

_GATE_UP_THREADS = 256
_DOWN_THREADS = 384
"""Threads of one block (kDownWarps in kernels/experts.cuh)."""


class TokenExperts:
    """One token's experts of one layout. `Products.token_experts` makes it.

    acts: the experts' input. weights: float32 [k] by rank. out: float32 [hidden]. h: memory for the
    h of MAX_EXPERTS experts.
    """

    def __init__(
        self,
        device: Device,
        layout: ExpertLayout,
        acts: Tensor,
        weights: Tensor,
        out: Tensor,
        h: Tensor,
    ) -> None:
        self._device = device
        self._layout = layout
        self._n_bytes = layout.n_bytes
        self._packings = tile_packings(layout)
        self._acts = acts
        self._weights = weights
        self._out = out
        self._h = h
        self._prepared: dict[int, Callable[[Sequence[tuple[int, Tensor]], bool], None]] = {}
        """Launches by number of experts."""

    def add(self, blobs: Sequence[tuple[int, Tensor]], first: bool = False) -> None:
        """Add weights[rank] · expert(x) to `out` for each (rank, blob), in this order.

        blob: uint8 [n_bytes]. first: `out` begins from zero. Each eight experts take two launches.
        """
        for rank, blob in blobs:
            if not 0 <= rank < self._weights.numel():
                raise ValueError(f"rank {rank}: there are {self._weights.numel()} weights")
            check_bytes("blob", blob, self._n_bytes)
        if first and not blobs:
            self._out.zero_()
        for begin in range(0, len(blobs), MAX_EXPERTS):
            some = blobs[begin : begin + MAX_EXPERTS]
            if len(some) not in self._prepared:
                self._prepared[len(some)] = self._prepare(len(some))
            self._prepared[len(some)](some, first and begin == 0)

    def _prepare(self, count: int) -> Callable[[Sequence[tuple[int, Tensor]], bool], None]:
        """Return the launches for `count` experts. Between calls they hold no blob."""
        layout = self._layout
        gate_up, down = self._packings
        experts = Experts()
        overwrite = ctypes.c_int64()
        shape = DownShape(count, layout.gate_up_bytes, layout.hidden, layout.intermediate)
        gate_up_reads = [self._acts]
        down_reads = [self._h, self._weights]
        launch_gate_up = self._device.prepare(
            f"gate_up_token_{packing_suffix(gate_up)}",
            (4 * blocks_of(layout.intermediate), count, 1),
            _GATE_UP_THREADS,
            (experts, layout.hidden, layout.intermediate, self._acts, self._h),
            reads=gate_up_reads,
            writes=(self._h,),
        )
        launch_down = self._device.prepare(
            f"down_token_{packing_suffix(down)}",
            (tiles_of(layout.hidden), 1, 1),
            _DOWN_THREADS,
            (experts, shape, self._h, self._weights, overwrite, self._out),
            reads=down_reads,
            writes=(self._out,),
        )

        def run(blobs: Sequence[tuple[int, Tensor]], first: bool) -> None:
            experts.set(blobs)
            overwrite.value = first
            for launch, reads in ((launch_gate_up, gate_up_reads), (launch_down, down_reads)):
                constant = len(reads)
                reads += [blob for _, blob in blobs]
                launch()
                del reads[constant:]

        return run
