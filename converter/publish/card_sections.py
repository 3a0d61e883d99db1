"""The sections of a model card, as lines of Markdown: sizes, memory, quality, origin."""

from collections.abc import Iterator

from converter.recipe.recipe_options import Calibration
from formats.errors import RecipeError
from formats.index import ExpertEntry, Index, Recipe
from formats.labels import to_label
from formats.quality import Comparison, Quality
from formats.sizes import format_size

KV_CONTEXT = 4096
"""Positions for which the memory table counts keys and values."""
_MEMORY_ROWS = 8
"""About the number of rows of the memory table; a layer may have 128 experts."""
_KV_ITEM_BYTES = 2
_ENDS_OF_CODE = str.maketrans({"`": "'", "|": "¦"})
_CALIBRATION = {
    "builtin": "the text that moe-convert ships",
    "file": "a text that the converter chose",
    "random": "random",
}


def model_parameters(index: Index) -> int:
    """Return the number of the model's parameters; viewers of packed files count bytes."""
    a = index.architecture
    expert_parameters = 3 * a.hidden_size * a.intermediate_size
    return expert_parameters * a.num_local_experts * a.expert_layers + index.trunk.parameters


def expert_entries(index: Index) -> list[ExpertEntry]:
    """Return the entries of all experts, layer by layer."""
    return [entry for layer in index.layers for entry in layer.experts]


def size_lines(index: Index) -> Iterator[str]:
    """Yield the table of sizes."""
    a = index.architecture
    parameters = model_parameters(index)
    entries = expert_entries(index)
    total_bytes = index.trunk.size_bytes + sum(layer.size_bytes for layer in index.layers)
    yield "| | |"
    yield "|---|---|"
    yield f"| parameters | {parameters:,} (the Hub's viewer counts packed bytes) |"
    yield f"| bits per parameter, whole model | {8 * total_bytes / parameters:.3f} |"
    yield f"| layers with experts | {a.expert_layers} |"
    yield f"| experts per layer | {a.num_local_experts}, each token uses {a.num_experts_per_tok} |"
    yield f"| one expert | {format_size(entries[0].length)} |"
    yield f"| all experts | {format_size(sum(entry.length for entry in entries))} |"
    yield f"| trunk | {format_size(index.trunk.size_bytes)} |"
    yield f"| total | {format_size(total_bytes)} |"


def memory_lines(index: Index) -> Iterator[str]:
    """Yield the table of memory and reads, by the number of cached experts."""
    a = index.architecture
    experts = a.num_local_experts
    used = a.num_experts_per_tok
    slot_bytes = sum(max(entry.length for entry in layer.experts) for layer in index.layers)
    kv_width = a.num_hidden_layers * a.num_key_value_heads * a.head_dim
    kv_bytes = 2 * kv_width * _KV_ITEM_BYTES * KV_CONTEXT
    yield f"Memory for cached experts, trunk, and keys and values of {KV_CONTEXT} positions."
    yield "Python and torch need some hundred MB more."
    yield "The reads assume that every expert is equally likely."
    yield ""
    yield "| experts cached per layer | memory | read from disk per token |"
    yield "|---|---|---|"
    for cached in range(used, experts + 1, max(1, experts // _MEMORY_ROWS)):
        read_bytes = slot_bytes * used * (1 - cached / experts)
        memory_bytes = index.trunk.size_bytes + kv_bytes + cached * slot_bytes
        sizes = f"{format_size(memory_bytes)} | {format_size(int(read_bytes))}"
        yield f"| {cached} of {experts} | {sizes} |"


def quality_lines(quality: Quality | None) -> Iterator[str]:
    """Yield the weight errors, and the comparison with the original if there is one."""
    if quality is None:
        yield "Not measured."
        return
    names = [name for name in ("experts", "attention") if name in quality.totals]
    errors = ", ".join(f"{quality.totals[name]:.4f} ({name})" for name in names)
    yield f"Relative weight error: {errors}. `quality.json` gives it for every projection."
    if evaluation := quality.evaluation:
        yield ""
        yield f"Compared with {code(evaluation.original)} in windows of {evaluation.window} tokens:"
        yield ""
        yield "| text | tokens | perplexity | original | ratio | KL, nats | same top token |"
        yield "|---|---|---|---|---|---|---|"
        yield from map(_comparison_line, (*evaluation.texts, evaluation.overall))


def origin_lines(index: Index) -> Iterator[str]:
    """Yield the table of source, recipe and versions."""
    recipe = index.recipe
    producer = index.producer
    revision = index.source.revision
    yield "| | |"
    yield "|---|---|"
    yield f"| source | {code(index.source.name)} |"
    yield f"| source commit | {'a local folder' if revision is None else code(revision)} |"
    yield f"| recipe | {code(recipe.name)} |"
    yield f"| attention, head | {code(recipe.attention)}, {code(recipe.head)} |"
    yield f"| solver | {code(recipe.solver)} |"
    yield f"| calibration | {_calibration(recipe)} |"
    yield f"| codec | {code(index.layers[0].experts[0].codec)} |"
    yield f"| written by | {code(producer.name)} {code(producer.version)} |"
    for name, version in sorted(producer.versions.items()):
        yield f"| {code(name)} | {code(version)} |"
    yield ""
    yield "`moe-convert verify --read-data` checks every byte."
    yield "The index holds the hashes of the source's shards."


def code(text: str) -> str:
    """Return `text` as inline code: no link, address, image or tag in it has a meaning.

    A backtick would end the code, and a bar the cell of a table: both are replaced.
    """
    return f"`{to_label(text).translate(_ENDS_OF_CODE) or ' '}`"


def _comparison_line(c: Comparison) -> str:
    cells = [
        code(c.name),
        f"{c.tokens:,}",
        f"{c.perplexity:.3f}",
        f"{c.original_perplexity:.3f}",
        f"{c.ratio:.4f}",
        f"{c.kl:.5f}",
        f"{c.agreement:.2%}",
    ]
    return f"| {' | '.join(cells)} |"


def _calibration(recipe: Recipe) -> str:
    try:
        calibration = Calibration.read(recipe.options)
    except RecipeError:
        return "recorded in a form that this release cannot read"
    if calibration is None:
        return "none"
    return f"{calibration.tokens} tokens, {_CALIBRATION[calibration.kind]}"
