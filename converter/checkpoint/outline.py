"""A checkpoint as its config.json describes it; no shard is opened."""

from dataclasses import dataclass
from pathlib import Path

from converter.checkpoint.model_shape import ModelShape
from converter.checkpoint.shards.source_kinds import check_folder
from converter.checkpoint.weight import Weight
from formats.config.checkpoint_config import read_config
from formats.index import Architecture

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Outline:
    """The model's shape, the trunk's tensors and the experts' dtypes.

    All tensors have config.json's dtype, or bfloat16 where it names none.
    """

    shape: ModelShape
    trunk: dict[str, Weight]
    expert_dtypes: set[str]
    adapter_bytes: int = 0
    """An outline has no adapters."""

    @property
    def architecture(self) -> Architecture:
        """The model's sizes and counts."""
        return self.shape.architecture

    @classmethod
    def of_folder(cls, folder: Path) -> "Outline":
        """Read config.json in `folder`; SourceError unless this release converts the model."""
        check_folder(folder)
        config = read_config(folder)
        shape = ModelShape(config, str(folder / "config.json"))
        dtype = _DTYPES[config.get("dtype") or "bfloat16"]
        trunk = {name: Weight(name, "", dtype, size, 0) for name, size in shape.trunk.items()}
        return cls(shape, trunk, {dtype})
