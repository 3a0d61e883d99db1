"""Folders that the loader must reject, and its errors."""

import hashlib
import json
import logging
import struct

import pytest
import torch
from make_vectors import write_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

import loader
from formats.artifact import Artifact
from formats.errors import FormatError, MoeConvertError, VersionError
from formats.safetensors_header import read_header
from loader.hf.loading.index_comparison import check_trunk

LAYER = "experts/layer-000.safetensors"


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite_trunk(folder, change):
    """Save the trunk after `change`(tensors), with an index that matches the new file."""
    path = folder / "trunk.safetensors"
    tensors = load_file(path)
    change(tensors)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    data = path.read_bytes()
    header = data[: 8 + struct.unpack("<Q", data[:8])[0]]

    def update(index):
        index["trunk"]["size_bytes"] = len(data)
        index["trunk"]["header_sha256"] = hashlib.sha256(header).hexdigest()
        index["trunk"]["sha256"] = hashlib.sha256(data).hexdigest()

    edit_json(folder / "moe_index.json", update)


def load(folder, check="fast"):
    return loader.from_pretrained(folder, kernels="torch", ram_cache="1GiB", check=check)


def test_a_missing_trunk_tensor_is_named(converted_copy):
    rewrite_trunk(converted_copy, lambda t: t.pop("model.layers.3.mlp.gate.weight"))
    with pytest.raises(FormatError, match=r"missing.*model\.layers\.3\.mlp\.gate\.weight"):
        load(converted_copy)


def test_an_extra_trunk_tensor_is_named(converted_copy):
    rewrite_trunk(converted_copy, lambda t: t.update({"model.layers.9.extra": torch.zeros(1)}))
    with pytest.raises(FormatError, match=r"model\.layers\.9\.extra"):
        load(converted_copy)


def test_a_trunk_tensor_of_another_shape_is_named(converted_copy):
    rewrite_trunk(converted_copy, lambda t: t.update({"model.norm.weight": torch.zeros(191)}))
    with pytest.raises(FormatError, match=r"model\.norm\.weight.*191.*192"):
        load(converted_copy)


def test_packed_tiles_of_another_shape_are_named(converted_copy):
    name = "model.layers.0.self_attn.k_proj.packed"
    rewrite_trunk(converted_copy, lambda t: t.update({name: t[name][:1].clone()}))
    with pytest.raises(FormatError, match=r"layers\.0\.self_attn\.k_proj\.packed"):
        load(converted_copy)


def test_fillers_of_the_trunk_are_loaded_over_in_silence(converted_copy, caplog):
    rewrite_trunk(
        converted_copy, lambda t: t.update({"__pad__.77": torch.zeros(3, dtype=torch.uint8)})
    )
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        model = load(converted_copy, check="none")
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert model is not None
    assert "__pad__" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_model_with_a_tensor_that_the_trunk_lacks_is_refused(converted):
    model = load(converted("2bit"))
    artifact = Artifact.open(converted("2bit"))
    check_trunk(model, artifact)
    model.model.norm.bias = torch.nn.Parameter(torch.zeros(192))
    with pytest.raises(FormatError, match=r"missing: model\.norm\.bias"):
        check_trunk(model, artifact)
    del model.model.norm.bias
    model.model.norm.weight = torch.nn.Parameter(torch.zeros(7))
    with pytest.raises(FormatError, match=r"model\.norm\.weight"):
        check_trunk(model, artifact)
    del model.model.norm.weight
    with pytest.raises(FormatError, match=r"not in the model: model\.norm\.weight"):
        check_trunk(model, artifact)


def test_a_newer_format_version_is_refused(converted_copy):
    edit_json(converted_copy / "moe_index.json", lambda index: index.update(format_version=4))
    with pytest.raises(VersionError, match="format_version is 4"):
        load(converted_copy)


def test_a_newer_version_in_the_config_is_refused(converted_copy):
    edit_json(
        converted_copy / "config.json", lambda c: c["quantization_config"].update(format_version=4)
    )
    with pytest.raises(VersionError, match="format_version is 4"):
        load(converted_copy)


def test_a_config_that_names_code_is_refused(converted_copy):
    edit_json(
        converted_copy / "config.json",
        lambda c: c.update(auto_map={"AutoModelForCausalLM": "evil.Model"}),
    )
    with pytest.raises(FormatError, match="auto_map"):
        load(converted_copy)


def test_another_activation_is_refused(converted_copy):
    edit_json(converted_copy / "config.json", lambda c: c.update(hidden_act="gelu"))
    with pytest.raises(FormatError, match="gelu"):
        load(converted_copy)


def test_an_unfinished_conversion_is_refused(converted_copy):
    (converted_copy / "moe_index.json").unlink()
    with pytest.raises(MoeConvertError, match=r"moe_index\.json"):
        load(converted_copy)


def test_an_ordinary_checkpoint_is_refused(example_folder):
    with pytest.raises(MoeConvertError, match=r"moe_index\.json"):
        load(example_folder)


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(MoeConvertError, match="not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(MoeConvertError, match="not a folder"):
        loader.load_tokenizer(tmp_path / "nowhere")


def test_a_file_cut_during_use_is_reported_by_direct_reads(converted_copy):
    model = loader.from_pretrained(converted_copy, kernels="torch", io="direct")
    for layer in range(8):
        with open(converted_copy / f"experts/layer-{layer:03d}.safetensors", "rb+") as f:
            f.truncate(4096)
    with pytest.raises(FormatError, match=r"layer-000.*layer 0 expert \d.*ends after"):
        model(input_ids=torch.tensor([[1, 5]]))


def test_the_plain_class_refuses_the_folder_and_names_the_loader(converted):
    with pytest.raises(MoeConvertError, match=r"loader\.from_pretrained"):
        MixtralForCausalLM.from_pretrained(converted("2bit"))


def test_the_plain_class_refuses_the_folder_after_ours_was_loaded(converted):
    load(converted("2bit"))
    with pytest.raises(MoeConvertError, match=r"loader\.from_pretrained"):
        MixtralForCausalLM.from_pretrained(converted("2bit"))


def built_with(folder, **fields):
    """Return a converted folder whose index and config.json have `fields`; its headers do not."""
    write_folder(folder)
    edit_json(folder / "config.json", lambda config: config.update(fields))

    def update(index):
        index["config"].update(fields)
        index["architecture"].update(
            {name: fields[name] for name in fields if name in index["architecture"]}
        )

    edit_json(folder / "moe_index.json", update)
    return folder


def test_a_packed_matrix_that_the_model_has_with_another_shape_is_named(tmp_path):
    folder = built_with(tmp_path / "folder", num_attention_heads=4)
    Artifact.open(folder)
    with pytest.raises(
        FormatError,
        match=r"q_proj as a matrix \[32, 32\] without bias, the model has a matrix \[64, 32\]",
    ):
        load(folder, check="none")


def test_experts_at_a_path_that_the_model_has_not_are_named(tmp_path):
    folder = write_folder(tmp_path / "folder")
    elsewhere = "model.layers.0.mlp.exports"
    for path in (folder / "moe_index.json", folder / "trunk.safetensors", folder / LAYER):
        path.write_bytes(
            path.read_bytes().replace(b"model.layers.0.mlp.experts", elsewhere.encode())
        )

    def hashed(index):
        for part in (index["trunk"], index["layers"][0]):
            with open(folder / part["file"], "rb") as file:
                part["header_sha256"] = read_header(file.fileno(), part["file"]).sha256

    edit_json(folder / "moe_index.json", hashed)
    Artifact.open(folder)
    with pytest.raises(FormatError, match=f"the model has no module {elsewhere}"):
        load(folder, check="none")
