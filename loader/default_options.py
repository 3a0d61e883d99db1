"""`loader.defaults`: options of loader.from_pretrained for callers that cannot pass them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any, ParamSpec, TypeVar

from loader.cuda.device_choice import Devices
from loader.option_values import check_options

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class DefaultOptions:
    """Arguments of loader.from_pretrained; None for an option that was not given.

    Raises RecipeError for a wrong value.
    """

    device: Devices = None
    gpu_cache: int | str | None = None
    ram_cache: int | str | None = None
    slots: Sequence[int] | None = None
    io: str | None = None
    policy: str | None = None
    prefetch: int | str | None = None
    cpu_share: str | None = None
    check: str | None = None
    kernels: str | None = None
    kv_bits: int | None = None

    def __post_init__(self) -> None:
        check_options(**self.given)

    @property
    def given(self) -> dict[str, Any]:
        """Option -> value, only for options that were given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


_NONE_GIVEN = DefaultOptions()
_CURRENT: ContextVar[DefaultOptions] = ContextVar(
    "moe_convert_default_options", default=_NONE_GIVEN
)


def defaults(**options: Any) -> AbstractContextManager[None]:
    """Return a context in which models load with these options, for callers that cannot pass them.

    options: device, gpu_cache, ram_cache, slots, io, policy, prefetch, cpu_share, check, kernels,
    kv_bits, as loader.from_pretrained takes them. An option of the loading call itself wins.

    A nested context keeps the outer options that it does not name. The options hold in this thread,
    and in asyncio's tasks and threads that start in it; not in other threads.
    Raises RecipeError for an unknown value, before the context is entered.
    """
    return _inside(DefaultOptions(**options))


@contextmanager
def _inside(options: DefaultOptions) -> Iterator[None]:
    token = _CURRENT.set(replace(_CURRENT.get(), **options.given))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def with_defaults(load: Callable[P, R]) -> Callable[P, R]:
    """Wrap `load`: options that its caller does not give come from `defaults`."""

    @functools.wraps(load)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        options: Any = {**_CURRENT.get().given, **kwargs}
        return load(*args, **options)

    return call
