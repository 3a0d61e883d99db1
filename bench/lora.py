"""Compare training of a LoRA adapter over packed weights with training over their values.

    moe-convert convert examples/tiny-mixtral -o out/tiny-mixtral-2bit --recipe 2bit
    python bench/lora.py examples/tiny-mixtral out/tiny-mixtral-2bit

Both models start from the same adapter on q_proj and v_proj and see the same batches of a text. The
second model is transformers' own, in float32, with the dequantized weights. "eval" is the mean loss
of the text's last tokens, which no batch has. Prints JSON.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from quality import put_converted
from torch import Tensor
from transformers import AutoModelForCausalLM

import loader

TEXT = Path(__file__).parents[1] / "examples" / "text" / "english.txt"
EVAL_ROWS = 4


def batches(folder: Path, text: str, steps: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Return training tokens [steps, rows, length] and evaluation tokens [EVAL_ROWS, length]."""
    ids = loader.load_tokenizer(folder)(text, return_tensors="pt")["input_ids"][0]
    evaluation = ids[-EVAL_ROWS * length :].reshape(EVAL_ROWS, length)
    begins = torch.randint(
        len(ids) - (EVAL_ROWS + 1) * length,
        (steps, rows, 1),
        generator=torch.Generator().manual_seed(0),
    )
    return ids[begins + torch.arange(length)], evaluation


def train(model: Any, tokens: Tensor, evaluation: Tensor, rate: float) -> dict[str, Any]:
    """Train an adapter on q_proj and v_proj; return losses and the first step's gradients."""

    def evaluated() -> float:
        with torch.no_grad():
            return float(adapted(input_ids=evaluation, labels=evaluation).loss)

    torch.manual_seed(0)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    losses: list[float] = []
    gradients = torch.empty(0)
    before = evaluated()
    for step in tokens:
        loss = adapted(input_ids=step, labels=step).loss
        loss.backward()
        if not losses:
            gradients = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        print(f"step {len(losses)}: loss {losses[-1]:.4f}", file=sys.stderr)
    return {
        "losses": losses,
        "eval": [before, evaluated()],
        "gradients": gradients,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("source", type=Path, help="the checkpoint")
    arguments.add_argument("folder", type=Path, help="its conversion")
    arguments.add_argument("--text", type=Path, default=TEXT)
    arguments.add_argument("--steps", type=int, default=30)
    arguments.add_argument("--rows", type=int, default=2)
    arguments.add_argument("--length", type=int, default=64)
    arguments.add_argument("--rate", type=float, default=2e-3)
    options = arguments.parse_args()
    tokens, evaluation = batches(
        options.folder, options.text.read_text(), options.steps, options.rows, options.length
    )
    packed = loader.from_pretrained(options.folder, device="cpu", dtype=torch.float32)
    dequantized = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.float32).eval()
    put_converted(dequantized, options.folder)
    runs = [train(model, tokens, evaluation, options.rate) for model in (packed, dequantized)]
    ours, plain = runs
    cosine = torch.cosine_similarity(ours["gradients"].double(), plain["gradients"].double(), 0)
    print(
        json.dumps(
            {
                "first": [run["losses"][0] for run in runs],
                "last": [run["losses"][-1] for run in runs],
                "eval_before": [run["eval"][0] for run in runs],
                "eval_after": [run["eval"][1] for run in runs],
                "largest_relative_difference": max(
                    abs(a / b - 1) for a, b in zip(ours["losses"], plain["losses"], strict=True)
                ),
                "one_minus_cosine_of_first_gradients": 1 - float(cosine),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
