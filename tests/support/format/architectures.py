"""The architecture and the trunk of a model whose config.json is given, for tests."""

from typing import Any

from converter.checkpoint.model_shape import ModelShape
from formats.config.config_gate import gate_config
from formats.errors import FormatError
from formats.index import Architecture


def shape_of(config: dict[str, Any]) -> ModelShape:
    """The model of a config.json."""
    fields, _ = gate_config(config, "config.json", error=FormatError)
    return ModelShape(fields, "config.json")


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The architecture of a config.json's model."""
    return shape_of(config).architecture
