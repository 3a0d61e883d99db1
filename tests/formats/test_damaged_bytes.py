"""Damaged bytes never become tokens: each reader, and each file of a folder."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_host import COMPILER
from hub_server import HubServer
from recording_device import RecordingDevice

import loader
from converter.convert import ConvertOptions, convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.errors import DamageError
from formats.reading.verify import verify_folder
from formats.repair.repairs import NoOrigin, repair_folder
from loader.budget.expert_sizes import expert_bytes_by_layer, staging_bytes
from loader.cuda.experts.pinned_tier import PinnedTier
from loader.repository import open_model

IDS = torch.tensor([[1, 17, 300, 42, 99, 7, 1234, 56, 800, 3]])
REPO = "me/tiny"


@pytest.fixture(scope="module")
def compressed(example_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example at 2 bits with codec zstd."""
    folder = tmp_path_factory.mktemp("compressed") / "zstd"
    convert_checkpoint(
        example_folder, folder, make_recipe("2bit", solver="hqq"), ConvertOptions(codec="zstd")
    )
    return folder


@pytest.fixture
def folder(
    converted_copy: Path, compressed: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Path:
    """A copy of the example at 2 bits, to be damaged."""
    wants_zstd = "zstd" in request.node.name
    return Path(shutil.copytree(compressed, tmp_path / "zstd")) if wants_zstd else converted_copy


def two_slots(folder: Path) -> dict[str, Any]:
    """Return options for an expert cache of two slots per layer."""
    artifact = Artifact.open(folder)
    return {"ram_cache": 2 * sum(expert_bytes_by_layer(artifact)) + staging_bytes(artifact, 2)}


def flip(folder: Path, layer: int, *, bits: int = 1, like: Path | None = None) -> None:
    """Flip random bits in each expert of a layer, in place, so that mmap readers see them.

    `like` is a folder with the index, if this one has none yet.
    """
    places, rng = Artifact.open(like or folder).index.layers[layer], random.Random(layer)
    with open(folder / places.file, "r+b", buffering=0) as file:
        for entry in places.experts:
            for position in rng.sample(range(entry.length), bits):
                file.seek(entry.offset + position)
                byte = file.read(1)[0]
                file.seek(entry.offset + position)
                file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def check_names_the_expert(error: DamageError, folder: Path, layer: int) -> None:
    """Check that the error names file, layer, expert and the repair command."""
    assert f"experts/layer-{layer:03d}.safetensors: layer {layer} expert " in error.message
    assert "xxh3 of its bytes is " in error.message
    assert error.hint.startswith(f"moe-convert repair {folder} --from ")


def prompt(model: Any) -> Any:
    """Stream the experts of a prompt."""
    return model(IDS)


def single_tokens(model: Any) -> Any:
    """Lease the experts of each token."""
    return [model(IDS[:, i : i + 1]) for i in range(IDS.shape[1])]


@pytest.mark.parametrize("run", [prompt, single_tokens])
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize(
    "way", ["mapped", "mapped, two slots", "direct", "zstd mapped", "zstd direct"]
)
@torch.no_grad()
def test_flipped_bit_is_found_before_it_is_used(
    folder: Path, way: str, kernels: str, run: Callable[[Any], Any]
) -> None:
    slots = {} if way.endswith("mapped") else two_slots(folder)
    io = "mmap" if "mapped" in way else "direct"
    model = loader.from_pretrained(folder, io=io, kernels=kernels, prefetch=0, **slots)
    flip(folder, 3)
    for _ in range(2):
        with pytest.raises(DamageError) as caught:
            run(model)
        check_names_the_expert(caught.value, folder, 3)


@torch.no_grad()
def test_guess_with_a_flipped_bit_is_found_when_it_is_used(folder: Path) -> None:
    model = loader.from_pretrained(folder, io="direct", **two_slots(folder))
    single_tokens(model)
    flip(folder, 3)
    with pytest.raises(DamageError) as caught:
        single_tokens(model)
    check_names_the_expert(caught.value, folder, 3)


def test_expert_that_turned_wrong_before_the_backward_is_found(folder: Path) -> None:
    model = loader.from_pretrained(folder, io="direct", **two_slots(folder))
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    loss = model(inputs_embeds=embeddings).logits.square().mean()
    flip(folder, 3)
    with pytest.raises(DamageError) as caught:
        loss.backward()
    check_names_the_expert(caught.value, folder, 3)


@torch.no_grad()
def test_lazy_folder_is_compared_each_time_it_is_read(
    hub: HubServer, converted: Callable[[str], Path]
) -> None:
    hub.add(REPO, converted("2bit"))
    options = two_slots(converted("2bit"))
    model = loader.from_pretrained(REPO, lazy=True, **options)
    prompt(model)
    path = Path(model.name_or_path)
    flip(path, 0, like=converted("2bit"))
    with pytest.raises(DamageError) as caught:
        prompt(model)
    check_names_the_expert(caught.value, path, 0)


@torch.no_grad()
@pytest.mark.parametrize("complete", [True, False])
def test_repository_is_compared_in_the_cache(
    hub: HubServer, converted: Callable[[str], Path], complete: bool
) -> None:
    hub.add(REPO, converted("2bit"))
    options = {"lazy": not complete, **two_slots(converted("2bit"))}
    model = loader.from_pretrained(REPO, **options)
    path = Path(model.name_or_path)
    del model
    with open((path / "trunk.safetensors").resolve(), "r+b") as file:
        file.seek(-9, 2)
        file.write(b"damage")
    with pytest.raises(DamageError, match=r"trunk\.safetensors: its sha256 is .*the index says"):
        loader.from_pretrained(REPO, **options)


def test_expert_that_a_gpu_gets_is_compared_on_its_way_to_pinned_memory(folder: Path) -> None:
    device = RecordingDevice()
    opened = open_model(folder, None, None, lazy=False, progress=None)
    sizes = expert_bytes_by_layer(opened.artifact)
    tier = PinnedTier(
        opened.reader("direct", check="fast"), dict.fromkeys(sizes, 4), device.pin, device.unpin
    )
    flip(folder, 3)
    with tier.use(2, 1) as use:
        use.step()
        assert use.has_bytes
    for pieces in (None, 4096):
        with tier.use(3, 1) as use, pytest.raises(DamageError) as caught:
            while not use.has_bytes:
                use.step(pieces)
        check_names_the_expert(caught.value, folder, 3)
    tier.close()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@torch.no_grad()
def test_model_on_a_gpu_gets_no_damaged_expert(folder: Path) -> None:
    layers = Artifact.open(folder).architecture.num_hidden_layers
    model = loader.from_pretrained(folder, device=RecordingDevice(), slots=[2] * layers)
    flip(folder, 3)
    with pytest.raises(DamageError) as caught:
        prompt(model)
    check_names_the_expert(caught.value, folder, 3)


@torch.no_grad()
def test_without_the_check_64_flipped_bits_an_expert_give_wrong_tokens_in_silence(
    folder: Path, converted: Callable[[str], Path]
) -> None:
    def generated(path: Path, check: str) -> torch.Tensor:
        model = loader.from_pretrained(path, check=check, **two_slots(path))
        return model.generate(IDS, min_new_tokens=60, max_new_tokens=60, do_sample=False)[
            0, IDS.shape[1] :
        ]

    flip(folder, 3, bits=64)
    good = generated(converted("2bit"), "fast")
    wrong = int((generated(folder, "none") != good).sum())
    assert wrong > 0
    with pytest.raises(DamageError):
        generated(folder, "fast")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_edited_tokenizer_is_refused_unless_nothing_is_compared(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(text + "\n")
    with pytest.raises(
        DamageError, match=f"{name}: its sha256 is .* with check none it would be used"
    ) as caught:
        loader.load_tokenizer(folder)
    assert caught.value.hint.startswith(f"moe-convert repair {folder} --from ")
    assert loader.load_tokenizer(folder, check="none")("a")["input_ids"]
    assert loader.from_pretrained(folder) is not None


def test_damaged_trunk_is_refused_unless_nothing_is_compared(folder: Path) -> None:
    with open(folder / "trunk.safetensors", "r+b") as file:
        file.seek(-5000, 2)
        file.write(b"damage")
    for check in ("fast", "sha256"):
        with pytest.raises(
            DamageError, match=r"trunk\.safetensors: its sha256 is .* with check none"
        ) as caught:
            loader.from_pretrained(folder, check=check)
        assert caught.value.hint.startswith(f"moe-convert repair {folder} --from ")
    assert loader.from_pretrained(folder, check="none") is not None


@pytest.mark.parametrize("edit", ["changed", "removed"])
def test_changed_generation_config_is_used_with_one_log_line(
    folder: Path, caplog: pytest.LogCaptureFixture, edit: str
) -> None:
    path = folder / "generation_config.json"
    if edit == "changed":
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "temperature": 0.5, "do_sample": True})
        )
    else:
        path.unlink()
    for _ in range(2):
        model = loader.from_pretrained(folder)
    assert (model.generation_config.temperature == 0.5) == (edit == "changed")
    assert (
        len([line for line in caplog.messages if line.startswith(f"{path} was {edit} since")]) == 1
    )


@torch.no_grad()
def test_settings_that_a_publisher_changed_are_loaded_lazily(
    hub: HubServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(folder, num_experts_per_tok=3)
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    hub.add(REPO, folder)
    model = loader.from_pretrained(REPO, lazy=True)
    assert model.model.layers[0].mlp.gate.top_k == 3
    assert model.generation_config.temperature == 0.5
    assert "num_experts_per_tok is 3, 2 when it was converted" in caplog.text
    assert "generation_config.json was changed since the conversion" in caplog.text


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_verification_notes_run_time_edits_and_reports_the_rest(folder: Path) -> None:
    edit_config(folder, num_experts_per_tok=3)
    (folder / "generation_config.json").write_text("{}")
    report = verify_folder(folder, read_data=True)
    assert report.problems == []
    assert "num_experts_per_tok is 3, 2 when it was converted" in report.notes[0]
    assert "generation_config.json was changed since the conversion" in report.notes[1]
    edit_config(folder, rms_norm_eps=1e-3)
    (problem,) = verify_folder(folder, read_data=True).problems
    assert problem.file == "config.json"
    assert problem.hint.startswith(f"moe-convert repair {folder} --from ")


def test_verification_notes_a_config_that_was_only_formatted(folder: Path) -> None:
    edit_config(folder)
    report = verify_folder(folder)
    assert report.problems == []
    assert report.notes == [
        f"{folder / 'config.json'}: other bytes than were written, the same fields"
    ]


class Published(NoOrigin):
    """Gives a good folder's files."""

    def __init__(self, folder: Path) -> None:
        super().__init__("")
        self._folder = folder

    def file(self, name: str, sha256: str, path: Path) -> None:
        shutil.copy(self._folder / name, path)


def test_repair_keeps_run_time_edits_until_something_else_differs(
    folder: Path, converted: Callable[[str], Path]
) -> None:
    good, index = converted("2bit"), Artifact.open(folder).index
    edit_config(folder, num_experts_per_tok=3)
    (folder / "generation_config.json").write_text("{}")
    done = repair_folder(folder, index, Published(good))
    assert (done.files, done.kept) == ([], ["config.json", "generation_config.json"])
    assert Artifact.open(folder).architecture.num_experts_per_tok == 3
    edit_config(folder, rms_norm_eps=1e-3)
    (folder / "generation_config.json").write_text("{")
    done = repair_folder(folder, index, Published(good))
    assert (done.files, done.kept) == (["config.json", "generation_config.json"], [])
    assert (folder / "config.json").read_bytes() == (good / "config.json").read_bytes()


def test_verification_says_what_it_did_not_read(
    folder: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    report = verify_folder(folder)
    assert report.not_read.experts == 64
    assert report.not_read.files[0] == "trunk.safetensors"
    assert not {"config.json", "generation_config.json"} & set(report.not_read.files)
    everything = verify_folder(folder, read_data=True)
    assert (everything.not_read.experts, everything.not_read.files) == (0, [])
    assert everything.checked_bytes == report.not_read.expert_bytes + report.not_read.file_bytes
    _, out, _ = run_command("verify", folder)
    assert "not read: the bytes of 64 experts (" in out
    assert "; --read-data reads them" in out
    facts = json.loads(run_command("verify", folder, "--json")[1])
    assert facts["not_read"]["experts"] == 64
    assert "not read" not in run_command("verify", folder, "--read-data")[1]


def test_index_says_an_expert_in_one_line(folder: Path) -> None:
    lines = (folder / "moe_index.json").read_text().splitlines()
    entries = [line for line in lines if '"xxh3"' in line]
    assert len(entries) == 64
    assert max(map(len, entries)) < 300
    # An index of 25,000 experts stays within the limit of 16 MiB.
    assert 25_000 * max(map(len, entries)) < 10 << 20
