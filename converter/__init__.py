"""Converts a mixture-of-experts checkpoint to the expert-addressable format of moe-convert."""

__version__ = "0.1.0"
