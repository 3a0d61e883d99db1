"""Compare exported GGUF files with those of llama.cpp's quantizer; llama.cpp measures both.

    python bench/pad_checkpoint.py examples/tiny-mixtral /tmp/padded
    python bench/gguf_quality.py /tmp/padded --build BUILD/bin --text a.txt --json out.json

BUILD: see llama_programs.py. The base is the export of recipe 16bit in F16. From it llama-imatrix
computes its statistics and llama-quantize its files. Files named "experts" have attention,
embeddings and head in F16, so that they differ from the base in the experts alone; those named
"file" are what both programs write without options. Both calibrate on the builtin text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import zstandard
from llama_programs import Divergence, FileTypes, divergence, file_types, run, save_base

from loader.model import load_tokenizer

WINDOW = 512
TOKENS = 8192
"""convert's default number of calibration tokens."""
PLAIN = (
    "--output-tensor-type",
    "f16",
    "--token-embedding-type",
    "f16",
    "--tensor-type",
    "attn=f16",
)
PURE = (*PLAIN, "--tensor-type", "ffn_down_exps=q2_k")
ALL_IQ2 = (*PLAIN, "--pure")


@dataclass(frozen=True)
class Quantized:
    """One run of llama-quantize: its name in the table, type, imatrix and options."""

    name: str
    type: str
    imatrix: str | None
    options: tuple[str, ...] = ()


THEIRS = (
    Quantized("experts Q2_K", "Q2_K", None, PURE),
    Quantized("experts Q2_K, imatrix 8192", "Q2_K", "8192", PURE),
    Quantized("experts Q2_K, imatrix whole", "Q2_K", "whole", PURE),
    Quantized("experts Q2_K mix", "Q2_K", None, PLAIN),
    Quantized("experts Q2_K mix, imatrix 8192", "Q2_K", "8192", PLAIN),
    Quantized("experts Q2_K mix, imatrix whole", "Q2_K", "whole", PLAIN),
    Quantized("experts IQ2_S, imatrix whole", "IQ2_S", "whole", ALL_IQ2),
    Quantized("experts Q3_K, imatrix 8192", "Q3_K_S", "8192", ALL_IQ2),
    Quantized("file Q2_K, imatrix 8192", "Q2_K", "8192"),
    Quantized("file Q2_K_S, imatrix 8192", "Q2_K_S", "8192"),
)


@dataclass(frozen=True)
class Row:
    """A measured file."""

    name: str
    ours: bool
    types: FileTypes
    quality: Divergence


def convert_and_export(
    checkpoint: Path, work: Path, name: str, options: list[str], attention: str = "f16"
) -> Path:
    """Convert and export the checkpoint, unless `work` has the file already; return the file."""
    folder, file = work / name, work / f"{name}.gguf"
    if not file.exists():
        _command("convert", checkpoint, "-o", folder, *options)
        _command("export", folder, "-o", file, "--attention", attention)
    return file


def _command(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "converter", *map(str, arguments), "-q"], check=True)


def calibration_texts(checkpoint: Path, work: Path) -> dict[str, Path]:
    """Write the builtin text: whole, and as windows of TOKENS tokens in all, spread over it."""
    data = resources.files("converter").joinpath("data", "calibration.txt.zst").read_bytes()
    text = zstandard.decompress(data).decode()
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = TOKENS // WINDOW
    spare = len(ids) - TOKENS
    starts = [i * WINDOW + i * spare // (count - 1) for i in range(count)]
    windows = [i for start in starts for i in ids[start : start + WINDOW]]
    files = {"whole": work / "builtin.txt", "8192": work / "builtin-8192.txt"}
    files["whole"].write_text(text)
    files["8192"].write_text(tokenizer.decode(windows))
    return files


def measured_text(texts: list[Path], skip: int, out: Path) -> Path:
    """Write the second halves of all texts, after `skip` characters of each, to `out`."""
    parts = []
    for path in texts:
        text = path.read_text()[skip:]
        parts.append(text[len(text) // 2 :])
    out.write_text("\n".join(parts))
    return out


def our_files(checkpoint: Path, work: Path, recipes: list[str]) -> dict[str, Path]:
    """Return our files by their names in the table."""
    files = {}
    for recipe in recipes:
        files[f"experts {recipe}"] = convert_and_export(
            checkpoint, work, f"ours-{recipe}", ["--recipe", recipe, "--attn-bits", "16"]
        )
    for attention in ("f16", "q4_k"):
        files[f"file 2bit, attention {attention}"] = convert_and_export(
            checkpoint, work, f"ours-2bit-{attention}", ["--recipe", "2bit"], attention
        )
    return files


def their_file(build: Path, base: Path, work: Path, one: Quantized) -> Path:
    """Quantize the base by llama.cpp and return the file."""
    out = work / f"theirs-{one.name.replace(' ', '-').replace(',', '')}.gguf"
    statistics = ("--imatrix", work / f"imatrix-{one.imatrix}.gguf") if one.imatrix else ()
    run(build, "llama-quantize", *statistics, *one.options, base, out, one.type, 2)
    return out


def line(row: Row) -> str:
    """Return a row of the table."""
    types, quality = row.types, row.quality
    kinds = "  ".join("/".join(names) for names in types.experts.values())
    return (
        f"{'ours' if row.ours else 'llama.cpp':9} {row.name:32} {kinds:20} "
        f"{types.expert_bits:.3f} {types.size_bytes / 1e6:6.1f}  "
        f"{quality.perplexity:.3f} ± {quality.perplexity_error:.3f}  "
        f"{quality.ratio:.4f} ± {quality.ratio_error:.4f}  "
        f"{quality.kl:.5f} ± {quality.kl_error:.5f}  {quality.same_top:.3f}  "
        f"others {'/'.join(types.other)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a Mixtral, with widths of 256")
    parser.add_argument("--build", type=Path, required=True, help="llama.cpp's programs")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--skip", type=int, default=24000, help="characters of each text")
    parser.add_argument("--recipe", action="append", help="[default: 2bit, 2bit-down3, 3bit]")
    parser.add_argument("--work", type=Path, default=Path("/tmp/gguf-quality"))
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    build, work = options.build, options.work
    work.mkdir(parents=True, exist_ok=True)
    base = convert_and_export(
        options.checkpoint, work, "base", ["--recipe", "16bit", "--attn-bits", "16"]
    )
    text = measured_text(options.text, options.skip, work / "text.txt")
    logits = work / "base.logits"
    save_base(build, base, text, logits, WINDOW)
    for name, calibration in calibration_texts(options.checkpoint, work).items():
        out = work / f"imatrix-{name}.gguf"
        run(build, "llama-imatrix", "-m", base, "-f", calibration, "-o", out, "-c", WINDOW, "-t", 2)
    rows = []

    def measure(name: str, file: Path, ours: bool) -> None:
        quality = divergence(build, file, text, logits, WINDOW)
        rows.append(Row(name, ours, file_types(file), quality))
        print(line(rows[-1]), flush=True)

    measure("base", base, True)
    recipes = options.recipe or ["2bit", "2bit-down3", "3bit"]
    for name, file in our_files(options.checkpoint, work, recipes).items():
        measure(name, file, True)
    for one in THEIRS:
        measure(one.name, their_file(build, base, work, one), False)
    if options.json:
        record = {"bench": "gguf_quality", "window": WINDOW, "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
