"""README.md shows the commands of `make demo` and its table."""

import re
import runpy

from project_paths import ROOT

README = (ROOT / "README.md").read_text()
DEMO = runpy.run_path(str(ROOT / "examples" / "demo.py"))


def first_cells(table: str) -> list[str]:
    return [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]


def test_the_table_has_the_rows_of_the_demo() -> None:
    perplexity = {"overall": {"perplexity": 2.0}}
    index = {"total_bytes": 1, "expert_bits": 2.0, "attention_bits": 4.0}
    rows = first_cells(
        DEMO["table"]({"cache": {"hits": 1, "misses": 1}}, perplexity, perplexity, index)
    )
    assert "perplexity, five texts" in rows
    first_table = README[README.index("| | tiny-mixtral |") :].split("\n\n")[0]
    assert first_cells(first_table) == rows


def test_each_command_of_the_first_screen_is_one_of_the_demo() -> None:
    source = (ROOT / "examples" / "demo.py").read_text()
    first_block = re.findall(r"```\n(.*?)```", README, re.S)[0]
    commands = re.findall(r"^\$ moe-convert (\w+)", first_block, re.M)
    assert commands
    assert [name for name in commands if f'moe_convert("{name}"' not in source] == []
