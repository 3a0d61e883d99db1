"""`moe-convert inspect`: shows what a converted model holds, from index and headers alone."""

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from converter.cli.options import shared_options
from converter.cli.show.console import Output, output_options
from converter.cli.show.tables import table
from formats.sizes import format_size


@click.command(
    "inspect",
    epilog="""\b
Examples:
  moe-convert inspect ./my-mixtral-2bit
  moe-convert inspect owner/my-mixtral-2bit
  moe-convert inspect ./my-mixtral-2bit --json --experts""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--experts",
    "show_experts",
    is_flag=True,
    help="List each expert: file, offset and length in bytes, packings, sha256.",
)
@shared_options.revision
@shared_options.token
@output_options(interrupted="nothing was changed")
def command(
    path: Path, show_experts: bool, revision: str | None, token: str | None, output: Output
) -> None:
    """Show what the converted model PATH holds.

    PATH is a folder, or owner/name of a repository on the Hub. The command reads index and headers,
    but no weights.
    """
    with _opened(path, revision, token) as (artifact, repository):
        facts, text = _described(artifact, show_experts, output)
    if repository:
        facts, text = {"repository": repository} | facts, f"{repository}\n{text}"
    output.result(facts, text)


@contextlib.contextmanager
def _opened(
    path: Path, revision: str | None, token: str | None
) -> Iterator[tuple[Any, str | None]]:
    """Yield the artifact, and repository@commit if it is on the Hub.

    A folder takes precedence over a repository of the same name.
    """
    from formats.artifact import Artifact
    from formats.hub.remote_artifact import open_remote
    from formats.hub.repo import HubRepo
    from formats.repo_names import is_repo_name

    if path.exists() or not is_repo_name(str(path)):
        yield Artifact.open(path), None
        return
    repo = HubRepo.open(str(path), revision, token)
    with tempfile.TemporaryDirectory(prefix="moe-convert-") as folder:
        yield open_remote(repo, Path(folder)), f"{repo.repo}@{repo.commit}"


def _packings(names: Iterable[str]) -> str:
    """Return the packings of experts; if they differ, with the number of experts of each."""
    counts = Counter(names)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(
        f"{name} ({counts[name]} of {counts.total()} experts)" for name in sorted(counts)
    )


def _described(artifact: Any, show_experts: bool, output: Output) -> tuple[dict[str, Any], str]:
    """Return the facts for JSON, and the same as text."""
    import msgspec

    from formats.quality import read_quality
    from formats.trunk import attention_size

    index = artifact.index
    a = artifact.architecture
    attention, attention_weights = attention_size(
        artifact.trunk_header().entries.values(), index.trunk.packed
    )
    attention_bits = 8 * attention / max(1, attention_weights)
    entries = [entry for layer in index.layers for entry in layer.experts]
    stored = sum(entry.length for entry in entries)
    weights = len(entries) * 3 * a.hidden_size * a.intermediate_size
    facts: dict[str, Any] = {
        "format_version": index.format_version,
        "producer": msgspec.to_builtins(index.producer),
        "source": {
            "name": index.source.name,
            "revision": index.source.revision,
            "adapters": msgspec.to_builtins(index.source.adapters),
        },
        "architecture": msgspec.to_builtins(a),
        "recipe": msgspec.to_builtins(index.recipe),
        "packings": index.packings,
        "codec": entries[0].codec,
        "experts": len(entries),
        "expert_bits": round(8 * stored / weights, 4),
        "attention_bits": round(attention_bits, 4),
        "experts_bytes": stored,
        "trunk_bytes": index.trunk.size_bytes,
        "total_bytes": index.weight_bytes,
    }
    if output.as_json and show_experts:
        facts["layers"] = msgspec.to_builtins(index.layers)
    rows = [
        (
            "format",
            f"moe-convert {index.format_version},"
            f" by {index.producer.name} {index.producer.version}",
        ),
        ("model type", a.model_type),
        (
            "source",
            index.source.name + (f" at {index.source.revision}" if index.source.revision else ""),
        ),
        *(
            ("adapter", a.name + (f" at {a.revision}" if a.revision else ""))
            for a in index.source.adapters
        ),
        ("recipe", f"{index.recipe.name} (solver {index.recipe.solver})"),
        ("gate and up", _packings(entry.gate_up for entry in entries)),
        ("down", _packings(entry.down for entry in entries)),
        ("attention", index.recipe.attention),
        ("head", index.recipe.head),
        ("codec", entries[0].codec),
        (
            "layers × experts",
            f"{a.expert_layers} × {a.num_local_experts}, {a.num_experts_per_tok} per token",
        ),
        ("hidden, intermediate", f"{a.hidden_size}, {a.intermediate_size}"),
        ("bits per expert weight", f"{8 * stored / weights:.3f}"),
        ("bits per attention weight", f"{attention_bits:.3f}"),
        ("largest expert", format_size(max(entry.length for entry in entries))),
        ("all experts", format_size(stored)),
        ("everything else", format_size(index.trunk.size_bytes)),
        ("total", format_size(index.weight_bytes)),
    ]
    quality = read_quality(artifact.folder)
    if quality and (evaluation := quality.evaluation):
        facts["evaluation"] = msgspec.to_builtins(evaluation)
        overall = evaluation.overall
        fields = (
            f"KL {overall.kl:.5f}, perplexity ratio {overall.ratio:.4f}, {overall.tokens} tokens"
        )
        rows.append((f"against {evaluation.original}", fields))
    text = table(rows, left=2)
    if show_experts:
        lines: list[tuple[str, ...]] = [
            ("file", "expert", "offset", "length", "gate and up", "down", "sha256")
        ]
        for layer in index.layers:
            lines += [
                (
                    layer.file,
                    str(e.expert),
                    str(e.offset),
                    str(e.length),
                    e.gate_up,
                    e.down,
                    e.sha256[:12],
                )
                for e in layer.experts
            ]
        text += "\n\n" + table(lines)
    return facts, text
