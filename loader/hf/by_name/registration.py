"""Puts converted models into transformers' registries, as soon as these are imported.

`import loader` imports neither torch nor transformers. transformers has no registry of plugins that
it would look into by itself; so the registration waits, by Python's import hook, for the modules
that hold the registries. It must not import a modeling module then: those import the registries in
the middle of their own import. So what is registered is a `RegistryEntry`, which imports the class
when it is used.
"""

import logging

from formats.config.model_types import MODEL_TYPES
from loader.hf.by_name.import_hook import after_import

_log = logging.getLogger(__name__)


def register_with_transformers() -> None:
    """Let AutoModelForCausalLM, and what loads by it, take converted folders."""
    after_import("transformers.models.auto.modeling_auto", _register_models)
    after_import("transformers.quantizers.auto", _register_plugin)


def _register_models() -> None:
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from loader.hf.by_name.registry_entry import entry_for

    for model_type in MODEL_TYPES:
        causal_class = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
        if causal_class is None:
            _log.info("this release of transformers has no model type %s", model_type)
            continue
        config_class = CONFIG_MAPPING[model_type]
        entry = entry_for(config_class, causal_class)
        modeling_auto.AutoModelForCausalLM.register(config_class, entry, exist_ok=True)
        # transformers' server asks only this list whether it loads a model by an Auto class or by
        # getattr(transformers, class name), which no registry reaches.
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(model_type, causal_class)
        modeling_auto.AutoModelForMultimodalLM.register(config_class, entry, exist_ok=True)


def _register_plugin() -> None:
    from loader.hf.loading.plugin import register_plugin

    register_plugin()
