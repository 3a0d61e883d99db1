"""How much a calibration pass takes at once, and the memory that this needs."""

from converter.calibration.calibration_text import WINDOW
from converter.calibration.layer_statistics import DOWN_BLOCK, rows_at_once
from formats.index import Architecture

WINDOWS_AT_ONCE = 4
"""In one run of a decoder layer."""
TOKENS_AT_ONCE = 1024
"""In a piece of one expert."""
_EXPERTS_AT_ONCE = 8
"""Whose outputs and moments are in memory until they are added, in the experts' order."""


def experts_at_once(width: int) -> int:
    """Return as many experts as have moments of the size of those of _EXPERTS_AT_ONCE in blocks of
    DOWN_BLOCK, at least one.
    """
    return max(1, _EXPERTS_AT_ONCE * DOWN_BLOCK // width)


def calibration_memory_bytes(
    architecture: Architecture, tokens: int, width: int
) -> tuple[int, int]:
    """Return the peak memory of a pass over `tokens` tokens: (the pass's, each worker's in
    addition); 0 for no tokens.

    T tokens, hidden size h, q = heads · head_dim, intermediate size I, E experts of which a token
    chooses k, blocks of w columns in down's statistics, n experts at once. The pass holds, in
    float32 unless said otherwise,

    - the stream and the experts' inputs: 2·T·h;
    - the layer's weights but for the experts': q, k, v and o of attention, at most 4·h·q;
    - moments: h² and q² of attention's inputs, h² of gate's and up's, I·w of down's;
    - and the larger of the inputs of attention's linears, T·(h + q), and what the experts need: the
      sum of their outputs, T·h; down's inputs, T·k·I in bfloat16; outputs of n experts, T·k·h·n /
      E; and their pieces' moments, I·w each.

    A worker holds the largest of a run of the layer on a few windows, slices of an expert with a
    piece's activations, factorizations of h² moments, and the correction of down.
    """
    if not tokens:
        return 0, 0
    a = architecture
    hidden, heads = a.hidden_size, a.num_attention_heads * a.head_dim
    inner, chosen, experts = a.intermediate_size, a.num_experts_per_tok, a.num_local_experts
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
    # Down's correction solves in float64; counted as blocks of float32.
    correction = 4 * 15 * inner * width
    return whole, max(layer_run, slices, factors, correction)
