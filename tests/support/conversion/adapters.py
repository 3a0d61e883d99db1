"""LoRA adapters for tests: made by PEFT, merged by PEFT, and those of older transformers."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from converter.checkpoint.adapters.adapter_folder import AdapterFolder
from converter.convert import ConvertOptions, convert_checkpoint
from converter.recipe.recipes import make_recipe

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}


def make_adapter(base: Path, folder: Path, seed: int = 0, **options: Any) -> Path:
    """Write an adapter with random weights for the checkpoint `base`; options: LoraConfig's."""
    torch.manual_seed(seed)
    fields = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **QV, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        tuned = get_peft_model(model, LoraConfig(init_lora_weights=False, **fields))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if ".modules_to_save." in name:
                    parameter += 0.1 * torch.randn_like(parameter)
        tuned.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, folder: Path, *adapters: Path) -> Path:
    """Write the checkpoint `base` with the adapters merged by PEFT, one after the other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        model.save_pretrained(folder)
    return folder


def make_expert_adapter(folder: Path, config: Any, names: dict[str, str], router: str) -> Path:
    """Write an adapter as PEFT did with transformers 4: linears of single experts, and the router.

    config: of the model. names: projection -> module path with {layer} and {expert}, in the names
    of transformers 4. router: the same for the router.
    """
    generator = torch.Generator().manual_seed(5)
    hidden = config.hidden_size
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    tensors: dict[str, torch.Tensor] = {}

    def add(path: str, rows: int, columns: int) -> None:
        a = torch.randn(4, columns, generator=generator) * 0.3
        b = torch.randn(rows, 4, generator=generator) * 0.3
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b

    for layer in range(config.num_hidden_layers):
        add(router.format(layer=layer), experts, hidden)
        for expert in range(experts):
            for projection, name in names.items():
                shape = (hidden, inner) if projection == "down" else (inner, hidden)
                add(name.format(layer=layer, expert=expert), *shape)
    targets = [name.rpartition(".")[2] for name in (*names.values(), router)]
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    options = LoraConfig(r=4, lora_alpha=8, target_modules=targets).to_dict()
    options["target_modules"] = sorted(targets)
    (folder / CONFIG).write_text(json.dumps(options))
    return folder


def change_config(folder: Path, **fields: Any) -> None:
    """Change fields of adapter_config.json."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(folder: Path, change: Any) -> None:
    """Write change(tensors) as the adapter's tensors."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def convert_with(
    source: Path, out: Path, *adapters: Path, recipe: Any = None, **options: Any
) -> dict[str, str]:
    """Convert with adapters; return the sha256 of trunk and layer files by name."""
    opened = [AdapterFolder.open(str(adapter)) for adapter in adapters]
    convert_checkpoint(
        source,
        out,
        recipe or make_recipe("2bit", solver="hqq"),
        ConvertOptions(**options),
        adapters=opened,
    )
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*.safetensors"))
    }
