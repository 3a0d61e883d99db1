"""Modules over packed weights: linear layers of the trunk, and the experts of a layer."""

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
from loader.hf.modules.packed_weight import MERGE_HINT, PackedWeight


class PackedLinear(nn.Linear):
    """A linear layer whose weights stay packed: buffer `packed`, uint8 [tiles, tile_bytes].

    It is an nn.Linear, so that PEFT and others recognize it, but it has no parameter `weight`.
    """

    packed: Tensor

    def __init__(
        self, packing: Packing, rows: int, columns: int, backend: Backend, *, bias: bool = False
    ) -> None:
        """Allocate `packed`, and bias [rows] if wanted, uninitialized on the default device."""
        # nn.Linear's own constructor would allocate a weight.
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
        """Shape and device of the matrix [rows, columns]; every operation on it raises an error."""
        return PackedWeight(self.out_features, self.in_features, self.packed.device)

    @property
    def backend_name(self) -> str:
        """Name of the backend that computes the product."""
        return self._backend.name

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out_features] in x's dtype for x [..., in_features]; computes in float32."""
        # Attribute access is slower: torch's Module searches three dicts in Python.
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
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" packing={self.packing.name}, bias={self.bias is not None}"
        )


class CachedExperts(nn.Module):
    """All experts of a layer. Their bytes come from the expert cache when a token needs them."""

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
        """Name of the backend that computes the experts."""
        return self._backend.name

    @property
    def cache(self) -> ExpertSource:
        """The source of the experts' bytes."""
        return self._cache

    @property
    def layouts(self) -> dict[int, ExpertLayout]:
        """Expert number -> layout of its bytes."""
        return self._layouts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, [T, hidden] in hidden_states' dtype.

        hidden_states: [T, hidden]. top_k_index: int64 [T, k]. top_k_weights: [T, k].

        Computes and sums in float32. A token's experts are summed in ascending order, so a cache of
        any size gives the same bits. With k <= 2 the order changes no bit; they are summed as they
        arrive.
        """
        inputs = hidden_states, top_k_index, top_k_weights
        return gradients.experts(self._backend, self._run, self._differentiate, *inputs)

    def _run(
        self, backend: Backend, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        device = backend.torch_device
        if hidden_states.device.type != device.type:
            raise MoeConvertError(
                f"the experts of layer {self.layer} are on {device}, their input is on"
                f" {hidden_states.device}",
                "do not move the model: load it with loader.from_pretrained(folder, device=...)",
            )
        # With several GPUs, `device` is the one that has this layer.
        x = hidden_states.to(device, torch.float32)
        weights = top_k_weights.to(device, torch.float32)
        index, guesses = self._chosen(hidden_states, top_k_index)
        out = torch.zeros_like(x)
        if len(x) == 1 and index.shape[1] <= self._cache.room(self.layer):
            # In order of rank: the second choice becomes the most recently used expert, as in the
            # measurements of examples/tiny-mixtral/README.md.
            with self._cache.lease(self.layer, index[0].tolist()) as lease:
                self._cache.guess(self.layer + 1, guesses)
                backend.experts(lease.all(), self._layouts, x, index, weights, out)
        elif len(x) == 1:
            # The router chooses more experts than the cache holds: its top_k was raised.
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
        return out.to(hidden_states.device, hidden_states.dtype)

    def _differentiate(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of hidden_states and top_k_weights, float32.

        grad: the result's gradient [T, hidden]. Reads the experts from the cache again and sums in
        the order of `forward`.
        """
        x = hidden_states.float()
        weights = top_k_weights.float()
        grad = grad.float()
        x_grad = torch.zeros_like(x)
        weights_grad = torch.zeros_like(weights)
        ascending = top_k_index.shape[1] > 2
        for blobs in self._cache.stream(
            self.layer, _by_last_use(top_k_index), [], ascending=ascending
        ):
            for expert in sorted(blobs):
                token, rank = torch.where(top_k_index == expert)
                expert_x_grad, weights_grad[token, rank] = expert_gradients(
                    self._layouts[expert],
                    blobs[expert],
                    x[token],
                    weights[token, rank],
                    grad[token],
                )
                x_grad.index_add_(0, token, expert_x_grad)
        return x_grad, weights_grad

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Refuse weights for the experts: PEFT ignores those that have no place."""
        if name := next((name for name in state_dict if name.startswith(prefix)), None):
            raise MoeConvertError(f"{name}: packed experts take no weights", MERGE_HINT)

    def _chosen(self, hidden_states: Tensor, top_k_index: Tensor) -> tuple[Tensor, list[int]]:
        """Return the router's choice [T, k] on the CPU, and the guesses for the next layer.

        Copies both from a GPU at once: the host waits for the GPU only once a layer.
        """
        next_router = self._cache.router_ahead(self.layer)
        if next_router is None:
            return top_k_index.cpu(), []
        router, guesses = next_router
        tokens, top_k = top_k_index.shape
        ahead = ranked(router, hidden_states, guesses if tokens == 1 else top_k)
        index, ahead = torch.cat([top_k_index, ahead], dim=1).cpu().tensor_split([top_k], dim=1)
        return index.contiguous(), in_order(ahead)

    def extra_repr(self) -> str:
        return f"layer={self.layer}, experts={len(self._layouts)}"


def _by_last_use(index: Tensor) -> list[int]:
    """Return the distinct experts of index [T, k], ordered by their last use.

    The last choice of the last token is at the end.
    """
    latest = dict.fromkeys(reversed(index.flatten().tolist()))
    return list(reversed(latest))
