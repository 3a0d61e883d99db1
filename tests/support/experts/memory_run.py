"""A child process of test_loader_memory.py: load a folder, generate, and print the memory used.

Arguments: folder, options of from_pretrained as JSON, tokens of the prompt, new tokens.
"""

import json
import sys
from pathlib import Path

import torch

import loader


class Watch:
    """A streamer that notes the largest anonymous memory of this process after the prompt and each
    token, in bytes.
    """

    def __init__(self) -> None:
        self.most = 0

    def put(self, value: object) -> None:
        status = Path("/proc/self/status").read_text()
        self.most = max(self.most, int(status.split("RssAnon:")[1].split()[0]) * 1024)

    def end(self) -> None:
        pass


def main() -> None:
    folder, options, prompt, tokens = (
        sys.argv[1],
        json.loads(sys.argv[2]),
        int(sys.argv[3]),
        int(sys.argv[4]),
    )
    model = loader.from_pretrained(folder, **options)
    ids = torch.randint(
        model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)
    )
    watch = Watch()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=watch,
        )
    stats = model.moe_stats()
    result = {
        "most": watch.most,
        "ids": out[0].tolist(),
        "bytes_read": stats.total.bytes_read,
        "slots": stats.slots,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
