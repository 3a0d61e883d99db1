"""Registration with transformers: the import hook and the entries of the registries."""

import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import loader
from formats.config.model_types import MODEL_TYPES
from loader.hf.by_name.import_hook import after_import
from loader.hf.by_name.registry_entry import RegistryEntry
from loader.hf.model_class import served_class


@pytest.fixture(scope="module")
def folder(converted: Callable[[str], Path]) -> Path:
    return converted("2bit")


def run_python(code: str, *arguments: object) -> str:
    """Return the output of `code` in a new process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, check=True, text=True, stdout=subprocess.PIPE
    ).stdout


LATE = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except OSError as e:
    print("no file named" in str(e))
import loader
print(hasattr(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "moe_stats"))
"""


def test_transformers_refuses_the_folder_until_the_loader_is_imported(folder: Path) -> None:
    assert run_python(LATE, folder).split() == ["True", "True"]


EARLY = """
import sys
import loader
print({"torch", "transformers"}.isdisjoint(sys.modules))
# These import the registries in the middle of their own import.
import transformers.modeling_layers, transformers.modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers import AutoModelForCausalLM, MixtralConfig
print("transformers.models.mixtral.modeling_mixtral" in sys.modules)
print("moe_convert" in AUTO_QUANTIZER_MAPPING)
print(type(AutoModelForCausalLM._model_mapping[MixtralConfig]).__module__)
"""


def test_importing_the_loader_registers_it_without_importing_torch_or_transformers() -> None:
    assert run_python(EARLY).split() == [
        "True",
        "False",
        "True",
        "loader.hf.by_name.registry_entry",
    ]


def test_a_function_runs_once_after_the_import_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module_to_wait_for.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = []
    after_import("module_to_wait_for", lambda: seen.append(sys.modules["module_to_wait_for"].value))
    assert importlib.util.find_spec("module_to_wait_for")
    assert seen == []
    module = importlib.import_module("module_to_wait_for")
    importlib.reload(module)
    assert seen == [1]
    assert isinstance(module, types.ModuleType)
    after_import("module_to_wait_for", lambda: seen.append(2))
    assert seen == [1, 2]
    del sys.modules["module_to_wait_for"]


def test_registry_answers_for_the_plain_class(folder: Path) -> None:
    entry = AutoModelForCausalLM._model_mapping[MixtralConfig]
    assert entry._no_split_modules == MixtralForCausalLM._no_split_modules
    assert issubclass(MixtralForCausalLM, entry)
    assert isinstance(loader.from_pretrained(folder), entry)
    assert served_class(entry) is served_class(MixtralForCausalLM)


def test_every_model_type_that_is_admitted_is_registered() -> None:
    for model_type in MODEL_TYPES:
        assert (
            type(AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[model_type]]) is RegistryEntry
        )


CONFIGURATION_FIRST = """
import importlib, sys
import loader
importlib.import_module(sys.argv[1])
from transformers import AutoModelForCausalLM
names = [config.__name__ for config in AutoModelForCausalLM._model_mapping._extra_content]
print(sorted(names))
print(hasattr(AutoModelForCausalLM.from_pretrained(sys.argv[2]), "moe_stats"))
"""


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_configurations_import_may_come_before_the_registries(
    folder: Path, model_type: str
) -> None:
    module = f"transformers.models.{model_type}.configuration_{model_type}"
    names, loads = run_python(CONFIGURATION_FIRST, module, folder).splitlines()
    assert names == str(sorted(CONFIG_MAPPING[model_type].__name__ for model_type in MODEL_TYPES))
    assert loads == "True"


PLUGIN_FIRST = """
import importlib
importlib.import_module("loader.hf.loading.plugin")
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print("moe_convert" in AUTO_QUANTIZER_MAPPING)
"""


def test_the_plugin_may_be_the_first_import_of_a_process() -> None:
    assert run_python(PLUGIN_FIRST).strip() == "True"
