"""Compare llama.cpp, running an exported GGUF file, with the converted folder it came from.

    python bench/gguf_tokens.py FOLDER MODEL.gguf --build BUILD/bin --text a.txt

BUILD: see llama_programs.py. It compares the ids of the texts with transformers' tokenizer, the
chat prompt with `apply_chat_template` (if there is one), and greedy tokens, by id, with those of
the folder in float32. Where greedy tokens part, it prints the gap between our two highest logits:
llama.cpp rounds activations to 8 bits for K-quants, so that near ties may fall either way.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from llama_programs import Server, server

import loader
from loader.model import load_tokenizer

PROMPTS = (
    "The king said",
    "In the beginning",
    "def main():\n    ",
    "import os\n\nclass",
    "Die Option",
    "Le fichier est",
    "The function returns",
    "SELECT * FROM",
)
CHATS = (
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": " Größe?\n"},
    ],
)


@dataclass(frozen=True)
class Greedy:
    """Greedy tokens after one prompt.

    same: tokens up to the first difference. gap: our two highest logits' difference there, or
    None if all are the same; rank: llama.cpp's token among our logits there, 0 the highest.
    """

    prompt: str
    tokens: int
    same: int
    gap: float | None = None
    rank: int | None = None


def compare_greedy(model: Any, client: Server, name: str, ids: list[int], tokens: int) -> Greedy:
    """Decode `tokens` ids after the prompt `ids` by both, and compare them."""
    theirs = client.greedy(ids, tokens)
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    ours = out.sequences[0, len(ids) :].tolist()
    end = model.generation_config.eos_token_id
    ours = [token for token in ours if token != end]
    theirs = [token for token in theirs if token != end]
    length = min(len(ours), len(theirs))
    same = next((i for i in range(length) if ours[i] != theirs[i]), length)
    if same == len(ours) == len(theirs):
        return Greedy(name, len(ours), same)
    logits = out.logits[same][0].float()
    top = logits.topk(2).values
    chosen = theirs[same] if same < len(theirs) else end
    rank = int((logits > logits[chosen]).sum())
    return Greedy(name, len(ours), same, float(top[0] - top[1]), rank)


def compare_tokenizer(tokenizer: Any, client: Server, texts: list[Path]) -> dict[str, Any]:
    """Return for each text its number of tokens and the first differing position, or None."""
    results = {}
    for path in texts:
        text = path.read_text()
        ours, theirs = tokenizer(text, verbose=False)["input_ids"], client.tokenize(text)
        length = min(len(ours), len(theirs))
        first = next((i for i in range(length) if ours[i] != theirs[i]), length)
        same = len(ours) == len(theirs) == first
        results[path.name] = {
            "tokens": len(ours),
            "differs_at": None if same else first,
            "ours": [] if same else ours[first - 2 : first + 6],
            "theirs": [] if same else theirs[first - 2 : first + 6],
        }
    return results


def compare_chats(tokenizer: Any, client: Server) -> list[dict[str, str]]:
    """Return the chats whose prompts differ in ids.

    The texts may differ in BOS: llama.cpp's tokenizer adds it, transformers' template writes it.
    """
    different = []
    for messages in CHATS:
        ours = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        theirs = client.chat_prompt(messages)
        if tokenizer(ours, add_special_tokens=False)["input_ids"] != client.tokenize(theirs):
            different.append({"transformers": ours, "llama.cpp": theirs})
    return different


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a converted folder")
    parser.add_argument("gguf", type=Path, help="its export")
    parser.add_argument("--build", type=Path, required=True, help="llama.cpp's programs")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--tokens", type=int, default=48, help="greedy tokens per prompt")
    parser.add_argument("--kernels", default="auto", help="our kernels: native or torch")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.folder)
    model = loader.from_pretrained(options.folder, dtype=torch.float32, kernels=options.kernels)
    log = Path(tempfile.gettempdir()) / "llama-server.log"
    with server(options.build, options.gguf, 512, log) as client:
        texts = compare_tokenizer(tokenizer, client, options.text)
        chats = compare_chats(tokenizer, client) if tokenizer.chat_template else None
        greedy = [
            compare_greedy(model, client, prompt, tokenizer(prompt)["input_ids"], options.tokens)
            for prompt in PROMPTS
        ]
    result = {"texts": texts, "chats": chats, "greedy": [asdict(one) for one in greedy]}
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for name, text in texts.items():
        where = text["differs_at"]
        print(f"{name}: {text['tokens']} tokens,", "same ids" if where is None else text)
    print("chat:", "no template" if chats is None else chats or "same prompts")
    for one in greedy:
        parts = "" if one.gap is None else f", gap {one.gap:.4f}, their token's rank {one.rank}"
        print(f"greedy: {one.same} of {one.tokens} tokens the same{parts}: {one.prompt!r}")


if __name__ == "__main__":
    main()
