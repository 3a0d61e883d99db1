"""The calibration pass: tokens go through the original model layer by layer, and each linear's inputs are summed up.

In memory are one layer's attention, a slice of one expert's weights per worker, and the activations of the tokens,
whatever the model's size. Everything is computed in float32, in pieces whose sizes are fixed, by one thread each: the
same numbers for any number of workers, and after any interruption.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from converter.calibration_text import CalibrationTokens
from converter.names import ExpertTensor
from converter.source import Checkpoint, Weight
from converter.statistics import InputStatistics, RunAll, block_moments, effective_tokens, second_moment
from formats.errors import SourceError
from formats.index import Architecture
from formats.writer import write_file

VERSION = 1
"""Of everything here that the statistics depend on: part of a conversion's fingerprint."""

STATE_FOLDER = ".moe-convert.calibration"
DOWN_BLOCK = 256
"""Columns of a block of down's statistics; full width would take 822 MB an expert of 8x7B."""
PRIOR_SHARE = 0.25
"""An expert's statistics are shrunk towards its layer's by this many tokens per column of a block."""

_WINDOWS_AT_ONCE = 4
_TOKENS_AT_ONCE = 4096
_ROWS_AT_ONCE = 1024  # a multiple of DOWN_BLOCK
_STATE = "state.safetensors"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _ExpertInputs:
    """What reached one expert: which tokens (int64 [n]), and the sums of its down inputs' moments."""

    tokens: Tensor
    down: Tensor


@dataclass(frozen=True)
class _Layer:
    """The statistics of one layer, as far as they are not computed from `inputs` when an expert's turn comes."""

    linears: dict[str, InputStatistics]
    inputs: Tensor
    experts: list[_ExpertInputs]
    gate_up: InputStatistics
    down: InputStatistics


class CalibrationPass:
    """Statistics for one layer after the other, in ascending order.

    `prepare(layer)`, then from any thread `linear` and `expert`, then `finish(layer)`, which stores the activations in
    `folder` for a resume. `identity` is what they must have been computed from. run_all runs tasks on the workers.
    """

    def __init__(
        self, checkpoint: Checkpoint, tokens: CalibrationTokens, folder: Path, identity: Any, run_all: RunAll
    ) -> None:
        from transformers import MixtralConfig

        self._checkpoint = checkpoint
        self._tokens = tokens
        self._folder = folder / STATE_FOLDER
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._run_all = run_all
        self._config = MixtralConfig.from_dict(checkpoint.config)
        self._config._attn_implementation = "sdpa"
        self._weights = tokens.weights.repeat_interleave(tokens.windows.shape[1])
        self._position = -1
        self._activations: Tensor | None = None
        self._after: Tensor | None = None
        self._layer: _Layer | None = None
        self._head: InputStatistics | None = None

    def prepare(self, layer: int) -> None:
        """Gathers the statistics of `layer`, after passing through the layers before it where need be."""
        if self._activations is None or self._position > layer:
            self._restore(layer)
        while self._position < layer:
            self._after = self._forward(self._position, gather=False)
            self._step()
        self._after = self._forward(layer, gather=True)

    def finish(self, layer: int) -> None:
        """Everything of `layer` is quantized: forgets its statistics and stores where the pass stands."""
        if self._position != layer or self._after is None:
            return
        self._step()
        assert self._activations is not None
        self._folder.mkdir(exist_ok=True)
        metadata = {"layer": str(self._position), "identity": self._identity}
        write_file(self._folder / _STATE, safetensors.torch.save({"activations": self._activations}, metadata))

    def prepare_head(self) -> None:
        """Gathers the statistics of the output head."""
        last = self._checkpoint.architecture.num_hidden_layers
        if self._activations is None or self._position > last:
            self._restore(last)
        while self._position < last:
            self._after = self._forward(self._position, gather=False)
            self._step()
        assert self._activations is not None
        norm = self._norm("model.norm.weight")
        self._head = self._full("the output head", norm(self._activations).flatten(0, 1))

    def linear(self, module: str) -> InputStatistics:
        """Of the trunk's matrix `module`."""
        if module == "lm_head":
            assert self._head
            return self._head
        assert self._layer
        return self._layer.linears[module.rpartition(".")[2]]

    def expert(self, expert: int) -> tuple[InputStatistics, InputStatistics, int]:
        """(of gate and up, of down, how many tokens reached it) of an expert of the prepared layer."""
        layer = self._layer
        assert layer
        reached = layer.experts[expert]
        weights = self._weights[reached.tokens]
        count = len(weights)
        effective = effective_tokens(weights)
        gate_up, down = layer.gate_up, layer.down
        if count:
            total = float(weights.double().sum())
            moment = second_moment(layer.inputs[reached.tokens], weights, _one_by_one) / total
            own = InputStatistics(moment[None], effective)
            gate_up = own.shrunk(gate_up, PRIOR_SHARE * moment.shape[0])
            own = InputStatistics(reached.down / total, effective)
            down = own.shrunk(down, PRIOR_SHARE * DOWN_BLOCK)
        return gate_up, down, count

    def _step(self) -> None:
        self._activations, self._after, self._layer = self._after, None, None
        self._position += 1

    def _restore(self, layer: int) -> None:
        """The stored activations, if they stand at or before `layer`; else those of the embeddings."""
        shape = (*self._tokens.windows.shape, self._checkpoint.architecture.hidden_size)
        try:
            with safetensors.safe_open(self._folder / _STATE, "pt") as file:
                metadata = file.metadata() or {}
                stored = int(metadata.get("layer", -1))
                if metadata.get("identity") == self._identity and 0 <= stored <= layer:
                    activations = file.get_tensor("activations")
                    if tuple(activations.shape) == shape and activations.dtype == torch.float32:
                        self._activations, self._position = activations, stored
                        return
        except (OSError, ValueError, safetensors.SafetensorError):
            _log.info("no calibration state to go on from: passing through the layers again")
        self._activations, self._position = self._embed(), 0

    def _embed(self) -> Tensor:
        weight = self._checkpoint.trunk["model.embed_tokens.weight"]
        windows = self._tokens.windows
        result = torch.empty(*windows.shape, weight.shape[1])
        wanted = windows.flatten()
        flat = result.flatten(0, 1)
        for begin in range(0, weight.shape[0], _ROWS_AT_ONCE * 4):
            end = min(begin + _ROWS_AT_ONCE * 4, weight.shape[0])
            here = (wanted >= begin) & (wanted < end)
            flat[here] = self._checkpoint.read_rows(weight, begin, end)[wanted[here] - begin].float()
        return result

    def _forward(self, layer: int, *, gather: bool) -> Tensor:
        """The activations after `layer`; with `gather`, also sets its statistics."""
        _log.info("calibration: layer %d", layer)
        assert self._activations is not None
        prefix = f"model.layers.{layer}"
        residual, linears = self._attention(prefix, layer, gather)
        self._check(residual, f"layer {layer}: after attention")
        norm, router = self._norm(f"{prefix}.post_attention_layernorm.weight"), self._router(prefix)
        inputs = norm(residual).flatten(0, 1)
        *_, scores, chosen = router(inputs)
        reached = [torch.where(chosen == e) for e in range(self._checkpoint.architecture.num_local_experts)]
        results = self._run_all(
            [partial(self._expert, layer, e, inputs, tokens, gather) for e, (tokens, _) in enumerate(reached)]
        )
        after = residual.flatten(0, 1)
        for (tokens, place), (output, _) in zip(reached, results, strict=True):
            after.index_add_(0, tokens, output * scores[tokens, place, None])
        after = after.view_as(residual)
        self._check(after, f"layer {layer}: after its experts")
        if gather:
            experts = [_ExpertInputs(tokens, down) for (tokens, _), (_, down) in zip(reached, results, strict=True)]
            weight = sum(float(self._weights[e.tokens].double().sum()) for e in experts)
            pooled = torch.stack([e.down for e in experts]).sum(0) / weight
            effective = effective_tokens(self._weights)
            self._layer = _Layer(
                linears, inputs, experts,
                gate_up=self._full(f"layer {layer}", inputs), down=InputStatistics(pooled, effective),
            )  # fmt: skip
        return after

    def _attention(self, prefix: str, layer: int, gather: bool) -> tuple[Tensor, dict[str, InputStatistics]]:
        """The residual stream after attention, and the statistics of its projections."""
        from transformers.models.mixtral import modeling_mixtral as mixtral

        assert self._activations is not None
        with torch.device("meta"):
            attention = mixtral.MixtralAttention(self._config, layer)
        for name in ("q_proj", "k_proj", "v_proj"):
            self._fill(getattr(attention, name), f"{prefix}.self_attn.{name}.weight")
        output = self._fill(attention.o_proj, f"{prefix}.self_attn.o_proj.weight")
        # So that what it is given is what comes out, and can be gathered.
        attention.o_proj = torch.nn.Identity()
        norm = self._norm(f"{prefix}.input_layernorm.weight")
        activations = self._activations
        positions = mixtral.MixtralRotaryEmbedding(self._config)(
            activations[:1], torch.arange(activations.shape[1])[None]
        )

        def run(begin: int) -> tuple[Tensor, Tensor, Tensor]:
            part = activations[begin : begin + _WINDOWS_AT_ONCE]
            normed = norm(part)
            mixed, _ = attention(hidden_states=normed, position_embeddings=positions, attention_mask=None)
            return part + output(mixed), normed, mixed

        begins = range(0, len(activations), _WINDOWS_AT_ONCE)
        results = self._run_all([partial(run, begin) for begin in begins])
        residual = torch.cat([r for r, _, _ in results])
        if not gather:
            return residual, {}
        shared = self._full(f"layer {layer}, attention", torch.cat([n for _, n, _ in results]).flatten(0, 1))
        own = self._full(f"layer {layer}, attention's output", torch.cat([m for _, _, m in results]).flatten(0, 1))
        return residual, {"q_proj": shared, "k_proj": shared, "v_proj": shared, "o_proj": own}

    def _expert(self, layer: int, expert: int, inputs: Tensor, tokens: Tensor, gather: bool) -> tuple[Tensor, Tensor]:
        """One expert's outputs [n, hidden] for `tokens`, and the sums of its down inputs' moments."""
        a = self._checkpoint.architecture
        gate, up, down = (self._checkpoint.experts[ExpertTensor(layer, expert, p)] for p in ("gate", "up", "down"))
        outputs = torch.empty(len(tokens), a.hidden_size)
        blocks = -(-a.intermediate_size // DOWN_BLOCK)
        moments = torch.zeros(blocks, DOWN_BLOCK, DOWN_BLOCK)
        for begin in range(0, len(tokens), _TOKENS_AT_ONCE):
            part = tokens[begin : begin + _TOKENS_AT_ONCE]
            x, weights = inputs[part], self._weights[part]
            h = torch.empty(len(part), a.intermediate_size)
            for row, gate_rows in self._slices(gate):
                end = row + len(gate_rows)
                up_rows = self._checkpoint.read_rows(up, row, end).float()
                torch.mul(torch.nn.functional.silu(x @ gate_rows.T), x @ up_rows.T, out=h[:, row:end])
                if gather:
                    first = row // DOWN_BLOCK
                    found = block_moments(h[:, row:end], weights, DOWN_BLOCK)
                    moments[first : first + len(found)] += found
            for row, rows in self._slices(down):
                outputs[begin : begin + len(part), row : row + len(rows)] = h @ rows.T
        return outputs, moments

    def _slices(self, weight: Weight) -> Any:
        """(first row, rows as float32) of a matrix, in order."""
        for begin in range(0, weight.shape[0], _ROWS_AT_ONCE):
            end = min(begin + _ROWS_AT_ONCE, weight.shape[0])
            yield begin, self._checkpoint.read_rows(weight, begin, end).float()

    def _full(self, what: str, x: Tensor) -> InputStatistics:
        moment = second_moment(x, self._weights, self._run_all) / self._weights.double().sum()
        self._check(moment, what)
        return InputStatistics(moment.float()[None], effective_tokens(self._weights))

    def _norm(self, name: str) -> Any:
        from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

        with torch.device("meta"):
            norm = MixtralRMSNorm(self._config.hidden_size, eps=self._config.rms_norm_eps)
        return self._fill(norm, name)

    def _router(self, prefix: str) -> Any:
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

        with torch.device("meta"):
            router = MixtralTopKRouter(self._config)
        return self._fill(router, f"{prefix}.mlp.gate.weight")

    def _fill(self, module: Any, name: str) -> Any:
        weight = self._checkpoint.trunk[name]
        values = self._checkpoint.read_rows(weight, 0, weight.shape[0]).float()
        module.weight = torch.nn.Parameter(values, requires_grad=False)
        return module.eval()

    def _check(self, values: Tensor, where: str) -> None:
        if not bool(torch.isfinite(values).all()):
            raise SourceError(
                f"{self._checkpoint.folder}: {where}: the calibration's activations are infinite or NaN",
                "the checkpoint is damaged or its training diverged; --calibrate none --solver refit needs no"
                " activations",
            )


def calibration_memory_bytes(architecture: Architecture, tokens: int) -> tuple[int, int]:
    """Peak memory, estimated: (of the pass, of each worker in addition); nothing for no tokens."""
    if not tokens:
        return 0, 0
    a = architecture
    hidden, attention = a.hidden_size, a.num_attention_heads * a.head_dim
    activations = tokens * 4 * (5 * hidden + 2 * attention + a.num_experts_per_tok * hidden)
    moments = 4 * (2 * hidden**2 + attention**2 + (a.num_local_experts + 2) * a.intermediate_size * DOWN_BLOCK)
    weights = 4 * hidden * attention * 4
    slices = 4 * (3 * _ROWS_AT_ONCE * hidden + min(tokens, _TOKENS_AT_ONCE) * (a.intermediate_size + 2 * hidden))
    factors = 4 * 4 * hidden**2 + tokens * hidden * 4
    return activations + moments + weights, max(slices, factors)


def discard_state(folder: Path) -> None:
    """Removes the stored state of a calibration from an out folder."""
    shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)


def _one_by_one(tasks: Any) -> list[Any]:
    return [task() for task in tasks]
