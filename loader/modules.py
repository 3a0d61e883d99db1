"""The modules that stand in a transformers Mixtral where packed weights are used."""

import torch
from torch import Tensor, nn

from formats.errors import MoeConvertError
from formats.expert import ExpertLayout
from formats.packing import Packing, tiles_of
from loader.backend import Backend
from loader.cache import ExpertSource


class PackedLinear(nn.Module):
    """A linear layer without bias whose weights stay packed: buffer `packed`, uint8 [tiles, tile_bytes]."""

    packed: Tensor

    def __init__(self, packing: Packing, rows: int, columns: int, backend: Backend) -> None:
        super().__init__()
        self.packing = packing
        self.out_features = rows
        self.in_features = columns
        self._backend = backend
        self.register_buffer("packed", torch.empty(tiles_of(rows), packing.tile_bytes(columns), dtype=torch.uint8))

    @property
    def backend_name(self) -> str:
        """Which backend computes it."""
        return self._backend.name

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype; computed in float32."""
        rows = x.reshape(-1, self.in_features).float()
        result = self._backend.linear(self.packed, self.packing, self.out_features, self.in_features, rows)
        return result.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, packing={self.packing.name}"


class CachedExperts(nn.Module):
    """All experts of a layer; their bytes come from the cache when tokens need them."""

    def __init__(self, layer: int, layouts: dict[int, ExpertLayout], cache: ExpertSource, backend: Backend) -> None:
        super().__init__()
        self.layer = layer
        self._layouts = layouts
        self._cache = cache
        self._backend = backend

    @property
    def cache(self) -> ExpertSource:
        """Where the bytes come from."""
        return self._cache

    @property
    def layout(self) -> ExpertLayout | None:
        """The layout of all experts, None if they have several."""
        kinds = set(self._layouts.values())
        return kinds.pop() if len(kinds) == 1 else None

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index int64 [T, k], top_k_weights [T, k] -> [T, H] in hidden_states' dtype.

        Computed and summed in float32, experts in ascending order whatever the cache holds, so that a cache of any size
        gives the same bits. Each expert is asked for once.
        """
        if hidden_states.device.type != "cpu":
            raise MoeConvertError(
                f"experts run on the CPU, the input is on {hidden_states.device}", "do not move the model"
            )
        x = hidden_states.float()
        weights = top_k_weights.float()
        out = torch.zeros_like(x)
        for experts in self._rounds(top_k_index):
            blobs = self._cache.get(self.layer, experts)
            self._backend.experts(blobs, self._layouts, x, top_k_index, weights, out)
        return out.to(hidden_states.dtype)

    def _rounds(self, index: Tensor) -> list[list[int]]:
        """The experts to use, in lists that fit the cache."""
        if index.shape[0] == 1:
            # By rank: the second choice becomes the most recently used (examples/tiny-mixtral/README.md).
            return [index[0].tolist()]
        used = torch.unique(index).tolist()
        return [used[i : i + self._cache.slots] for i in range(0, len(used), self._cache.slots)]

    def extra_repr(self) -> str:
        return f"layer={self.layer}, experts={len(self._layouts)}"
