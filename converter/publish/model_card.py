"""The model card, README.md, made from a converted folder's index and quality.json alone.

Their texts may be a stranger's: each goes into the card through `code`, so that it is neither
Markdown nor HTML.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from converter.publish.card_sections import (
    code,
    expert_entries,
    memory_lines,
    origin_lines,
    quality_lines,
    size_lines,
)
from formats.files.io_errors import translated
from formats.files.partial_file import write_file
from formats.index import Index
from formats.packing import PACKINGS, tile_packing_named
from formats.quality import Quality, read_quality
from formats.repo_names import is_repo_name
from formats.trunk import ATTENTION

CARD_NAME = "README.md"
MARK = "<!-- made by moe-convert: without this line the card is kept as it is -->"
"""Every upload makes a card with this line again."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CardOptions:
    """The facts of a card that the folder does not hold.

    repo: the name in the loading example. license: one of the Hub's identifiers, None for no claim.
    license_file: the folder's licence file. base_model: None for the index's source.
    """

    repo: str
    license: str | None = None
    license_file: str | None = None
    base_model: str | None = None


def card_text(index: Index, quality: Quality | None, options: CardOptions) -> str:
    """Return the card: metadata for the Hub, description, loading, sizes, quality and origin."""
    base = options.base_model
    if base is None and is_repo_name(index.source.name):
        base = index.source.name
    attention_bits = _attention_bits(index)
    is_quantized = _has_packed_experts(index) or attention_bits > 0
    lines = [
        *_metadata(index.architecture.model_type, base, options, is_quantized),
        MARK,
        "",
        f"# {code(base or index.source.name)}, {code(index.recipe.name)}",
        "",
        *_description(index, base, attention_bits),
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
        *size_lines(index),
        "",
        "## Memory",
        "",
        *memory_lines(index),
        "",
        "## Quality",
        "",
        *quality_lines(quality),
        "",
        "## Origin",
        "",
        *origin_lines(index),
    ]
    return "\n".join(lines) + "\n"


def write_card(out: Path, index: Index) -> None:
    """Write README.md of a folder whose index is not written yet; keep a card without MARK.

    An upload makes the card again with the repository's name.
    """
    path = out / CARD_NAME
    with translated(path, "read"):
        if path.is_file() and MARK not in path.read_text(errors="replace"):
            _log.info("%s was not made by moe-convert and is kept", path)
            return
    write_file(path, card_text(index, read_quality(out), CardOptions("PATH")).encode())


def _metadata(
    model_type: str, base: str | None, options: CardOptions, is_quantized: bool
) -> Iterator[str]:
    yield "---"
    yield "library_name: moe-convert"
    yield "pipeline_tag: text-generation"
    if base:
        yield f"base_model: {json.dumps(base)}"
        if is_quantized:
            yield "base_model_relation: quantized"
    if options.license:
        yield f"license: {json.dumps(options.license)}"
        if options.license == "other" and options.license_file:
            yield f"license_name: {json.dumps(options.license_file.lower())}"
        if options.license_file:
            yield f"license_link: {json.dumps(options.license_file)}"
    yield "tags:"
    yield f"- {model_type}"
    yield "- moe"
    if is_quantized:
        yield "- quantized"
    yield "- moe-convert"
    yield "---"
    yield ""


def _description(index: Index, base: str | None, attention_bits: float) -> Iterator[str]:
    name = code(base or index.source.name)
    if base and is_repo_name(base):
        name = f"[{name}](https://huggingface.co/{base})"
    entries = expert_entries(index)
    gate_up = " and ".join(map(code, sorted({entry.gate_up for entry in entries})))
    down = " and ".join(map(code, sorted({entry.down for entry in entries})))
    experts = "as in the source"
    if _has_packed_experts(index):
        experts = f"quantized to {_expert_bits(index):.3f} bits per weight"
    attention = "as in the source"
    if attention_bits:
        attention = f"quantized to {attention_bits:.3f} bits per weight"
    yield f"{name} in the expert-addressable format of {code(index.producer.name)}."
    yield f"Its experts are {experts} ({gate_up} for gate and up, {down} for down)."
    yield f"Its attention is {attention}."
    yield "It runs in less memory than its size: experts are read from disk through a cache."


def _has_packed_experts(index: Index) -> bool:
    return any(e.gate_up in PACKINGS or e.down in PACKINGS for e in expert_entries(index))


def _expert_bits(index: Index) -> float:
    """Return the bits per weight of the experts."""
    entries = expert_entries(index)
    weights = 3 * index.architecture.hidden_size * index.architecture.intermediate_size
    return 8 * sum(entry.length for entry in entries) / (len(entries) * weights)


def _attention_bits(index: Index) -> float:
    """Return the bits per weight of packed attention matrices; 0 if none is packed."""
    n_bytes = 0
    weights = 0
    for module, linear in index.trunk.packed.items():
        if module.rpartition(".")[2] in ATTENTION:
            packing = tile_packing_named(linear.packing)
            n_bytes += packing.matrix_bytes(linear.rows, linear.columns)
            weights += linear.rows * linear.columns
    return 8 * n_bytes / max(1, weights)
