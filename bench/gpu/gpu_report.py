"""The report of bench/gpu/run.py: rows, the machine, and the bars that were met."""

from collections.abc import Iterable
from typing import Any, NamedTuple

Row = dict[str, Any]

SMI_FIELDS = (
    "uuid",
    "driver_version",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "clocks.max.memory",
    "power.limit",
)
"""What nvidia-smi is asked for."""

KERNEL_BAR = 0.70
"""Of a copy within the GPU, at one token."""
LINK_BAR = 0.85
"""Of the tokens a second that the link allows."""
PREFETCH_BAR = 1.0
"""Tokens a second with prefetch over those without."""


class Bar(NamedTuple):
    """A lower bound for a measured value. value, met: None if nothing was measured."""

    name: str
    value: float | None
    least: float

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value >= self.least

    def __str__(self) -> str:
        if self.value is None:
            return f"not measured  {self.name}, at least {self.least:.2f}"
        verdict = "met" if self.met else "NOT MET"
        return f"{verdict:13} {self.name}: {self.value:.3f}, at least {self.least:.2f}"


def bars(result: Row) -> list[Bar]:
    """Return the project's bars with the measured values: the worst row of each."""
    kernels = [row for row in result.get("kernels", []) if row["tokens"] == 1]
    found = [
        Bar(
            f"kernel over device copy, one token, {what}",
            _least(r["share"] for r in kernels if r["what"] == what),
            KERNEL_BAR,
        )
        for what in ("experts", "attention")
    ]
    decode = result.get("decode", [])
    prefetch = [row for row in decode if row["pair"].startswith("prefetch")]
    shares = (row["b"]["share_of_link"] for row in prefetch if row["b"]["cpu_share"] == "off")
    return [
        *found,
        Bar(
            "decoding over what the link allows, prefetch on, CPU share off",
            _least(shares),
            LINK_BAR,
        ),
        Bar("prefetch over no prefetch", _least(row["ratio"] for row in prefetch), PREFETCH_BAR),
    ]


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def line(section: str, row: Row) -> str:
    """Return a row as text; nested rows come after their name."""
    return f"{section:9} " + "  ".join(_parts("", row))


def _parts(prefix: str, row: Row) -> list[str]:
    result: list[str] = []
    for key, value in row.items():
        name = prefix + key
        if isinstance(value, dict):
            result += _parts(f"{name}.", value)
        elif isinstance(value, list):
            result.append(f"{name} {','.join(_text(one) for one in value)}")
        else:
            result.append(f"{name} {_text(value)}")
    return result


def _text(value: Any) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1e4
        else str(round(value) if isinstance(value, float) else value)
    )


def parse_smi(text: str, uuid: str) -> dict[str, str]:
    """Parse nvidia-smi's CSV (SMI_FIELDS, no header, no units); return the line of the GPU `uuid`.

    Empty if there is no such line.
    """
    for row in text.splitlines():
        values = [value.strip() for value in row.split(",")]
        if len(values) == len(SMI_FIELDS) and values[0].removeprefix("GPU-") == uuid.removeprefix(
            "GPU-"
        ):
            return dict(zip(SMI_FIELDS[1:], values[1:], strict=True))
    return {}
