"""Classes for transformers' registries whose from_pretrained also accepts converted folders."""

from collections.abc import Callable
from typing import Any

import transformers


class RegistryEntry(type):
    """Metaclass of the entries.

    It forwards everything except `from_pretrained` to the plain class, which it imports at the
    first use.
    """

    config_class: Any
    import_load: Callable[[], Any]
    """Imports and returns loader.from_pretrained."""

    @property
    def plain_class(cls) -> Any:
        """The transformers class with the same name."""
        return getattr(transformers, cls.__name__)

    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a model: converted ones by loader.from_pretrained, others by the plain class.

        Raises NotConvertedError for an unfinished conversion, RecipeError for an argument that a
        converted model does not support, and the errors of loader.from_pretrained.
        """
        from loader.hf.by_name.load_by_name import NamedFolder

        folder = NamedFolder.from_call(name, config, cls.config_class, kwargs)
        if folder is None:
            return cls.plain_class.from_pretrained(name, *args, config=config, **kwargs)
        return folder.load(cls.import_load(), args, kwargs)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.plain_class(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.plain_class, name)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.plain_class)

    def __subclasscheck__(cls, subclass: Any) -> bool:
        return issubclass(subclass, cls.plain_class)


def entry_for(
    config_class: Any, causal_class: str, import_load: Callable[[], Any]
) -> RegistryEntry:
    """Return the entry for a transformers class.

    config_class: the class of its configuration. causal_class: its name. import_load: imports and
    returns loader.from_pretrained.
    """
    # transformers treats a class from any other module as the user's own code.
    module = config_class.__module__.replace(".configuration_", ".modeling_")
    attributes = {
        "config_class": config_class,
        "import_load": import_load,
        "__module__": module,
    }
    return RegistryEntry(causal_class, (), attributes)
