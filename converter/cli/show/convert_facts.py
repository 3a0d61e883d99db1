"""Facts and text of a conversion, planned or done: sizes, bits, files, memory and disk."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.cli.show.tables import table
from formats.sizes import format_size

if TYPE_CHECKING:
    from converter.conversion.plan import ConversionPlan
    from converter.output.conversion_sizes import OutputPlan
    from converter.recipe.conversion_recipe import ConversionRecipe


def facts_of(
    plan: "OutputPlan", recipe: "ConversionRecipe", source_bytes: int, out: Path
) -> dict[str, Any]:
    """Return sizes and recipe of a conversion as plain values for JSON."""
    options = recipe.options
    rules = (
        ["chosen by calibration"]
        if options.rules_are_open
        else [rule.text for rule in options.rules]
    )
    return {
        "out_dir": str(out),
        "recipe": recipe.name,
        **({"layer_bits": rules} if rules else {}),
        "solver": recipe.solver,
        "calibration": options.calibration.kind if options.calibration else "none",
        "source_bytes": source_bytes,
        "converted_bytes": plan.total_bytes,
        "expert_bits": round(plan.expert_bits, 4),
        "attention_bits": round(plan.attention_bits, 4),
        "expert_bytes": plan.largest_expert_bytes,
        "files": len(plan.layouts) + 1,
    }


def needs_of(plan: "ConversionPlan") -> dict[str, Any]:
    """Return workers, memory and disk space of a plan as plain values for JSON."""
    return {
        "workers": plan.workers,
        "memory_bytes": plan.memory_bytes,
        "free_disk_bytes": plan.free_disk_bytes,
    }


def summary_of(plan: "ConversionPlan") -> str:
    """Return a plan as one line of text."""
    source = format_size(plan.checkpoint.n_bytes)
    converted = format_size(plan.output.total_bytes)
    return (
        f"plan: {source} to {converted} in {plan.out}; {plan.output.expert_bits:.3f} bits per"
        f" expert weight; {plan.workers} workers, about {format_size(plan.memory_bytes)} of memory"
    )


def text_of(facts: dict[str, Any]) -> str:
    """Return the facts as two columns of text."""
    rows = []
    for name, value in facts.items():
        if isinstance(value, dict):
            rows += [
                (f"{name.replace('_', ' ')} ({key})", f"{number:.4f}")
                for key, number in value.items()
            ]
        elif isinstance(value, list):
            rows += [(name.replace("_", " "), text) for text in value]
        elif name.endswith("_bytes"):
            rows.append(
                (name.removesuffix("_bytes").replace("_", " ") + " size", f"{format_size(value)}")
            )
        else:
            rows.append((name.replace("_", " "), str(value)))
    return table(rows, left=2)
