"""The sections of a model card that a reader copies: install, generate, Python, chat, server."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from converter.publish.card_markdown import block
from formats.artifact import Artifact
from formats.config.strict_json import parse
from formats.errors import MoeConvertError
from formats.files.paths import read_small
from formats.install import INSTALL, INSTALL_TORCH_FOR_CPU, install_extra
from formats.sizes import format_size

FOLDER = "."
"""Name of a model that is not published: its lines run in its folder."""
_TEXT_PROMPT = "Once upon a time"
_CHAT_PROMPT = "Write a short poem about the sea."
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Usage:
    """Facts for the lines that load the model.

    name: the repository, or FOLDER. revision: a branch other than main, or None. has_template: True
    if the tokenizer has a chat template. download_bytes: of all files.
    """

    name: str
    revision: str | None
    has_template: bool
    download_bytes: int

    @classmethod
    def of(cls, artifact: Artifact, name: str, revision: str | None) -> "Usage":
        """Return the facts of a converted folder."""
        index = artifact.index
        return cls(name, revision, _has_template(artifact), index.weight_bytes)

    def command(self, command: str, options: str = "") -> str:
        """Return a line of a shell: `moe-convert COMMAND MODEL`."""
        revision = f" --revision {shlex.quote(self.revision)}" if self.revision else ""
        return f"moe-convert {command} {self.name}{revision}{options}"


def install_lines() -> Iterator[str]:
    """Yield the section on installing."""
    yield "You need Linux and Python 3.11 or newer."
    yield "Without an NVIDIA GPU, install torch for the CPU first: it is much smaller."
    yield ""
    yield from block("bash", INSTALL_TORCH_FOR_CPU)
    yield ""
    yield "Then install moe-convert:"
    yield ""
    yield from block("bash", INSTALL)


def generate_lines(usage: Usage) -> Iterator[str]:
    """Yield the section on the command line."""
    prompt = shlex.quote(_CHAT_PROMPT if usage.has_template else _TEXT_PROMPT)
    yield from block("bash", usage.command("generate", f" --prompt {prompt}"))
    yield ""
    if not usage.has_template:
        yield "The output continues the prompt."
    if usage.name == FOLDER:
        yield "Run the commands of this page in the folder that holds this file."
    else:
        size = format_size(usage.download_bytes)
        yield f"The first start downloads {size} into huggingface_hub's cache."
        yield "With `--lazy`, the text begins before everything is downloaded."
    yield "`--ram-cache` limits the memory, see [Memory](#memory)."


def python_lines(usage: Usage) -> Iterator[str]:
    """Yield the section on Python."""
    arguments = json.dumps(usage.name)
    if usage.revision:
        arguments += f", revision={json.dumps(usage.revision)}"
    lines = [
        "import loader",
        "",
        f"model = loader.from_pretrained({arguments})",
        f"tokenizer = loader.load_tokenizer({arguments})",
    ]
    if usage.has_template:
        lines += [
            f'messages = [{{"role": "user", "content": {json.dumps(_CHAT_PROMPT)}}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
            "output = model.generate(**inputs, max_new_tokens=128)",
            'answer = output[0, inputs["input_ids"].shape[1] :]',
            "print(tokenizer.decode(answer, skip_special_tokens=True))",
        ]
    else:
        lines += [
            f'inputs = tokenizer({json.dumps(_TEXT_PROMPT)}, return_tensors="pt").to(model.device)',
            "output = model.generate(**inputs, max_new_tokens=128)",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    yield from block("python", *lines)
    yield ""
    yield "The package moe-convert has the module `loader`."
    yield "`model` is a model of transformers."
    yield "After `import loader`, `AutoModelForCausalLM` and `pipeline` load this model too."


def chat_lines(usage: Usage) -> Iterator[str]:
    """Yield the section on chats and the server."""
    yield from block("bash", usage.command("chat"))
    yield ""
    yield "Type a message and press Enter; Ctrl-D leaves."
    if not usage.has_template:
        yield "This model has no chat template: it continues your text and does not answer it."
    yield ""
    yield "A server with OpenAI's API at http://127.0.0.1:8000/v1:"
    yield ""
    yield from block("bash", install_extra("serve"), usage.command("serve"))


def _has_template(artifact: Artifact) -> bool:
    names = {file.file for file in artifact.index.files}
    if not names.isdisjoint(_TEMPLATE_FILES):
        return True
    if _CONFIG not in names:
        return False
    try:
        config = parse(read_small(artifact.folder, _CONFIG, str(artifact.folder)), _CONFIG)
    except MoeConvertError:
        # The loader reports a broken file.
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))
