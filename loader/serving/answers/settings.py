"""Sampling and length of one answer by transformers' generate."""

from dataclasses import dataclass, replace
from typing import Any

from formats.errors import RecipeError

MIN_TEMPERATURE = 0.01
"""Below, logits divided by the temperature overflow a float."""


@dataclass(frozen=True)
class GenerationSettings:
    """Sampling and length of one answer. None: not set.

    Decoding is greedy if no sampling field is set, or if temperature is 0. stop: strings that end
    the answer and are cut from it. RecipeError names a field that is out of range.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more")
        temperature = self.temperature
        in_range = temperature is None or temperature == 0 or MIN_TEMPERATURE <= temperature <= 100
        _check("temperature", temperature, in_range, f"0 (greedy) or {MIN_TEMPERATURE} to 100")
        _check(
            "top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "more than 0, at most 1"
        )
        _check(
            "top_k",
            self.top_k,
            self.top_k is None or 0 <= self.top_k < 1 << 31,
            "0 (off) or a number of tokens",
        )
        _check("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "0 to 1")
        penalty = self.repetition_penalty
        _check(
            "repetition_penalty", penalty, penalty is None or 0.01 <= penalty <= 100, "0.01 to 100"
        )
        _check("seed", self.seed, self.seed is None or -(1 << 63) <= self.seed < 1 << 63, "64 bits")
        _check("stop", self.stop, all(self.stop), "strings that are not empty")

    @property
    def samples(self) -> bool:
        """True for sampling, False for greedy decoding."""
        chosen = (self.temperature, self.top_p, self.top_k, self.min_p)
        return self.temperature != 0 and any(value is not None for value in chosen)

    def filled_from(self, config: Any) -> "GenerationSettings":
        """Return these settings with unset fields filled from a model's generation_config."""
        if not config.do_sample or self.temperature == 0:
            return self
        names = ("temperature", "top_p", "top_k", "min_p")
        defaults: dict[str, Any] = {
            name: getattr(config, name, None) for name in names if getattr(self, name) is None
        }
        filled = replace(self, **defaults)
        return filled if filled.temperature is not None else replace(filled, temperature=1.0)

    def arguments(self) -> dict[str, Any]:
        """Return arguments for transformers' generate. Greedy decoding overrides the sampling of
        generation_config.json.
        """
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.samples,
        }
        if self.samples:
            arguments |= {
                "temperature": self.temperature or 1.0,
                "top_p": self.top_p or 1.0,
                "top_k": self.top_k or 0,
            }
            arguments["min_p"] = self.min_p
        else:
            arguments |= {"temperature": None, "top_p": None, "top_k": None, "min_p": None}
        if self.repetition_penalty is not None:
            arguments["repetition_penalty"] = self.repetition_penalty
        return arguments


def _check(name: str, value: Any, is_right: bool, expected: str) -> None:
    if not is_right:
        raise RecipeError(f"{name}: {value!r} is out of range", f"expected {expected}")
