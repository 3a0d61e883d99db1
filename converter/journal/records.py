"""Records of finished work: one class for each kind; the JSON field `unit` names the kind."""

from typing import Annotated

from msgspec import Meta, Struct

from converter.journal.keys import ExpertKey, LayerKey, LinearKey, RecordKey, ShardKey, TensorKey
from converter.squared_error import SquaredError
from formats.index import Label, Natural, Sha256, Xxh3
from formats.writer import Place


class _Record(
    Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="unit"
):
    @property
    def key(self) -> RecordKey:
        raise NotImplementedError


class ProjectionErrors(Struct, frozen=True, forbid_unknown_fields=True):
    """Errors of an expert's three matrices."""

    gate: SquaredError
    up: SquaredError
    down: SquaredError


class ExpertRecord(_Record, frozen=True, tag="expert"):
    """One expert, durable in the layer's partial file.

    sha256, xxh3: of its bytes before compression. calibration_tokens: number of tokens that reached
    it. uncalibrated: projections that a calibrated conversion quantized without calibration.
    """

    layer: Natural
    expert: Natural
    sha256: Sha256
    xxh3: Xxh3
    errors: ProjectionErrors
    calibration_tokens: Natural | None = None
    uncalibrated: list[Label] = []

    @property
    def key(self) -> ExpertKey:
        return ExpertKey(self.layer, self.expert)


class LinearRecord(_Record, frozen=True, tag="linear"):
    """One packed matrix of the trunk.

    xxh3: of its stored bytes. uncalibrated: True if a calibrated conversion quantized it without
    calibration.
    """

    module: Label
    xxh3: Xxh3
    errors: SquaredError
    uncalibrated: bool = False

    @property
    def key(self) -> LinearKey:
        return LinearKey(self.module)


class TensorRecord(_Record, frozen=True, tag="tensor"):
    """One tensor of the trunk that is copied unchanged. xxh3: of its stored bytes."""

    name: Label
    xxh3: Xxh3

    @property
    def key(self) -> TensorKey:
        return TensorKey(self.name)


class LayerRecord(_Record, frozen=True, tag="layer"):
    """A layer file that is complete and has its final name. places: of its experts, in order."""

    layer: Natural
    size_bytes: Natural
    header_sha256: Sha256
    places: Annotated[list[Place], Meta(min_length=1)]

    @property
    def key(self) -> LayerKey:
        return LayerKey(self.layer)


class ShardRecord(_Record, frozen=True, tag="shard"):
    """One shard of the source. sha256: of the whole file."""

    name: Label
    sha256: Sha256

    @property
    def key(self) -> ShardKey:
        return ShardKey(self.name)


UnitRecord = ExpertRecord | LinearRecord | TensorRecord
Record = ExpertRecord | LinearRecord | TensorRecord | LayerRecord | ShardRecord
