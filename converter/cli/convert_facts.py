"""What `convert` prints of a conversion, or of one that could be: sizes, bits, files, memory and disk."""

from pathlib import Path
from typing import Any

from converter.cli.output import gigabytes, table
from formats.index import Recipe


def facts_of(plan: Any, recipe: Recipe, source_bytes: int, out: Path) -> dict[str, Any]:
    """Plain values for JSON of an `OutputPlan` and its recipe."""
    from converter.bit_budget import TARGET
    from converter.bit_rules import rules_of

    rules = [rule.text for rule in rules_of(recipe)]
    if TARGET in recipe.options and not rules:
        rules = ["chosen by calibration"]
    return {
        "out_dir": str(out),
        "recipe": recipe.name,
        **({"layer_bits": rules} if rules else {}),
        "solver": recipe.solver,
        "calibration": recipe.options.get("calibrate", "none"),
        "source_bytes": source_bytes,
        "converted_bytes": plan.total_bytes,
        "expert_bits": round(plan.expert_bits, 4),
        "attention_bits": round(plan.attention_bits, 4),
        "expert_bytes": plan.largest_expert_bytes,
        "files": len(plan.layouts) + 1,
    }


def needs_of(checked: Any) -> dict[str, Any]:
    """Plain values for JSON of what a `Preflight` says of workers, memory and disk."""
    return {
        "workers": checked.workers,
        "memory_bytes": checked.memory_bytes,
        "free_disk_bytes": checked.free_disk_bytes,
    }


def text_of(facts: dict[str, Any]) -> str:
    """The facts as two columns."""
    rows = []
    for name, value in facts.items():
        if isinstance(value, dict):
            rows += [(f"{name.replace('_', ' ')} ({key})", f"{number:.4f}") for key, number in value.items()]
        elif isinstance(value, list):
            rows += [(name.replace("_", " "), text) for text in value]
        elif name.endswith("_bytes"):
            rows.append((name.removesuffix("_bytes").replace("_", " ") + " size", f"{gigabytes(value)}"))
        else:
            rows.append((name.replace("_", " "), str(value)))
    return table(rows, left=2)
