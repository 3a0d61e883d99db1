"""Base classes of objects that a copied model makes again or shares."""

from typing import Any


class Derived:
    """An object that depends on the addresses of weights.

    In a copy (copy.deepcopy or pickle) it is None, and the copied model makes a new one.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()


class Shared:
    """An object without state of one model. A copy of the model shares it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self
