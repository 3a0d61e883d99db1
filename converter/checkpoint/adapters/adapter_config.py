"""adapter_config.json: which options of PEFT are merged, and which are refused."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from formats.config.field_rules import short
from formats.config.strict_json import parse, typed
from formats.errors import FormatError, SourceError

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20

_Rank = Annotated[int, Meta(ge=1, le=1 << 16)]
_Name = Annotated[str, Meta(max_length=1000)]
_Names = Annotated[list[_Name], Meta(max_length=100_000)]
_Layer = Annotated[int, Meta(ge=0, le=1000)]

_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base model's weights as they are."""
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Fields that decide nothing in a merge: those of training, of its start, of other options."""
GET_AGAIN_HINT = "download or copy the adapter again, or save it again with peft"
OTHER_BASE_HINT = "name the base model that the adapter was trained on"
MERGE_WITH_PEFT_HINT = (
    "merge it with peft, where it was trained: model.merge_and_unload().save_pretrained(FOLDER);"
    " then convert FOLDER"
)


class AdapterConfig(Struct, frozen=True):
    """The fields of adapter_config.json that decide a merge, with PEFT's defaults."""

    peft_type: str
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    r: _Rank = 8
    lora_alpha: int | float = 8
    target_modules: _Names | _Name | None = None
    target_parameters: _Names | None = None
    exclude_modules: _Names | _Name | None = None
    layers_to_transform: list[_Layer] | _Layer | None = None
    layers_pattern: _Names | _Name | None = None
    rank_pattern: dict[_Name, _Rank] | None = None
    alpha_pattern: dict[_Name, int | float] | None = None
    modules_to_save: _Names | None = None
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str | None = True

    @property
    def peft_options(self) -> dict[str, Any]:
        """The arguments of peft.LoraConfig, without those that only training uses."""
        options = {name: getattr(self, name) for name in self.__struct_fields__}
        for name in ("peft_type", "task_type", "base_model_name_or_path"):
            del options[name]
        for name in ("rank_pattern", "alpha_pattern"):
            options[name] = options[name] or {}
        # The values come from the file; a start would only cost time.
        return options | {"init_lora_weights": False, "inference_mode": True}


def parse_adapter_config(data: bytes, where: str) -> AdapterConfig:
    """Parse adapter_config.json.

    Raises SourceError for another kind of adapter than LoRA, and for an option that cannot be
    merged, with its name.
    """
    try:
        value = parse(data, where, max_bytes=MAX_CONFIG_BYTES)
    except FormatError as e:
        raise SourceError(e.message, GET_AGAIN_HINT) from None
    if not isinstance(value, dict):
        raise SourceError(f"{where}: not an object", GET_AGAIN_HINT)
    kind = value.get("peft_type")
    if kind != "LORA":
        raise SourceError(
            f"{where}: peft_type is {short(kind)}; this release merges LORA",
            MERGE_WITH_PEFT_HINT,
        )
    try:
        config = typed(value, AdapterConfig, where)
    except FormatError as e:
        raise SourceError(e.message, GET_AGAIN_HINT) from None
    for name, given in sorted(value.items()):
        if name in AdapterConfig.__struct_fields__ or name in _WITHOUT_EFFECT or not given:
            continue
        raise SourceError(
            f"{where}: {name} is {short(given)}; this release cannot merge that option",
            MERGE_WITH_PEFT_HINT,
        )
    _check_values(config, where)
    return config


def _check_values(config: AdapterConfig, where: str) -> None:
    if config.task_type not in (None, "CAUSAL_LM"):
        raise SourceError(
            f"{where}: task_type is {short(config.task_type)}, expected is CAUSAL_LM",
            "use an adapter of the language model",
        )
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise SourceError(
            f"{where}: init_lora_weights is {short(config.init_lora_weights)}: it changes the base"
            " model's weights at the start of training",
            f"save the adapter as plain LoRA (peft's path_initial_model_for_weight_conversion), or"
            f" {MERGE_WITH_PEFT_HINT}",
        )
