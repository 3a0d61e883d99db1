"""The model card, README.md: from a converted folder's index and quality.json alone.

Their texts may be a stranger's. Each goes into the card through `_code`, so that it is neither
Markdown nor HTML.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from converter.recipe.recipe_options import Calibration
from formats.errors import RecipeError
from formats.files.io_errors import translated
from formats.hub.repo import is_repo_name
from formats.index import Index, Recipe
from formats.labels import to_label
from formats.packing import PACKINGS, tile_packing_named
from formats.quality import Comparison, Quality, read_quality
from formats.trunk import ATTENTION
from formats.writer import write_file

CARD_NAME = "README.md"
_log = logging.getLogger(__name__)

MARK = "<!-- made by moe-convert: without this line the card is kept as it is -->"
"""A card that has it is made again by every upload."""
KV_CONTEXT = 4096
"""Positions for which the memory table counts keys and values."""
_MEMORY_ROWS = 8
"""Of the memory table, about: a model with 128 experts a layer has no row for each."""
_ENDS = str.maketrans({"`": "'", "|": "¦"})
_CALIBRATION = {
    "builtin": "the text that moe-convert ships",
    "file": "a text of the converter's choice",
    "random": "random",
}


@dataclass(frozen=True)
class CardOptions:
    """What the folder does not say. repo: what the loading lines name; license: an identifier of
    the Hub's, None for no claim; license_file: the folder's licence, if it has one; base_model:
    instead of the index's source.
    """

    repo: str
    license: str | None = None
    license_file: str | None = None
    base_model: str | None = None


def parameter_count(index: Index) -> int:
    """The model's true parameters; a viewer of packed files counts bytes."""
    a = index.architecture
    experts = 3 * a.hidden_size * a.intermediate_size * a.num_local_experts * a.expert_layers
    return experts + index.trunk.parameters


def card_text(index: Index, quality: Quality | None, options: CardOptions) -> str:
    """The card: metadata that the Hub reads, then what it is, how to load it, sizes, quality, how
    it was made.
    """
    base = options.base_model or (index.source.name if is_repo_name(index.source.name) else None)
    name = _code(base or index.source.name)
    link = f"[{name}](https://huggingface.co/{base})" if base and is_repo_name(base) else name
    experts, attention = _bits(index)
    entries = [entry for layer in index.layers for entry in layer.experts]
    gate_up, down = (
        " and ".join(map(_code, sorted({getattr(e, of) for e in entries})))
        for of in ("gate_up", "down")
    )
    attention_text = f"quantized to {attention:.3f} bits" if attention else "as in the source"
    quantized = any(name in PACKINGS for e in entries for name in (e.gate_up, e.down))
    experts_text = f"quantized to {experts:.3f} bits a weight" if quantized else "as in the source"
    lines = [
        *_metadata(index.architecture.model_type, base, options, quantized or attention > 0),
        MARK,
        "",
        f"# {name}, {_code(index.recipe.name)}",
        "",
        f"{link} with its experts {experts_text} ({gate_up} for gate and up,"
        f" {down} for down) and its attention {attention_text}, in the expert-addressable format of"
        f" {_code(index.producer.name)}. It runs within the memory that there is: experts come from disk through a"
        " cache.",
        "",
        "```python",
        "import loader",
        f"model = loader.from_pretrained({json.dumps(options.repo)})",
        f"tokenizer = loader.load_tokenizer({json.dumps(options.repo)})",
        "```",
        "",
        "transformers alone does not load this folder.",
        "",
        "## Sizes",
        "",
        *_sizes(index),
        "",
        "## Memory",
        "",
        *_memory(index),
        "",
        "## Quality",
        "",
        *_quality(quality),
        "",
        "## How it was made",
        "",
        *_origin(index),
    ]
    return "\n".join(lines) + "\n"


def write_card(out: Path, index: Index) -> None:
    """README.md of a converted folder, whose index is not written yet; an upload makes it again
    with the repository.

    One that somebody else wrote there meanwhile is kept.
    """
    path = out / CARD_NAME
    with translated(path, "read"):
        if path.is_file() and MARK not in path.read_text(errors="replace"):
            _log.info("%s is not ours and is kept", path)
            return
    write_file(path, card_text(index, read_quality(out), CardOptions("PATH")).encode())


def _metadata(
    model_type: str, base: str | None, options: CardOptions, quantized: bool
) -> Iterator[str]:
    yield "---"
    yield "library_name: moe-convert"
    yield "pipeline_tag: text-generation"
    if base:
        yield f"base_model: {json.dumps(base)}"
        if quantized:
            yield "base_model_relation: quantized"
    if options.license:
        yield f"license: {json.dumps(options.license)}"
        if options.license == "other" and options.license_file:
            yield f"license_name: {json.dumps(options.license_file.lower())}"
        if options.license_file:
            yield f"license_link: {json.dumps(options.license_file)}"
    yield "tags:"
    yield from (
        f"- {tag}"
        for tag in (model_type, "moe", *(["quantized"] if quantized else []), "moe-convert")
    )
    yield "---"
    yield ""


def _bits(index: Index) -> tuple[float, float]:
    """Bits a weight of experts, and of attention if it is packed, else 0."""
    a = index.architecture
    entries = [entry for layer in index.layers for entry in layer.experts]
    experts = (
        8
        * sum(e.length for e in entries)
        / (len(entries) * 3 * a.hidden_size * a.intermediate_size)
    )
    packed = [
        linear
        for name, linear in index.trunk.packed.items()
        if name.rpartition(".")[2] in ATTENTION
    ]
    n_bytes = sum(tile_packing_named(x.packing).matrix_bytes(x.rows, x.columns) for x in packed)
    return experts, 8 * n_bytes / max(1, sum(x.rows * x.columns for x in packed))


def _sizes(index: Index) -> Iterator[str]:
    a, parameters = index.architecture, parameter_count(index)
    entries = [entry for layer in index.layers for entry in layer.experts]
    total = index.trunk.size_bytes + sum(layer.size_bytes for layer in index.layers)
    yield "| | |"
    yield "|---|---|"
    yield f"| parameters | {parameters:,} (the Hub's viewer counts packed bytes) |"
    yield f"| bits per parameter, everything | {8 * total / parameters:.3f} |"
    yield f"| layers × experts | {a.expert_layers} × {a.num_local_experts}, {a.num_experts_per_tok} used a token |"
    yield f"| one expert | {_size(entries[0].length)} |"
    yield f"| all experts | {_size(sum(e.length for e in entries))} |"
    yield f"| everything else | {_size(index.trunk.size_bytes)} |"
    yield f"| total | {_size(total)} |"


def _memory(index: Index) -> Iterator[str]:
    a = index.architecture
    slot = sum(max(e.length for e in layer.experts) for layer in index.layers)
    kv = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * 2 * KV_CONTEXT
    yield f"Of experts, everything else, and keys and values of {KV_CONTEXT} positions; Python and torch take some"
    yield "hundred MB more. What a token reads is computed for experts that are all equally likely."
    yield ""
    yield "| experts of each layer in memory | memory | read from disk a token |"
    yield "|---|---|---|"
    step = max(1, a.num_local_experts // _MEMORY_ROWS)
    for held in range(a.num_experts_per_tok, a.num_local_experts + 1, step):
        read = slot * a.num_experts_per_tok * (1 - held / a.num_local_experts)
        memory = index.trunk.size_bytes + kv + held * slot
        yield f"| {held} of {a.num_local_experts} | {_size(memory)} | {_size(int(read))} |"


def _quality(quality: Quality | None) -> Iterator[str]:
    if quality is None:
        yield "Not measured."
        return
    names = [name for name in ("experts", "attention") if name in quality.totals]
    errors = ", ".join(f"{quality.totals[name]:.4f} ({name})" for name in names)
    yield f"Relative weight error: {errors}; `quality.json` has every projection's."
    if evaluation := quality.evaluation:
        yield ""
        yield f"Against {_code(evaluation.original)} in windows of {evaluation.window} tokens:"
        yield ""
        yield "| text | tokens | perplexity | original | ratio | KL, nats | same first choice |"
        yield "|---|---|---|---|---|---|---|"
        yield from (_comparison(c) for c in (*evaluation.texts, evaluation.overall))


def _comparison(c: Comparison) -> str:
    return (
        f"| {_code(c.name)} | {c.tokens:,} | {c.perplexity:.3f} | {c.original_perplexity:.3f} | {c.ratio:.4f}"
        f" | {c.kl:.5f} | {c.agreement:.2%} |"
    )


def _origin(index: Index) -> Iterator[str]:
    recipe, producer = index.recipe, index.producer
    yield "| | |"
    yield "|---|---|"
    yield f"| source | {_code(index.source.name)} |"
    revision = index.source.revision
    yield f"| source commit | {'a local folder' if revision is None else _code(revision)} |"
    yield f"| recipe | {_code(recipe.name)} |"
    yield f"| attention, head | {_code(recipe.attention)}, {_code(recipe.head)} |"
    yield f"| solver | {_code(recipe.solver)} |"
    yield f"| calibration | {_calibration(recipe)} |"
    yield f"| codec | {_code(index.layers[0].experts[0].codec)} |"
    yield f"| written by | {_code(producer.name)} {_code(producer.version)} |"
    yield from (
        f"| {_code(name)} | {_code(version)} |"
        for name, version in sorted(producer.versions.items())
    )
    yield ""
    yield "`moe-convert verify --read-data` checks every byte; the index has the hashes of the source's shards."


def _calibration(recipe: Recipe) -> str:
    try:
        calibration = Calibration.read(recipe.options)
    except RecipeError:
        return "said by the index in a way that this release does not read"
    return (
        f"{calibration.tokens} tokens, {_CALIBRATION[calibration.kind]}" if calibration else "none"
    )


def _code(text: str) -> str:
    """`text` as inline code, in which nothing else has a meaning: not a link, an address, an image
    or a tag.

    Two characters have one nevertheless, and are replaced: a backtick, which ends it, and a bar,
    which ends a table's cell.
    """
    return f"`{to_label(text).translate(_ENDS) or ' '}`"


def _size(n_bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes} B"
