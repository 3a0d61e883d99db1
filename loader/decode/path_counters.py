"""Counters of tokens by path, and the reasons why a token takes transformers' path."""

import logging
import threading
from collections import Counter
from enum import StrEnum

from loader.experts.stats import PathStats
from loader.hf.modules.packed_weight import MERGE_HINT

_log = logging.getLogger(__name__)


class Reason(StrEnum):
    """Reasons why transformers' code computed a token: the keys of `PathStats.reasons`."""

    PROMPT = "prompt"
    GRADIENTS = "gradients"
    AUTOCAST = "autocast"
    TRAINING = "training mode"
    HOOKS = "hooks"
    REPLACED = "replaced module"
    ADAPTER = "adapter"
    OUTPUTS = "other outputs"
    EMBEDDINGS = "inputs_embeds"
    KV_CACHE = "kv cache"
    POSITIONS = "mask or positions"
    WINDOW = "sliding window"
    ATTENTION = "attention implementation"
    ROTARY = "rotary embedding"
    WEIGHTS = "weights"
    EXPERTS = "experts per token"
    KERNELS = "kernels"
    DEVICES = "several devices"
    FAMILY = "model type"
    FAILED = "decoder failed"


_NEXT_STEP = {
    Reason.GRADIENTS: "call the model under torch.no_grad() or torch.inference_mode()",
    Reason.AUTOCAST: "load the model with the dtype that you need, instead of autocast",
    Reason.TRAINING: "call model.eval()",
    Reason.HOOKS: "remove the hook, or the replaced forward, where you do not need it",
    Reason.REPLACED: "load the model again to use its own modules",
    Reason.ADAPTER: f"for the decoder's speed, {MERGE_HINT}",
    Reason.OUTPUTS: "ask for nothing but logits where speed counts",
    Reason.EMBEDDINGS: "pass input_ids",
    Reason.KV_CACHE: "use transformers' DynamicCache",
    Reason.POSITIONS: "pass the next token of one sequence without padding",
    Reason.ATTENTION: 'load the model with attn_implementation="sdpa"',
    Reason.WEIGHTS: "convert attention to 4 bits (--attn-bits 4),"
    " and keep the dtype of all weights equal",
    Reason.EXPERTS: "give a larger ram_cache or gpu_cache, or use fewer experts per token",
    Reason.KERNELS: 'load the model with kernels="auto"; moe-convert env says which kernels run',
    Reason.DEVICES: "load the model on one GPU",
}


class LeaveDecoder(Exception):
    """Leaves a token to transformers' code.

    reason: why. detail: the module, argument or value that caused it.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class PathCounters:
    """Counts a model's tokens by path. Thread safe.

    Each reason except `prompt` is logged once for each model, as a warning with the next step.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._decoder = 0
        self._reasons: Counter[Reason] = Counter()
        self._logged: set[Reason] = {Reason.PROMPT}

    def count_decoded(self) -> None:
        """Count one token of the decoder."""
        with self._lock:
            self._decoder += 1

    def count_left(self, left: LeaveDecoder, tokens: int) -> None:
        """Count `tokens` that transformers' code computes; log a reason when it comes first."""
        with self._lock:
            self._reasons[left.reason] += tokens
            is_first = left.reason not in self._logged
            self._logged.add(left.reason)
        if is_first:
            _log.warning("%s", _message(left))

    def stats(self) -> PathStats:
        """Return a snapshot of the counters."""
        with self._lock:
            reasons = {reason.value: count for reason, count in self._reasons.items() if count}
            return PathStats(self._decoder, 0, sum(reasons.values()), reasons)

    def reset(self) -> None:
        """Set the counters to zero."""
        with self._lock:
            self._decoder = 0
            self._reasons.clear()


def _message(left: LeaveDecoder) -> str:
    cause = f"{left.reason}: {left.detail}" if left.detail else left.reason
    step = f"; {_NEXT_STEP[left.reason]}" if left.reason in _NEXT_STEP else ""
    return f"single tokens take transformers' code, which is slower ({cause}){step}"
