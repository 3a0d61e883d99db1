"""The model card, README.md, made from a converted folder alone.

The texts of index and quality.json may be a stranger's: each goes into the card through `code`, or
quoted into a code block, so that it is neither Markdown nor HTML.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from converter.publish.card_markdown import code
from converter.publish.card_memory import memory_lines, size_lines
from converter.publish.card_metadata import Metadata
from converter.publish.card_quality import quality_lines
from converter.publish.card_recipe import (
    attention_bits,
    expert_bits,
    has_packed_experts,
    is_quantized,
    recipe_lines,
)
from converter.publish.card_usage import (
    FOLDER,
    Usage,
    chat_lines,
    generate_lines,
    install_lines,
    python_lines,
)
from formats.artifact import Artifact
from formats.config.model_types import MODEL_TYPES
from formats.index import Index
from formats.quality import Quality
from formats.repo_names import is_repo_name, page_address

CARD_NAME = "README.md"
UNKNOWN = "unknown"
"""The Hub's identifier of a licence that nobody stated."""
_FILE_NAME = re.compile(r"[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class CardFacts:
    """The facts of a card that neither index nor quality.json holds.

    repo: the repository, None for a folder that is not published. revision: a branch other than
    main. base_model: None for the index's source. carried: fields of the source's card, as
    `carried_over` returns them. license_file: the folder's licence file.
    """

    repo: str | None = None
    revision: str | None = None
    base_model: str | None = None
    carried: Metadata = field(default_factory=dict)
    license_file: str | None = None


def base_model(index: Index, given: str | None) -> str | None:
    """Return the model that was converted: `given`, or the source if it is a repository's name."""
    if given is None and is_repo_name(index.source.name):
        return index.source.name
    return given


def card_metadata(index: Index, facts: CardFacts) -> Metadata:
    """Return the card's metadata for the Hub."""
    base = base_model(index, facts.base_model)
    adapters = [a.name for a in index.source.adapters if is_repo_name(a.name)]
    quantized = is_quantized(index)
    tags = [index.architecture.model_type, "moe", *["quantized"] * quantized, "moe-convert"]
    metadata: Metadata = {
        "library_name": "moe-convert",
        "pipeline_tag": facts.carried.get("pipeline_tag", "text-generation"),
    }
    if base:
        metadata["base_model"] = [base, *adapters] if adapters else base
    if base and quantized:
        metadata["base_model_relation"] = "quantized"
    for name in ("license", "license_name", "license_link", "language"):
        if name in facts.carried:
            metadata[name] = facts.carried[name]
    own_tags = [tag for tag in facts.carried.get("tags", []) if tag not in tags]
    return metadata | {"tags": [*tags, *own_tags]}


def card_part(artifact: Artifact, quality: Quality | None, facts: CardFacts) -> str:
    """Return the card's text: from installing to the licence."""
    index = artifact.index
    usage = Usage.of(artifact, facts.repo or FOLDER, facts.revision)
    base = base_model(index, facts.base_model)
    title = facts.repo or base or index.source.name
    sections = {
        "Install": install_lines(),
        "Generate text": generate_lines(usage),
        "Python": python_lines(usage),
        "Chat": chat_lines(usage),
        "Memory": memory_lines(artifact, usage),
        "Quality": quality_lines(quality, usage),
        "Recipe": recipe_lines(index),
        "Sizes": size_lines(index),
        "Limits": _limit_lines(),
        "Licence": _license_lines(index, facts, base),
    }
    lines = ["", f"# {code(title.rpartition('/')[2])}", "", *_description(index, base)]
    for name, section in sections.items():
        lines += ["", f"## {name}", "", *section]
    return "\n".join(lines) + "\n\n"


def _description(index: Index, base: str | None) -> Iterator[str]:
    a = index.architecture
    name = code(base or index.source.name)
    if base and is_repo_name(base):
        name = _repo_link(base)
    merged = "".join(f", with the adapter {code(a.name)} merged" for a in index.source.adapters)
    yield f"{name}{merged}, converted for moe-convert."
    if has_packed_experts(index):
        yield f"Its experts have {expert_bits(index):.2f} bits per weight."
    else:
        yield "Its experts are as in the source."
    if bits := attention_bits(index):
        yield f"Its attention has {bits:.2f} bits per weight."
    yield ""
    yield f"A token uses {a.num_experts_per_tok} of {a.num_local_experts} experts in each layer."
    yield "moe-convert keeps some experts in RAM and reads the others from the disk."
    yield "So the model needs less RAM than its size."
    yield "Other programs cannot load these files."


def _limit_lines() -> Iterator[str]:
    types = ", ".join(f"`{name}`" for name in MODEL_TYPES)
    yield f"- moe-convert runs these model types: {types}."
    yield "- It needs transformers 5.3 or newer, before 6, and torch 2.6 or newer."
    yield "- It is fast on x86-64 with AVX2 or AVX-512, and slow on other processors."


def _license_lines(index: Index, facts: CardFacts, base: str | None) -> Iterator[str]:
    license_id = facts.carried.get("license")
    link = facts.carried.get("license_link") or facts.license_file
    if not license_id or license_id == UNKNOWN:
        yield "The licence is not known: the source names none."
        if base and is_repo_name(base):
            yield f"Ask the authors of {_repo_link(base)} before you use the model."
        else:
            yield "Ask the authors of the source before you use the model."
        return
    ids = license_id if isinstance(license_id, list) else [license_id]
    name = facts.carried.get("license_name")
    words = ", ".join(map(code, ids)) + (f" ({code(name)})" if name else "")
    yield f"The licence of the weights is {words}{_see(link)}."
    if index.source.adapters:
        yield "The adapter may have a licence of its own."


def _repo_link(repo: str) -> str:
    return f"[{code(repo)}]({page_address(repo)})"


def _see(link: str | None) -> str:
    if not link:
        return ""
    is_target = link.startswith(("http://", "https://")) or _FILE_NAME.fullmatch(link)
    return f", see [{code(link)}]({link})" if is_target else f", see {code(link)}"
