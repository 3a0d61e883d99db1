"""The section of a model card on the recipe: bits of each part, calibration, source, command."""

from collections.abc import Iterable, Iterator

from converter.publish.card_markdown import block, code
from converter.publish.card_memory import expert_entries
from converter.publish.recipe_command import CALIBRATION_TEXT, convert_line
from converter.recipe.recipe_options import RecipeOptions
from formats.errors import RecipeError
from formats.index import Index
from formats.labels import to_label
from formats.packing import PACKINGS, Packing, packing_named
from formats.trunk import ATTENTION

_HEAD = ("lm_head",)
_UNREADABLE = "recorded in a form that this release of moe-convert cannot read"
_CALIBRATION = {
    "builtin": "text that moe-convert ships, and random tokens",
    "file": "a text of the person who converted it, and random tokens",
    "random": "random tokens",
}
_SOLVERS = {
    "feedback": "later columns compensate the rounding errors of earlier ones (GPTQ), weighted by"
    " the calibration",
    "refit": "scales fitted to the weights by least squares",
    "hqq": "half-quadratic quantization (HQQ)",
    "hqq-package": "half-quadratic quantization (HQQ)",
}


def recipe_lines(index: Index) -> Iterator[str]:
    """Yield the recipe in words, and the command that made the model."""
    recipe = index.recipe
    source = index.source
    entries = expert_entries(index)
    yield "| part | stored as |"
    yield "|---|---|"
    for part, packings in (
        ("gate and up of the experts", {entry.gate_up for entry in entries}),
        ("down of the experts", {entry.down for entry in entries}),
        ("attention", _trunk_packings(index, ATTENTION)),
        ("output head", _trunk_packings(index, _HEAD)),
    ):
        words = "; ".join(map(_packing_words, sorted(packings)))
        yield f"| {part} | {words or 'as in the source'} |"
    yield "| router, norms, embeddings | as in the source |"
    yield ""
    yield f"- Recipe: {code(recipe.name)}"
    if recipe.solver != "none":
        method = _SOLVERS.get(recipe.solver)
        yield f"- Rounding: {code(recipe.solver)}{f', {method}' if method else ''}"
        yield f"- Calibration: {_calibration(index)}"
    yield f"- Source: {_origin(source.name, source.revision)}"
    for adapter in index.source.adapters:
        yield f"- Adapter, merged into the source: {_origin(adapter.name, adapter.revision)}"
    yield f"- Written by {code(index.producer.name)} {code(index.producer.version)}"
    yield ""
    yield from _command_lines(index)


def is_quantized(index: Index) -> bool:
    """True if some weights are packed in fewer bits than the source's."""
    return bool(index.trunk.packed) or has_packed_experts(index)


def has_packed_experts(index: Index) -> bool:
    """True if some expert is quantized."""
    return any(e.gate_up in PACKINGS or e.down in PACKINGS for e in expert_entries(index))


def expert_bits(index: Index) -> float:
    """Return the stored bits per weight of the experts."""
    entries = expert_entries(index)
    weights = 3 * index.architecture.hidden_size * index.architecture.intermediate_size
    return 8 * sum(entry.length for entry in entries) / (len(entries) * weights)


def attention_bits(index: Index) -> float:
    """Return the bits per weight of packed attention matrices; 0 if none is packed."""
    n_bytes = weights = 0
    for module, linear in index.trunk.packed.items():
        if module.rpartition(".")[2] in ATTENTION:
            packing = packing_named(linear.packing, module)
            n_bytes += packing.matrix_bytes(linear.rows, linear.columns)
            weights += linear.rows * linear.columns
    return 8 * n_bytes / max(1, weights)


def _command_lines(index: Index) -> Iterator[str]:
    try:
        command = to_label(convert_line(index))
    except RecipeError:
        yield f"The options of the recipe are {_UNREADABLE}."
        return
    yield "The command that made it:"
    yield ""
    yield from block("bash", command)
    if CALIBRATION_TEXT in command.split():
        yield ""
        yield f"`{CALIBRATION_TEXT}` stands for the calibration text, which is not published here."


def _origin(name: str, revision: str | None) -> str:
    return f"{code(name)}, {'a local folder' if revision is None else f'commit {code(revision)}'}"


def _trunk_packings(index: Index, names: Iterable[str]) -> set[str]:
    packed = index.trunk.packed.items()
    return {linear.packing for module, linear in packed if module.rpartition(".")[2] in names}


def _packing_words(name: str) -> str:
    packing = packing_named(name, "packing")
    if not isinstance(packing, Packing):
        return f"{code(name)}, as in the source"
    return (
        f"{packing.nbits} bits in groups of {packing.group_size}, {packing.scale_bits}-bit scales"
        f" ({code(name)})"
    )


def _calibration(index: Index) -> str:
    try:
        calibration = RecipeOptions.read(index.recipe.options).calibration
    except RecipeError:
        return _UNREADABLE
    if calibration is None:
        return "none"
    return f"{calibration.tokens} tokens: {_CALIBRATION[calibration.kind]}"
