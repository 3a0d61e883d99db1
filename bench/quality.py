"""Compare solvers and recipes by the distance of predictions from the original model's.

    python bench/quality.py --text a.txt --text b.txt --calibrate broad.txt --json out.json

    # the same on the outlier variant
    python bench/quality.py --outliers

    # mixed bits
    python bench/quality.py --recipe 2.7bpw --recipe 2bit/down=3bit --solver feedback:builtin

Bits per weight, also of targets, are those of the packings at the sizes of 8x7B: a small model's
columns do not fill the blocks.

It compares weights, not kernels: it dequantizes the converted weights into the original model, in
float32. For each window it computes the mean over tokens of KL(original || converted) from
differences of log-probabilities. The table has the mean over windows and its standard error, the
perplexity ratio and the standard error of its logarithm, and the agreement of the first choice. Do
not report a choice on the text that it was made on: --skip and --half keep parts apart.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from make_checkpoint import SHAPES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter.checkpoint.outline import Outline
from converter.convert import ConvertOptions, convert_checkpoint
from converter.output.conversion_sizes import plan_output
from converter.recipe.conversion_recipe import ConversionRecipe
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.expert import ExpertLayout
from formats.packing import tile_packing_named
from formats.reading.direct_reader import DirectReader
from formats.tiles import dequantize, expert_weights, unpack
from loader.evaluation.perplexity import windows_of
from loader.hf.loading.plain_checkpoint import load_checkpoint
from loader.hf.required_cache import window_arguments
from loader.model import load_tokenizer

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-mixtral"
SOLVERS = ("hqq", "refit", "feedback:random", "feedback:builtin")
OUTLIERS = (8.0, 16.0, 32.0, 64.0)
"""By powers of two, so that bf16 rounds nothing."""


@dataclass(frozen=True)
class Step:
    """A step of the ladder."""

    recipe: str
    solver: str
    bits: float
    rules: list[str]
    kl: float
    kl_error: float
    ratio: float
    ratio_error: float
    agreement: float
    seconds: float


def make_outliers(source: Path, out: Path, seed: int = 0) -> None:
    """The checkpoint with a few strong channels before every linear but attention's output; its
    function is the same.

    Norm weights of four channels times 8 to 64 and the columns that follow divided by that; also
    rows of up and v, and the columns of down that follow up's.
    """
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            shutil.copyfile(file, out / file.name)
    config = json.loads((source / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(config["hidden_size"], generator=generator)[: len(OUTLIERS)]
    inner = torch.randperm(config["intermediate_size"], generator=generator)[: len(OUTLIERS)]
    factor = torch.tensor(OUTLIERS)
    for file in sorted(source.glob("*.safetensors")):
        tensors = load_file(file)
        for name, weight in tensors.items():
            kind = name.removesuffix(".weight").rpartition(".")[2]
            if kind in ("input_layernorm", "post_attention_layernorm"):
                weight[hidden] *= factor.to(weight)
            elif kind in ("q_proj", "k_proj", "v_proj", "w1", "w3", "gate"):
                weight[:, hidden] /= factor.to(weight)
            if kind == "w3":
                weight[inner] *= factor.to(weight)[:, None]
            elif kind == "w2":
                weight[:, inner] /= factor.to(weight)
        save_file(tensors, out / file.name, {"format": "pt"})


def expert_bits(layouts: list[list[ExpertLayout]]) -> float:
    """Bits per expert weight of the packings in `layouts` at the sizes of 8x7B."""
    shape = SHAPES["8x7b"]
    rows, columns = shape.intermediate, shape.hidden
    each = [
        2 * layout.gate_up.matrix_bytes(rows, columns) + layout.down.matrix_bytes(columns, rows)
        for layer in layouts
        for layout in layer
    ]
    return 8 * sum(each) / (3 * rows * columns * len(each))


def recipe_of(
    name: str, source: Path, solver: str, calibrate: str | None, down_width: str | None = None
) -> ConversionRecipe:
    """Return the recipe of RECIPE, RECIPE/RULE,RULE or NUMBERbpw.

    Rules for all layers begin with their projection.
    """
    settings: dict[str, Any] = {"solver": solver, "calibrate": calibrate}
    if down_width:
        settings["down_width"] = int(down_width) if down_width.isdecimal() else down_width
    if name.endswith("bpw"):
        plain = [
            plan_output(Outline.of_folder(source), make_recipe(r, solver="hqq"))
            for r in ("2bit", "3bit", "4bit")
        ]
        at = [expert_bits(plan.layouts) for plan in plain], [plan.expert_bits for plan in plain]
        return make_recipe(
            **settings, target_bpw=float(numpy.interp(float(name.removesuffix("bpw")), *at))
        )
    base, _, rules = name.partition("/")
    return make_recipe(base, **settings, rules=[f"*/{rules}"] if rules else [])


def put_converted(model: Any, folder: Path) -> None:
    """Replace the weights of `model` by the dequantized weights of the converted `folder`."""
    artifact = Artifact.open(folder)
    a = artifact.architecture
    parameters = dict(model.named_parameters())
    with safe_open(folder / "trunk.safetensors", "pt") as trunk:
        for module, linear in artifact.index.trunk.packed.items():
            packing = tile_packing_named(linear.packing)
            matrix = unpack(
                trunk.get_tensor(f"{module}.packed"), packing, linear.rows, linear.columns
            )
            parameters[f"{module}.weight"].data.copy_(dequantize(matrix, packing.group_size))
    with DirectReader(artifact) as reader:
        for layer in range(a.num_hidden_layers):
            for expert in range(a.num_local_experts):
                gate, up, down = expert_weights(
                    artifact.layout(layer, expert), reader.read(layer, expert)
                )
                prefix = f"model.layers.{layer}.mlp.experts"
                parameters[f"{prefix}.gate_up_proj"].data[expert].copy_(torch.cat([gate, up]))
                parameters[f"{prefix}.down_proj"].data[expert].copy_(down)


@torch.inference_mode()
def log_probabilities(model: Any, windows: Tensor) -> Tensor:
    """float32 [windows, tokens, vocabulary] of the tokens after each position."""
    logits = model(input_ids=windows, **window_arguments(model)).logits[:, :-1].float()
    return torch.log_softmax(logits, -1)


def compare(original: list[Tensor], model: Any, batches: list[Tensor]) -> dict[str, float]:
    """KL, perplexity ratio and agreement, with standard errors over windows."""
    kl, difference, agreement = [], [], []
    for p, windows in zip(original, batches, strict=True):
        q = log_probabilities(model, windows)
        kl.append((p.exp() * (p - q)).sum(-1).mean(-1))
        wanted = windows[:, 1:, None]
        difference.append((p.gather(-1, wanted) - q.gather(-1, wanted)).mean((1, 2)))
        agreement.append((p.argmax(-1) == q.argmax(-1)).float().mean(-1))
    kls, differences = torch.cat(kl).double(), torch.cat(difference).double()
    root = len(kls) ** 0.5
    return {
        "kl": float(kls.mean()),
        "kl_error": float(kls.std()) / root,
        "ratio": float(differences.mean().exp()),
        "ratio_error": float(differences.std()) / root,
        "agreement": float(torch.cat(agreement).mean()),
    }


def text_windows(tokenizer: Any, texts: list[Path], options: argparse.Namespace) -> Tensor:
    """Return up to options.windows windows of each text, spread evenly.

    --skip removes characters before the text is divided into halves.
    """
    chosen = []
    for path in texts:
        text = path.read_text()[options.skip :]
        if options.half:
            middle = len(text) // 2
            text = text[:middle] if options.half == 1 else text[middle:]
        windows = windows_of(tokenizer, text, options.window)
        count = min(options.windows, len(windows))
        chosen.append(windows[[i * (len(windows) - 1) // max(1, count - 1) for i in range(count)]])
    return torch.cat(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument(
        "--outliers", action="store_true", help="measure the outlier variant of the model"
    )
    parser.add_argument("--recipe", action="append", help="[default: 2bit and 3bit]")
    parser.add_argument(
        "--solver", action="append", help=f"solver[:calibration] [default: {', '.join(SOLVERS)}]"
    )
    parser.add_argument("--calibrate", type=Path, help="text file; adds the step feedback:FILE")
    parser.add_argument("--down-width", help="--down-width of convert, for feedback")
    parser.add_argument("--text", type=Path, action="append", help="[default: examples/text]")
    parser.add_argument(
        "--skip", type=int, default=0, help="characters to skip at the beginning of each text"
    )
    parser.add_argument(
        "--half", type=int, choices=[1, 2], help="use only the first or second half of each text"
    )
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument(
        "--windows", type=int, default=16, help="maximum number of windows per text [default: 16]"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    # Small matrices: torch's workers spin longer than they compute, and stall where another job
    # runs.
    torch.set_num_threads(1)
    texts = options.text or sorted((ROOT / "examples" / "text").glob("*.txt"))
    solvers = options.solver or [*SOLVERS, *(["feedback:file"] if options.calibrate else [])]
    with tempfile.TemporaryDirectory() as scratch:
        source = options.model
        if options.outliers:
            source = Path(scratch) / f"{options.model.name}-outliers"
            make_outliers(options.model, source)
        model = load_checkpoint(source).float()
        batches = list(text_windows(load_tokenizer(source), texts, options).split(8))
        original = [log_probabilities(model, windows) for windows in batches]
        print(
            f"{source.name}: {sum(map(len, batches))} windows of {options.window} of "
            f"{len(texts)} texts"
        )
        print(
            "recipe  solver             bits   KL ± error          ratio ± error      agreement  s",
            flush=True,
        )
        steps = []
        for recipe in options.recipe or ["2bit", "3bit"]:
            for name in solvers:
                solver, _, calibrate = name.partition(":")
                out = Path(scratch) / "out"
                begin = time.perf_counter()
                done = convert_checkpoint(
                    source,
                    out,
                    recipe_of(recipe, source, solver, calibrate or None, options.down_width),
                    ConvertOptions(options.workers, calibration_file=options.calibrate),
                )
                seconds = time.perf_counter() - begin
                put_converted(model, out)
                bits, rules = (
                    expert_bits(done.plan.layouts),
                    [rule.text for rule in done.recipe.options.rules],
                )
                step = Step(
                    recipe, name, bits, rules, **compare(original, model, batches), seconds=seconds
                )
                shutil.rmtree(out)
                steps.append(step)
                print(
                    f"{recipe:7} {name:18} {step.bits:.3f}  {step.kl:.5f} ± {step.kl_error:.5f}"
                    f"  {step.ratio:.4f} ± {step.ratio_error:.4f}  {step.agreement:.3f}"
                    f"  {seconds:.1f}",
                    flush=True,
                )
    if options.json:
        record = {
            "bench": "quality",
            "model": source.name,
            "window": options.window,
            "texts": [t.name for t in texts],
        }
        options.json.write_text(
            json.dumps(record | {"steps": [asdict(s) for s in steps]}, indent=1)
        )


if __name__ == "__main__":
    sys.exit(main())
