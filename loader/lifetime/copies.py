"""Base classes that say what a copy of a model does with an object: make it again, or share it."""

from typing import Any


class Derived:
    """An object that depends on addresses of weights: None in a copy, which makes its own.

    A copy is one of copy.deepcopy or pickle.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()


class Shared:
    """An object without state of one model: a copy of the model shares it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self
