"""The demo of `make demo`: converts the example model to 2 bits, verifies it, generates text, and
compares both models. Its last line is the command that starts a chat.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "tiny-mixtral"
OUT = HERE.parent / "out" / "tiny-mixtral-2bit"
TEXTS = [
    option for file in sorted((HERE / "text").glob("*.txt")) for option in ("--text", str(file))
]
PROMPT = "ou.”\nSo Jonah arose, and went to Nineveh, according to Yahweh’s word. Now Nineve"


def moe_convert(*args: str) -> str:
    """Print a command, run it, and return its standard output."""
    shown = [arg.replace(f"{HERE.parent}/", "") for arg in args]
    print(
        "$ moe-convert "
        + " ".join(repr(arg) if any(c in arg for c in " \n") else arg for arg in shown),
        flush=True,
    )
    done = subprocess.run(
        [sys.executable, "-m", "converter", *args], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def main() -> None:
    print(moe_convert("convert", str(SOURCE), "-o", str(OUT), "--recipe", "2bit", "--force"))
    print(moe_convert("verify", str(OUT), "--read-data"))
    # Room for half of the experts, 4 in each of 8 layers, and for 2 reads under way.
    expert_bytes = json.loads((OUT / "moe_index.json").read_text())["layers"][0]["experts"][0][
        "length"
    ]
    cache = ["--ram-cache", str((4 * 8 + 2) * expert_bytes)]
    generated = json.loads(
        moe_convert(
            "generate", str(OUT), "--prompt", PROMPT, "--max-new-tokens", "40", "--json", *cache
        )
    )
    print(generated["text"] + "\n")
    before = json.loads(moe_convert("eval", str(SOURCE), *TEXTS, "--json"))
    after = json.loads(moe_convert("eval", str(OUT), *TEXTS, "--json"))
    index = json.loads(moe_convert("inspect", str(OUT), "--json"))
    print()
    print(table(generated, before, after, index))
    print(f"\nTo chat with it:\n{chat_line()}")


def chat_line() -> str:
    """Return the command that starts a chat, relative to the folder of the Makefile."""
    root = HERE.parent
    program = Path(sys.executable).with_name("moe-convert")
    shown = program.relative_to(root) if program.is_relative_to(root) else program
    return f"{shown} chat {OUT.relative_to(root)}"


def table(generated: dict, before: dict, after: dict, index: dict) -> str:
    """Return the comparison as a Markdown table, with a note below."""
    stats = generated["cache"]
    source_bytes = sum(file.stat().st_size for file in SOURCE.glob("*.safetensors"))
    ppl = before["overall"]["perplexity"], after["overall"]["perplexity"]
    uses = stats["hits"] + stats["misses"]
    rows = [
        ("", "tiny-mixtral", "converted to 2 bits"),
        ("---", "---", "---"),
        ("size", f"{source_bytes / 1e6:.1f} MB", f"{index['total_bytes'] / 1e6:.1f} MB"),
        ("bits per weight, experts", "16", f"{index['expert_bits']:.2f} (2.51 for 8x7B)"),
        ("bits per weight, attention", "16", f"{index['attention_bits']:.2f} (4.26 for 8x7B)"),
        ("perplexity, five texts", f"{ppl[0]:.2f}", f"{ppl[1]:.2f} (× {ppl[1] / ppl[0]:.4f})"),
        (
            "expert cache hits (4 of 8 experts cached per layer)",
            "",
            f"{stats['hits']} of {uses} ({stats['hits'] / uses:.0%})",
        ),
    ]
    note = (
        "tiny-mixtral's 192 and 384 columns are padded to 256 and 512;"
        " a real Mixtral's sizes need no padding."
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{note}"


if __name__ == "__main__":
    main()
