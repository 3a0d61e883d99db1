"""Keys of records: a unit of work, a complete layer file, or a shard of the source."""

from msgspec import Struct


class ExpertKey(Struct, frozen=True):
    """One expert of a layer."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"expert {self.layer} {self.expert}"


class LinearKey(Struct, frozen=True):
    """One packed matrix of the trunk, by the path of its module."""

    module: str

    def __str__(self) -> str:
        return f"linear {self.module}"


class TensorKey(Struct, frozen=True):
    """One tensor of the trunk that is copied unchanged."""

    name: str

    def __str__(self) -> str:
        return f"tensor {self.name}"


class LayerKey(Struct, frozen=True):
    """The complete file of a layer's experts."""

    layer: int


class ShardKey(Struct, frozen=True):
    """One shard of the source, by its file name."""

    name: str


UnitKey = ExpertKey | LinearKey | TensorKey
RecordKey = UnitKey | LayerKey | ShardKey
"""A later record replaces one with the same key."""
