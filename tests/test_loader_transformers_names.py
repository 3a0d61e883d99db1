"""A release of transformers in which an inner name is another: slower, and the log says so once."""

import logging

import pytest
from transformers.generation import GenerationMixin
from transformers.utils import output_capturing

from loader import transformers_names


@pytest.fixture(autouse=True)
def _looked_up_anew():
    yield
    transformers_names.active_collector.cache_clear()
    transformers_names.generation_methods.cache_clear()


def other_arguments(self, input_ids, past=None):
    """prepare_inputs_for_generation as no release has it."""


@pytest.mark.parametrize(
    ("owner", "name", "value", "look_up", "loss"),
    [
        (output_capturing, "_active_collector", None, transformers_names.active_collector, "each module is called"),
        (GenerationMixin, "_update_model_kwargs_for_generation", None, transformers_names.generation_methods, "copies"),
        (
            GenerationMixin,
            "prepare_inputs_for_generation",
            other_arguments,
            transformers_names.generation_methods,
            "copies",
        ),
    ],
)
def test_another_name_is_logged_once(monkeypatch, caplog, owner, name, value, look_up, loss):
    monkeypatch.delattr(owner, name)
    if value is not None:
        monkeypatch.setattr(owner, name, value, raising=False)
    look_up.cache_clear()
    with caplog.at_level(logging.INFO, logger="loader"):
        assert look_up() is None
        assert look_up() is None
    assert [record.getMessage() for record in caplog.records if loss in record.getMessage()] == caplog.messages
    assert len(caplog.messages) == 1
