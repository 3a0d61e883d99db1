"""What a copy of a model takes over: weights. What was made of weights where they lie, it makes
again.
"""

from typing import Any


class Derived:
    """Addresses of weights, prepared calls: None in a copy (copy.deepcopy, pickle), which then
    makes its own.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()


class Shared:
    """Something without state of a model's own: a copy of the model has the same one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self
