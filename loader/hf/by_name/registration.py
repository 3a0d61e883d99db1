"""Adds converted models to transformers' registries once transformers is imported.

`import loader` imports neither torch nor transformers, and transformers does not search for
plugins. So an import hook waits for the modules that hold the registries. At that moment no
modeling module may be imported: modeling modules import the registries in the middle of their own
import. Therefore a `RegistryEntry` is registered, which imports the real class at its first use.
"""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from formats.config.model_types import MODEL_TYPES
from loader.hf.by_name.import_hook import after_import

_log = logging.getLogger(__name__)


_MODELING_AUTO = "transformers.models.auto.modeling_auto"
_PLUGIN = "loader.hf.loading.plugin"


def register_with_transformers(import_load: Callable[[], Any]) -> None:
    """Make AutoModelForCausalLM, and all code that loads through it, accept converted folders.

    import_load: imports and returns loader.from_pretrained; called when a converted folder loads.
    """
    after_import(_MODELING_AUTO, functools.partial(_register_models, import_load))
    for model_type in MODEL_TYPES:
        register_model = functools.partial(_register_model, model_type, import_load)
        after_import(_configuration_module(model_type), register_model)
    after_import("transformers.quantizers.auto", _register_plugin)
    after_import(_PLUGIN, _register_plugin)


def _register_models(import_load: Callable[[], Any]) -> None:
    for model_type in MODEL_TYPES:
        _register_model(model_type, import_load)


def _register_model(model_type: str, import_load: Callable[[], Any]) -> None:
    """Register one model type, unless one of the two modules that this needs is half imported.

    The import of a configuration can import the registries before it has made its class. Then the
    end of the configuration's import registers it.
    """
    if not hasattr(sys.modules.get(_MODELING_AUTO), "AutoModelForMultimodalLM"):
        return
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    from loader.hf.by_name.registry_entry import entry_for

    causal_class = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if causal_class is None:
        _log.info("model type %s is unknown to this release of transformers", model_type)
        return
    configuration = sys.modules.get(_configuration_module(model_type))
    if configuration is not None and not hasattr(configuration, CONFIG_MAPPING_NAMES[model_type]):
        return
    config_class = CONFIG_MAPPING[model_type]
    entry = entry_for(config_class, causal_class, import_load)
    modeling_auto.AutoModelForCausalLM.register(config_class, entry, exist_ok=True)
    # `transformers serve` looks the model type up in this list. Without an entry it loads by
    # getattr(transformers, class name), which bypasses the registries.
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(model_type, causal_class)
    modeling_auto.AutoModelForMultimodalLM.register(config_class, entry, exist_ok=True)


def _configuration_module(model_type: str) -> str:
    return f"transformers.models.{model_type}.configuration_{model_type}"


def _register_plugin() -> None:
    """Register the quantizer, unless the plugin is half imported: the end of its import does it."""
    if _PLUGIN in sys.modules and not hasattr(sys.modules[_PLUGIN], "register_plugin"):
        return
    from loader.hf.loading.plugin import register_plugin

    register_plugin()
