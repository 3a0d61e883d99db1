"""The modules that stand in a model of transformers where packed weights are used."""

from typing import Any

import torch
from torch import Tensor, nn

from formats.errors import MoeConvertError
from formats.expert import ExpertLayout
from formats.packing import Packing, tiles_of
from loader.arithmetic import gradients
from loader.arithmetic.backend import Backend
from loader.arithmetic.expert_gradient import expert_gradients
from loader.experts.cache import ExpertSource
from loader.experts.prefetch import in_order, ranked
from loader.hf.modules.packed_weight import PackedWeight


class PackedLinear(nn.Linear):
    """A linear layer whose weights stay packed: buffer `packed`, uint8 [tiles, tile_bytes].

    An nn.Linear, so that PEFT and others take it for what it computes. Of nn.Linear's parameters it
    has at most `bias`.
    """

    packed: Tensor

    _is_hf_initialized = True
    """Tells transformers that there is no `weight` to give random values to."""

    def __init__(
        self, packing: Packing, rows: int, columns: int, backend: Backend, *, bias: bool = False
    ) -> None:
        """packed and bias [rows] are on the default device, and without values until a checkpoint
        is loaded.
        """
        # Not nn.Linear's, which makes a weight.
        nn.Module.__init__(self)
        self.packing = packing
        self.out_features = rows
        self.in_features = columns
        self._backend = backend
        self.register_buffer(
            "packed", torch.empty(tiles_of(rows), packing.tile_bytes(columns), dtype=torch.uint8)
        )
        self.register_parameter("bias", nn.Parameter(torch.empty(rows)) if bias else None)

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        """Shape and device; no values."""
        return PackedWeight(self.out_features, self.in_features, self.packed.device)

    @property
    def backend_name(self) -> str:
        """Which backend computes it."""
        return self._backend.name

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype; computed in float32."""
        # Not by attribute: torch's Module searches three dicts in Python for each.
        tiles: Any = self._buffers["packed"]
        bias = self._parameters["bias"]
        rows = x.reshape(-1, self.in_features).float()
        result = gradients.linear(
            self._backend, tiles, self.packing, self.out_features, self.in_features, rows
        )
        if bias is not None:
            result = result + bias
        return result.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, packing={self.packing.name}, "
            f"bias={self.bias is not None}"
        )


class CachedExperts(nn.Module):
    """All experts of a layer; their bytes come from the cache when tokens need them."""

    def __init__(
        self, layer: int, layouts: dict[int, ExpertLayout], cache: ExpertSource, backend: Backend
    ) -> None:
        super().__init__()
        self.layer = layer
        self._layouts = layouts
        self._cache = cache
        self._backend = backend

    @property
    def backend_name(self) -> str:
        """Which backend computes them."""
        return self._backend.name

    @property
    def cache(self) -> ExpertSource:
        """Where the bytes come from."""
        return self._cache

    @property
    def layouts(self) -> dict[int, ExpertLayout]:
        """The layout of each expert."""
        return self._layouts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index int64 [T, k], top_k_weights [T, k] -> [T, H] in
        hidden_states' dtype.

        Computed and summed in float32. Each token's sum is in ascending order of the experts, or,
        where it has two terms at most and the order changes no bit, in that of their arrival: a
        cache of any size gives the same bits.
        """
        inputs = hidden_states, top_k_index, top_k_weights
        return gradients.experts(self._backend, self._run, self._differentiate, *inputs)

    def _run(
        self, backend: Backend, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        here, there = hidden_states.device, backend.torch_device
        if here.type != there.type:
            raise MoeConvertError(
                f"experts run on {there}, the input is on {here}",
                "do not move the model; load it for another device",
            )
        # Of several GPUs, the layer's own.
        x, weights = (part.to(there, torch.float32) for part in (hidden_states, top_k_weights))
        index, guesses = self._chosen(hidden_states, top_k_index)
        out = torch.zeros_like(x)
        if len(x) == 1 and index.shape[1] <= self._cache.room(self.layer):
            # By rank: the second choice becomes the most recently used
            # (examples/tiny-mixtral/README.md).
            with self._cache.lease(self.layer, index[0].tolist()) as lease:
                self._cache.guess(self.layer + 1, guesses)
                backend.experts(lease.all(), self._layouts, x, index, weights, out)
        elif len(x) == 1:
            # The router was set to more experts than the cache was made for.
            for blobs in self._cache.stream(
                self.layer, _by_last_use(index), guesses, ascending=True
            ):
                ranks = [rank for rank, expert in enumerate(index[0].tolist()) if expert in blobs]
                backend.experts(blobs, self._layouts, x, index[:, ranks], weights[:, ranks], out)
        else:
            ascending = index.shape[1] > 2
            for blobs in self._cache.stream(
                self.layer, _by_last_use(index), guesses, ascending=ascending
            ):
                backend.experts(blobs, self._layouts, x, index, weights, out)
        return out.to(here, hidden_states.dtype)

    def _differentiate(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of hidden_states and top_k_weights, float32, for the result's gradient
        `grad` [T, H].

        Experts come from the cache again; sums are in the order of `forward`.
        """
        x, weights, grad = (part.float() for part in (hidden_states, top_k_weights, grad))
        x_grad, weights_grad = torch.zeros_like(x), torch.zeros_like(weights)
        ascending = top_k_index.shape[1] > 2
        for blobs in self._cache.stream(
            self.layer, _by_last_use(top_k_index), [], ascending=ascending
        ):
            for expert in sorted(blobs):
                token, rank = torch.where(top_k_index == expert)
                parts = x[token], weights[token, rank], grad[token]
                mine, weights_grad[token, rank] = expert_gradients(
                    self._layouts[expert], blobs[expert], *parts
                )
                x_grad.index_add_(0, token, mine)
        return x_grad, weights_grad

    def _chosen(self, hidden_states: Tensor, top_k_index: Tensor) -> tuple[Tensor, list[int]]:
        """The router's choice, on the CPU, and the guesses for the next layer: of a GPU in one
        copy, for which the host waits this one time in a layer.
        """
        found = self._cache.router_ahead(self.layer)
        if found is None:
            return top_k_index.cpu(), []
        router, guesses = found
        tokens, top_k = top_k_index.shape
        ahead = ranked(router, hidden_states, guesses if tokens == 1 else top_k)
        index, ahead = torch.cat([top_k_index, ahead], dim=1).cpu().tensor_split([top_k], dim=1)
        return index.contiguous(), in_order(ahead)

    def extra_repr(self) -> str:
        return f"layer={self.layer}, experts={len(self._layouts)}"


def _by_last_use(index: Tensor) -> list[int]:
    """The different experts of index [T, k], that of the last token's last rank at the end."""
    latest = dict.fromkeys(reversed(index.flatten().tolist()))
    return list(reversed(latest))
