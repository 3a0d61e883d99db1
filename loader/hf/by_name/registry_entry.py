"""What stands in transformers' registries for a causal model: its `from_pretrained` takes converted
folders too.
"""

from typing import Any

import transformers


class RegistryEntry(type):
    """The class of such an entry. All but `from_pretrained` is that of the plain class, imported
    when it is needed.
    """

    config_class: Any

    @property
    def plain_class(cls) -> Any:
        """transformers' class of that name."""
        return getattr(transformers, cls.__name__)

    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """A converted folder, or a repository of one, as loader.from_pretrained loads it; others by
        the plain class.

        Raises NotConvertedError for an unfinished conversion, RecipeError for an argument that a
        converted model does not support, and what loader.from_pretrained raises.
        """
        from loader.hf.by_name.load_by_name import NamedFolder

        folder = NamedFolder.of(name, config, cls.config_class, kwargs)
        if folder is None:
            return cls.plain_class.from_pretrained(name, *args, config=config, **kwargs)
        return folder.load(args, kwargs)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.plain_class(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.plain_class, name)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.plain_class)

    def __subclasscheck__(cls, subclass: Any) -> bool:
        return issubclass(subclass, cls.plain_class)


def entry_for(config_class: Any, causal_class: str) -> RegistryEntry:
    """Return the entry for transformers' class `causal_class`, whose configuration is a
    `config_class`.
    """
    # transformers takes a class of another module for a user's own code.
    module = config_class.__module__.replace(".configuration_", ".modeling_")
    return RegistryEntry(causal_class, (), {"config_class": config_class, "__module__": module})
