"""`loader.defaults`: options of loader.from_pretrained for callers that cannot pass them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any, ParamSpec, TypeVar

from loader.cuda.device.choice import Devices
from loader.option_values import check_options

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class DefaultOptions:
    """Options as the arguments of loader.from_pretrained; None where none was given. RecipeError
    for a wrong value.
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

    def __post_init__(self) -> None:
        check_options(**self.given)

    @property
    def given(self) -> dict[str, Any]:
        """Option -> value, of those that were given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


_NONE_GIVEN = DefaultOptions()
_CURRENT: ContextVar[DefaultOptions] = ContextVar(
    "moe_convert_default_options", default=_NONE_GIVEN
)


def defaults(**options: Any) -> AbstractContextManager[None]:
    """Inside a `with`, models are loaded with these options wherever the call that loads one does
    not give them.

    options: those of `DefaultOptions`, as loader.from_pretrained takes them: device, gpu_cache,
    ram_cache, slots, io, policy, prefetch, cpu_share, check, kernels. One `with` inside another
    keeps the outer options that the inner one does not name. They hold in this thread, and in tasks
    and threads of asyncio that begin there; not in other threads. RecipeError naming an option with
    a wrong value.
    """
    # Checked before the `with`.
    return _inside(DefaultOptions(**options))


@contextmanager
def _inside(options: DefaultOptions) -> Iterator[None]:
    token = _CURRENT.set(replace(_CURRENT.get(), **options.given))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def with_defaults(load: Callable[P, R]) -> Callable[P, R]:
    """Return `load`, to which the options of `defaults` are given where the caller gives none."""

    @functools.wraps(load)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        options: Any = {**_CURRENT.get().given, **kwargs}
        return load(*args, **options)

    return call
