"""README.md, "Recipes": bits and sizes are those that the plan of a conversion computes."""

import json
from pathlib import Path

import pytest
from project_paths import ROOT

from converter.checkpoint.outline import Outline
from converter.output.conversion_sizes import plan_output
from converter.recipe.recipes import RECIPES

COMMON = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "dtype": "bfloat16",
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
}
MODELS = {
    "8x7B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "8x22B": {
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "vocab_size": 32768,
    },
}


def table() -> dict[str, list[str]]:
    """Recipe -> the other cells of its row."""
    lines = (ROOT / "README.md").read_text().split("## Recipes\n")[1].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:2] == "| "]
    return {row[0].split("`")[1]: row[1:] for row in rows[1:]}


@pytest.mark.parametrize(("model", "column"), [("8x7B", 2), ("8x22B", 4)])
def test_the_table_has_the_sizes_of_each_recipe(model: str, column: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(COMMON | MODELS[model]))
    outline = Outline.of_folder(tmp_path)
    rows = table()
    assert rows.keys() == RECIPES.keys()
    for name, recipe in RECIPES.items():
        plan = plan_output(outline, recipe)
        experts = sum(layout.n_bytes for layer in plan.layouts for layout in layer)
        two_of_eight = plan.total_bytes - experts + experts / 4
        sizes = [f"{n_bytes / 1e9:.1f} GB" for n_bytes in (plan.total_bytes, two_of_eight)]
        assert rows[name][column : column + 2] == sizes, name
        if model == "8x7B":
            assert float(rows[name][1]) == round(plan.expert_bits, 2), name
