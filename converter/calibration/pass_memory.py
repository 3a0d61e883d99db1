"""Step sizes of a calibration pass, and the memory that it needs."""

from converter.calibration.calibration_text import WINDOW
from converter.calibration.layer_statistics import DOWN_BLOCK, rows_at_once
from formats.index import Architecture

WINDOWS_AT_ONCE = 4
"""Windows in one run of a decoder layer."""
TOKENS_AT_ONCE = 1024
"""Tokens in a piece of one expert."""
_EXPERTS_AT_ONCE = 8
"""Experts whose outputs and moments wait in memory to be added in the experts' order."""


def experts_at_once(width: int) -> int:
    """Return the number of experts to compute at once, at least one, for blocks of `width` columns.

    Their moments need as much memory as those of _EXPERTS_AT_ONCE in blocks of DOWN_BLOCK.
    """
    return max(1, _EXPERTS_AT_ONCE * DOWN_BLOCK // width)


def calibration_memory_bytes(
    architecture: Architecture, tokens: int, width: int
) -> tuple[int, int]:
    """Return the peak memory of a pass over `tokens` tokens: of the pass, and of each worker.

    Both are 0 without tokens. T tokens, hidden size h, q = heads · head_dim, intermediate size I, E
    experts of which a token uses k, blocks of w columns in down's statistics, n experts at once.
    The pass holds, in float32 except where noted:

    - the stream and the experts' inputs: 2·T·h;
    - the layer's weights without experts: q, k, v and o of attention, at most 4·h·q;
    - moments: h² and q² for attention, h² for gate and up, I·w for down;
    - the larger of two: the inputs of attention's linears, T·(h + q), or the data of the experts:
      the sum of their outputs, T·h; inputs of down, T·k·I in bfloat16; outputs of n experts,
      T·k·h·n / E; moments of their pieces, I·w each.

    A worker holds the largest of four: a run of the layer on a few windows; slices of an expert
    with the activations of a piece; factorizations of h² moments; the correction of down.
    """
    if not tokens:
        return 0, 0
    a = architecture
    hidden = a.hidden_size
    heads = a.num_attention_heads * a.head_dim
    inner = a.intermediate_size
    chosen = a.num_experts_per_tok
    experts = a.num_local_experts
    at_once = min(experts_at_once(width), experts)
    pieces = at_once + at_once * chosen * tokens // (experts * TOKENS_AT_ONCE)
    linears = 4 * tokens * (hidden + heads)
    outputs = 4 * tokens * chosen * hidden * at_once // experts
    through_experts = (
        4 * tokens * hidden + 2 * tokens * chosen * inner + outputs + 4 * pieces * inner * width
    )
    moments = 4 * (2 * hidden**2 + heads**2 + inner * width)
    whole = 8 * tokens * hidden + 16 * hidden * heads + moments + max(linears, through_experts)
    layer_run = 4 * 6 * min(tokens, WINDOWS_AT_ONCE * WINDOW) * max(hidden, heads)
    piece = min(tokens, TOKENS_AT_ONCE)
    slices = 4 * (3 * rows_at_once(width) * hidden + piece * (inner + 2 * hidden))
    factors = 4 * 7 * hidden**2 + 4 * tokens * hidden
    # The correction of down solves in float64; 15 counts its blocks in float32.
    correction = 4 * 15 * inner * width
    return whole, max(layer_run, slices, factors, correction)
