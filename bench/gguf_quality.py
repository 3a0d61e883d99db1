"""Compare exported GGUF files with those of llama.cpp's quantizer; llama.cpp measures both.

    python bench/pad_checkpoint.py examples/tiny-mixtral /tmp/padded
    python bench/gguf_quality.py /tmp/padded --build BUILD/bin --text a.txt --json out.json

BUILD: see llama_programs.py. The base is the export of recipe 16bit in F16. From it llama-imatrix
computes its statistics and llama-quantize its files. Files named "experts" have attention,
embeddings and head as in the base: only the experts differ. Those named "file" are what both
programs write without options. Both calibrate on the builtin text. A run that was interrupted
finds its files in --work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TypeVar

import zstandard
from llama_programs import Divergence, FileTypes, divergence, file_types, run, save_base

from loader.model import load_tokenizer

WINDOW = 512
TOKENS = 8192
"""convert's default number of calibration tokens."""
PLAIN = (
    *("--output-tensor-type", "bf16"),
    *("--token-embedding-type", "bf16"),
    *("--tensor-type", "attn=f16"),
)
PURE = (*PLAIN, "--tensor-type", "ffn_down_exps=q2_k")
SAME = (*PLAIN, "--pure")


@dataclass(frozen=True)
class Quantized:
    """One run of llama-quantize: its name in the table, type, imatrix and options."""

    name: str
    type: str
    imatrix: str | None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exported:
    """One of our files: its name in the table, and options of convert and of export."""

    name: str
    convert: tuple[str, ...]
    export: tuple[str, ...]


BASE = Exported(
    "base",
    ("--recipe", "16bit", "--attn-bits", "16"),
    ("--experts", "f16", "--attention", "f16"),
)
TWO, DOWN, THREE = (
    ("--recipe", name, "--attn-bits", "16") for name in ("2bit", "2bit-down3", "3bit")
)
OURS = (
    BASE,
    Exported("base, as stored", BASE.convert, ()),
    Exported("experts 2bit", TWO, ("--attention", "f16")),
    Exported("experts 2bit-down3", DOWN, ("--attention", "f16")),
    Exported("experts 2bit-down3, q3_k", DOWN, ("--attention", "f16", "--experts", "q3_k")),
    Exported("experts 3bit", THREE, ("--attention", "f16")),
    Exported("experts 3bit, q3_k", THREE, ("--attention", "f16", "--experts", "q3_k")),
    Exported("file 2bit", ("--recipe", "2bit"), ()),
    Exported("file 2bit, attention q4_k", ("--recipe", "2bit"), ("--attention", "q4_k")),
)
THEIRS = (
    Quantized("experts Q2_K", "Q2_K", None, PURE),
    Quantized("experts Q2_K, imatrix 8192", "Q2_K", "8192", PURE),
    Quantized("experts Q2_K, imatrix whole", "Q2_K", "whole", PURE),
    Quantized("experts Q2_K mix", "Q2_K", None, PLAIN),
    Quantized("experts Q2_K mix, imatrix 8192", "Q2_K", "8192", PLAIN),
    Quantized("experts Q2_K mix, imatrix whole", "Q2_K", "whole", PLAIN),
    Quantized("experts IQ2_XS, imatrix whole", "IQ2_S", "whole", SAME),
    Quantized("experts Q3_K, imatrix whole", "Q3_K_S", "whole", SAME),
    Quantized("experts Q4_K, imatrix whole", "Q4_K_S", "whole", SAME),
    Quantized("file Q2_K, imatrix 8192", "Q2_K", "8192"),
    Quantized("file Q2_K_S, imatrix 8192", "Q2_K_S", "8192"),
)


File = TypeVar("File", Exported, Quantized)


@dataclass(frozen=True)
class Row:
    """A measured file."""

    name: str
    ours: bool
    types: FileTypes
    quality: Divergence


def convert_and_export(checkpoint: Path, work: Path, one: Exported) -> Path:
    """Convert and export the checkpoint, unless `work` has the file already; return the file."""
    folder = work / f"ours-{'-'.join(one.convert)}"
    file = work / f"{folder.name}-{'-'.join(one.export)}.gguf"
    if not folder.exists():
        _command("convert", checkpoint, "-o", folder, *one.convert)
    if not file.exists():
        _command("export", folder, "-o", file, *one.export)
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


def measured_text(texts: list[Path], skip: int, characters: int, out: Path) -> Path:
    """Write `characters` from the second half of each text to `out`.

    The text is divided into halves after its first `skip` characters, as in bench/quality.py.
    """
    parts = []
    for path in texts:
        text = path.read_text()[skip:]
        middle = len(text) // 2
        parts.append(text[middle : middle + characters])
    out.write_text("\n".join(parts))
    return out


def their_file(build: Path, base: Path, work: Path, one: Quantized) -> Path:
    """Quantize the base by llama.cpp and return the file."""
    out = work / f"theirs-{one.name.replace(' ', '-').replace(',', '')}.gguf"
    statistics = ("--imatrix", work / f"imatrix-{one.imatrix}.gguf") if one.imatrix else ()
    run(build, "llama-quantize", *statistics, *one.options, base, out, one.type, 2)
    return out


def chosen(files: Sequence[File], names: list[str] | None) -> list[File]:
    """Return the files with these names in the table; None is all."""
    return [file for file in files if names is None or file.name in names]


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
    parser.add_argument("--skip", type=int, default=24000, help="characters at the beginning")
    parser.add_argument(
        "--characters", type=int, default=20000, help="characters of each text to measure"
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="rows [default: all]")
    parser.add_argument("--work", type=Path, default=Path("/tmp/gguf-quality"))
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    build, work = options.build, options.work
    work.mkdir(parents=True, exist_ok=True)
    base = convert_and_export(options.checkpoint, work, BASE)
    text = measured_text(options.text, options.skip, options.characters, work / "text.txt")
    logits = work / "base.logits"
    if not logits.exists():
        save_base(build, base, text, logits, WINDOW)
    for name, calibration in calibration_texts(options.checkpoint, work).items():
        out = work / f"imatrix-{name}.gguf"
        if not out.exists():
            command = ("-m", base, "-f", calibration, "-o", out, "-c", WINDOW, "-t", 1)
            run(build, "llama-imatrix", *command)
    rows = []

    def measure(name: str, file: Path, ours: bool) -> None:
        quality = divergence(build, file, text, logits, WINDOW)
        rows.append(Row(name, ours, file_types(file), quality))
        print(line(rows[-1]), flush=True)

    for ours in chosen(OURS, options.only):
        measure(ours.name, convert_and_export(options.checkpoint, work, ours), True)
    for theirs in chosen(THEIRS, options.only):
        measure(theirs.name, their_file(build, base, work, theirs), False)
    if options.json:
        record = {"bench": "gguf_quality", "window": WINDOW, "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
