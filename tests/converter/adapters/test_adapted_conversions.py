"""Conversions with adapters: resume, identity, index, tokenizer, memory, repair."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import WEIGHTS, change_config, change_tensors, convert_with, make_adapter
from hub_server import HubServer
from interrupted_runs import Interruption, flip, hashes, stop_after

import loader
from converter.checkpoint.adapters.adapter_folder import AdapterFolder
from converter.checkpoint.source import Checkpoint
from converter.conversion.plan import plan_conversion
from converter.convert import ConvertOptions
from converter.recipe.recipes import make_recipe
from converter.source_origin import SourceOrigin
from formats.errors import HubError, OutputError, SourceError
from formats.index import read_index
from formats.reading.verify import verify_folder
from formats.repair.repairs import repair_folder

ALL = {"target_modules": "all-linear"}


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter for `base`, on attention, router and experts."""
    return make_adapter(base, tmp_path / "adapter", **ALL)


def interrupt(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interruption):
            convert_with(*arguments)


def test_interrupted_conversion_resumes_to_the_same_bytes(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = convert_with(base, tmp_path / "expected", adapter)
    interrupt(monkeypatch, base, tmp_path / "out", adapter)
    assert convert_with(base, tmp_path / "out", adapter, max_workers=3) == expected
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")


def test_another_adapter_or_none_does_not_resume(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_adapter(base, tmp_path / "other", seed=9, **ALL)
    interrupt(monkeypatch, base, tmp_path / "out", adapter)
    for adapters in ((), (other,), (adapter, other)):
        with pytest.raises(OutputError, match="unfinished conversion with another adapter"):
            convert_with(base, tmp_path / "out", *adapters)
    change_config(adapter, lora_alpha=9)
    with pytest.raises(OutputError, match="another adapter"):
        convert_with(base, tmp_path / "out", adapter)


def test_complete_conversion_is_only_that_of_its_own_adapters(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    convert_with(base, tmp_path / "out", adapter)
    before = hashes(tmp_path / "out")
    convert_with(base, tmp_path / "out", adapter)
    assert hashes(tmp_path / "out") == before
    hashed = r"adapter \(config [0-9a-f]{8}, weights [0-9a-f]{8}\)"
    for adapters, given in (((), "none"), ((adapter, adapter), f"{hashed}, .*{hashed}")):
        message = rf"complete conversion, converted with the adapters {hashed}; given: .*{given}"
        with pytest.raises(OutputError, match=message):
            convert_with(base, tmp_path / "out", *adapters)


def test_index_names_the_adapters_in_order_and_the_folder_verifies(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = make_adapter(base, tmp_path / "other", seed=9)
    convert_with(base, tmp_path / "out", adapter, other)
    index = read_index(tmp_path / "out")
    assert [a.name for a in index.source.adapters] == ["adapter", "other"]
    opened = AdapterFolder.open(str(adapter))
    assert index.source.adapters[0] == opened.recorded
    assert "peft" in index.producer.versions
    assert verify_folder(tmp_path / "out", read_data=True).problems == []
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- Adapter, merged into the source: `adapter`, a local folder" in card


def test_index_without_adapters_has_no_such_field(base: Path, tmp_path: Path) -> None:
    convert_with(base, tmp_path / "out")
    source = json.loads((tmp_path / "out" / "moe_index.json").read_text())["source"]
    assert set(source) == {"name", "revision", "shards"}


def test_adapter_on_the_hub_gives_the_same_bytes_and_its_commit(
    hub: HubServer, base: Path, adapter: Path, tmp_path: Path
) -> None:
    expected = convert_with(base, tmp_path / "expected", adapter)
    commit = hub.add("me/lora", adapter)
    assert convert_with(base, tmp_path / "out", Path("me/lora")) == expected
    assert convert_with(base, tmp_path / "pinned", Path(f"me/lora@{commit}")) == expected
    recorded = read_index(tmp_path / "out").source.adapters[0]
    assert (recorded.name, recorded.revision) == ("me/lora", commit)
    with pytest.raises(HubError, match="me/lora has no such revision"):
        AdapterFolder.open("me/lora@nobranch")


def test_output_folder_is_named_by_the_adapters_repository_not_its_branch(
    hub: HubServer,
    base: Path,
    adapter: Path,
    run_command: Callable[..., tuple[int, str, str]],
) -> None:
    hub.add("me/lora", adapter)
    hub.commit("me/lora", {p.name: p for p in adapter.iterdir()}, "refs/pr/1")
    options = ["--adapter", "me/lora@refs/pr/1", "--recipe", "16bit", "--dry-run", "--json"]
    code, out, _ = run_command("convert", base, *options)
    assert code == 0
    assert Path(json.loads(out)["out_dir"]).name == f"{base.name}-lora-16bit"


def test_repository_with_a_pickle_alone_is_refused_without_a_download(
    hub: HubServer, adapter: Path
) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    hub.add("me/pickle", adapter)
    with pytest.raises(SourceError, match=r"me/pickle@.*pickled weights"):
        AdapterFolder.open("me/pickle")


def with_tokenizer(folder: Path, example: Path, template: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(example / name, folder)
    (folder / "chat_template.jinja").write_text(template)


def test_tokenizer_beside_the_adapter_replaces_the_checkpoints(
    example_folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(example_folder, base)
    (base / "chat_template.jinja").write_text("of the base")
    (base / "special_tokens_map.json").write_text("{}")
    adapter = make_adapter(base, tmp_path / "adapter")
    with_tokenizer(adapter, example_folder, "of the adapter")
    plain = make_adapter(base, tmp_path / "plain", seed=4)
    convert_with(base, tmp_path / "out", adapter, plain)
    out = tmp_path / "out"
    assert (out / "chat_template.jinja").read_text() == "of the adapter"
    assert not (out / "special_tokens_map.json").exists()
    assert loader.load_tokenizer(out).chat_template == "of the adapter"


def test_template_without_a_vocabulary_is_left_out_with_a_warning(
    example_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = make_adapter(example_folder, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("of the adapter")
    convert_with(example_folder, tmp_path / "out", adapter)
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert "chat_template.jinja left out: the adapter has no vocabulary" in caplog.text


def test_plan_counts_the_adapters_memory(base: Path, adapter: Path, tmp_path: Path) -> None:
    plans = []
    recipe = make_recipe("2bit", solver="hqq")
    for adapters in ([], [AdapterFolder.open(str(adapter))]):
        with Checkpoint(base, adapters) as checkpoint:
            plan = plan_conversion(checkpoint, recipe, ConvertOptions(), tmp_path / "out")
            plans.append(plan.memory_bytes)
            n_bytes = checkpoint.adapter_bytes
    assert n_bytes > (adapter / WEIGHTS).stat().st_size * 0.9
    assert plans[1] > plans[0] + n_bytes


def test_repair_from_the_source_needs_the_same_adapters(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert_with(base, out, adapter)
    before = hashes(out)
    index = read_index(out)
    for name in ("experts/layer-001.safetensors", "trunk.safetensors"):
        flip(out / name, (out / name).stat().st_size - 3000)
    with pytest.raises(
        SourceError, match=r"with the adapters adapter \(.*\); given: none"
    ) as caught:
        SourceOrigin(base, index)
    assert caught.value.hint == "--adapter FOLDER"
    with SourceOrigin(base, index, adapters=[AdapterFolder.open(str(adapter))]) as origin:
        repair_folder(out, index, origin)
    assert hashes(out) == before


def test_changed_weights_of_an_adapter_are_another_adapter(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    convert_with(base, tmp_path / "out", adapter)
    change_tensors(adapter, lambda tensors: {n: t * 1.01 for n, t in tensors.items()})
    with pytest.raises(OutputError, match=r"weights \w{8}\); given: .*, weights \w{8}\)"):
        convert_with(base, tmp_path / "out", adapter)


def test_converted_fine_tune_generates_what_the_merged_model_does(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    convert_with(base, tmp_path / "out", adapter, recipe=make_recipe("16bit"))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = loader.from_pretrained(tmp_path / "out", device="cpu")(ids).logits.float()
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        without = plain(ids).logits
        tuned = PeftModel.from_pretrained(plain, adapter)(ids).logits
    assert (ours - tuned).norm() / tuned.norm() < 0.03 < (without - tuned).norm() / tuned.norm()


Convert = Callable[..., tuple[int, str, str]]


def test_commands_convert_show_and_compare(
    example_folder: Path,
    tmp_path: Path,
    run_command: Convert,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_adapter(example_folder, tmp_path / "lora", r=2)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(example_folder, tmp_path / "base")
    options = ["base", "--adapter", "lora", "--recipe", "16bit", "--json"]
    code, out, _ = run_command("convert", *options, "--dry-run")
    facts = json.loads(out)
    assert (code, facts["adapters"]) == (0, ["lora"])
    assert facts["out_dir"] == str(tmp_path / "base-lora-16bit")
    assert run_command("convert", *options)[0] == 0
    code, out, _ = run_command("inspect", "base-lora-16bit", "--json")
    assert json.loads(out)["source"]["adapters"][0]["name"] == "lora"
    assert "adapter" in run_command("inspect", "base-lora-16bit")[1]
    text = example_folder.parent / "text" / "english.txt"
    compared: list[object] = [
        "base-lora-16bit",
        "--against",
        "base",
        "--text",
        text,
        "--max-windows",
        1,
        "--json",
    ]
    same = json.loads(run_command("eval", *compared, "--adapter", "lora")[1])["overall"]["kl"]
    assert "if ORIGINAL is the base model" not in caplog.text
    other = json.loads(run_command("eval", *compared)[1])["overall"]["kl"]
    assert same < 0.1 * other
    assert "if ORIGINAL is the base model, use --adapter FOLDER" in caplog.text


def test_adapter_without_an_original_is_a_usage_error(
    tmp_path: Path, example_folder: Path, run_command: Convert
) -> None:
    text = example_folder.parent / "text" / "english.txt"
    code, _, err = run_command("eval", example_folder, "--text", text, "--adapter", tmp_path)
    assert code == 2
    assert "--adapter needs --against" in err


def test_adapter_given_as_the_model_gets_the_command(
    base: Path, adapter: Path, run_command: Convert
) -> None:
    code, _, err = run_command("convert", adapter, "--dry-run")
    assert code == 1
    assert f"moe-convert convert BASE --adapter {adapter}" in err
    options = ["--adapter", adapter, "--recipe", "16bit", "--dry-run"]
    assert run_command("convert", base, *options)[0] == 0
