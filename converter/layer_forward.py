"""The original's arithmetic, part by part, as transformers does it, with the weights read when they are used.

The residual stream, norms and the router are float32; products with weights are too, unless asked for otherwise. At
most one layer's attention, or two slices of one expert's matrices, is in memory, whatever the model's size.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from converter.names import ExpertTensor
from converter.source import Checkpoint
from converter.source_tensors import Weight

ROWS_AT_ONCE = 1024
"""Of an expert's matrix."""
VOCABULARY_AT_ONCE = 4096
"""Rows of the embeddings and of the head."""

Attention = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class LayerForward:
    """Gives the parts of the model in `checkpoint`; each reads its weights and keeps nothing of them afterwards."""

    def __init__(self, checkpoint: Checkpoint, products: torch.dtype = torch.float32) -> None:
        """`products`: in what the inputs of attention's and the experts' matrices, and these, are multiplied."""
        from transformers import MixtralConfig

        self._checkpoint = checkpoint
        self._products = products
        # Of its own: from_dict of transformers 5.3 adds fields to its argument.
        self._config = MixtralConfig.from_dict(copy.deepcopy(checkpoint.config))
        self._config._attn_implementation = "sdpa"

    def embed(self, tokens: Tensor, out: Tensor) -> None:
        """Writes the embeddings of `tokens` (int64 [n]) to `out`, float32 [n, hidden]."""
        for begin, rows in self._slices(self._checkpoint.trunk["model.embed_tokens.weight"], VOCABULARY_AT_ONCE):
            here = ((tokens >= begin) & (tokens < begin + len(rows))).nonzero()[:, 0]
            out[here] = rows[tokens[here] - begin]

    def norm(self, name: str) -> Any:
        """The RMS norm whose weight is the tensor `name`."""
        from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

        with torch.device("meta"):
            norm = MixtralRMSNorm(self._config.hidden_size, eps=self._config.rms_norm_eps)
        return self._filled(norm, name)

    def router(self, layer: int) -> Any:
        """The router of `layer`: of [n, hidden] it gives (…, weights float32 [n, k], experts int64 [n, k])."""
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

        with torch.device("meta"):
            router = MixtralTopKRouter(self._config)
        return self._filled(router, f"model.layers.{layer}.mlp.gate.weight")

    def attention(self, layer: int, window: int) -> Attention:
        """The attention block of `layer`: of the residual stream of windows, float32 [n, window, hidden], it gives
        (the stream after it, the inputs of q, k and v, the inputs of the output projection)."""
        from transformers.models.mixtral import modeling_mixtral as mixtral

        prefix = f"model.layers.{layer}"
        with torch.device("meta"):
            attention = mixtral.MixtralAttention(self._config, layer)
        for name in ("q_proj", "k_proj", "v_proj"):
            self._filled(getattr(attention, name), f"{prefix}.self_attn.{name}.weight", self._products)
        output = self._filled(attention.o_proj, f"{prefix}.self_attn.o_proj.weight", self._products)
        # So that what it is given is what comes out.
        attention.o_proj = nn.Identity()
        # A module begins in training mode, with dropout.
        attention.eval()
        norm = self.norm(f"{prefix}.input_layernorm.weight")
        arguments = layer_arguments(self._config, window, self._products)

        def run(stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            normed = norm(stream)
            mixed, _ = attention(hidden_states=normed.to(self._products), **arguments)
            return stream + output(mixed), normed, mixed.float()

        return run

    def expert(
        self,
        layer: int,
        expert: int,
        x: Tensor,
        visit: Callable[[int, Tensor], None] | None = None,
        rows_at_once: int | None = None,
    ) -> Tensor:
        """An expert's output, float32 [n, hidden], of its inputs x (float32 [n, hidden]), not yet weighted.

        `visit` is called with the first column, and the columns from there on, of every slice of down's inputs:
        `rows_at_once` of them, if that is given.
        """
        gate, up, down = (self._checkpoint.experts[ExpertTensor(layer, expert, p)] for p in ("gate", "up", "down"))
        x = x.to(self._products)
        inner = torch.empty(len(x), gate.shape[0], dtype=self._products)
        for begin, gate_rows in self._slices(gate, rows_at_once or ROWS_AT_ONCE, self._products):
            end = begin + len(gate_rows)
            up_rows = self._read(up, begin, end).to(self._products)
            part = inner_activations(x, gate_rows, up_rows)
            inner[:, begin:end] = part
            if visit:
                visit(begin, part)
        result = torch.empty(x.shape)
        for begin, rows in self._slices(down, ROWS_AT_ONCE, self._products):
            result[:, begin : begin + len(rows)] = inner @ rows.T
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [n, vocabulary] of the residual stream after the last layer, float32 [n, hidden]."""
        trunk = self._checkpoint.trunk
        head = trunk.get("lm_head.weight", trunk["model.embed_tokens.weight"])
        normed = self.norm("model.norm.weight")(hidden)
        result = torch.empty(len(hidden), head.shape[0])
        for begin, rows in self._slices(head, VOCABULARY_AT_ONCE):
            result[:, begin : begin + len(rows)] = normed @ rows.T
        return result

    def _slices(self, weight: Weight, step: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows as `dtype`) of a matrix, in order."""
        for begin in range(0, weight.shape[0], step):
            end = min(begin + step, weight.shape[0])
            yield begin, self._read(weight, begin, end).to(dtype)

    def _read(self, weight: Weight, begin: int, end: int) -> Tensor:
        """Rows of `weight` in its own dtype; SourceError naming the place where one is not finite."""
        rows = self._checkpoint.read_rows(weight, begin, end)
        self._checkpoint.check_finite(weight, begin, rows)
        return rows

    def _filled(self, module: Any, name: str, dtype: torch.dtype = torch.float32) -> Any:
        weight = self._checkpoint.trunk[name]
        values = self._read(weight, 0, weight.shape[0]).to(dtype)
        module.weight = nn.Parameter(values, requires_grad=False)
        return module.eval()


def layer_arguments(config: Any, window: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return what transformers' model passes to its layers besides the activations, for windows of `window` tokens: the
    attention mask, the rotary embedding. Asked of the model itself, which alone knows its rules for sliding windows and
    scaled positions."""
    from transformers.models.mixtral.modeling_mixtral import MixtralModel, MixtralRotaryEmbedding

    config = copy.deepcopy(config)
    config.num_hidden_layers = 0
    with torch.device("meta"):
        model = MixtralModel(config)
    model.rotary_emb = MixtralRotaryEmbedding(config)
    model.norm = nn.Identity()
    layer = _ArgumentRecorder()
    model.layers.append(layer)
    config.num_hidden_layers = 1
    # Of the activations the model looks at no more than the number and the dtype.
    model.eval()(inputs_embeds=torch.empty(1, window, 1, dtype=dtype), use_cache=False)
    return layer.arguments


class _ArgumentRecorder(nn.Module):
    """A layer that changes nothing and keeps its arguments."""

    arguments: dict[str, Any]

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden_states


def inner_activations(x: Tensor, gate_rows: Tensor, up_rows: Tensor) -> Tensor:
    """Some of down's inputs, float32 [n, rows], of an expert's inputs x [n, hidden] and rows of gate and up, all of one
    dtype."""
    return functional.silu((x @ gate_rows.T).float()).mul_(x @ up_rows.T)


def fast_products(checkpoint: Checkpoint) -> torch.dtype:
    """bfloat16 where the experts are stored so and the processor multiplies it (twice as fast); else float32."""
    stored = {weight.dtype for weight in checkpoint.experts.values()}
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if stored == {"BF16"} and supported() else torch.float32
