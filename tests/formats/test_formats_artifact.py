"""Opening a folder: each defect raises a typed error with the file, field and value."""

import json
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from architectures import architecture_of
from bad_folders import BAD_FOLDERS, copy_of_good, refused, set_json, spoil
from make_vectors import CONFIG, write_folder
from project_paths import VECTORS
from safetensors.torch import load_file, save_file

from formats.artifact import Artifact
from formats.errors import FormatError, MoeConvertError
from formats.reading.verify import verify_folder

LAYER = "experts/layer-000.safetensors"


@pytest.mark.parametrize("edit", BAD_FOLDERS, ids=[edit["name"] for edit in BAD_FOLDERS])
def test_bad_folder_is_refused_with_file_field_and_value(
    tmp_path: Path, edit: dict[str, Any]
) -> None:
    folder = copy_of_good(tmp_path)
    spoil(folder, edit)
    refused(folder, edit["error"], str(folder), edit["message"])


@pytest.mark.parametrize("edit", BAD_FOLDERS, ids=[edit["name"] for edit in BAD_FOLDERS])
def test_verification_of_a_bad_folder_reports_instead_of_raising(
    tmp_path: Path, edit: dict[str, Any]
) -> None:
    folder = copy_of_good(tmp_path)
    spoil(folder, edit)
    for read_data in (False, True):
        report = verify_folder(folder, read_data=read_data)
        assert any(edit["message"] in problem.message for problem in report.problems)


def test_good_folder_opens() -> None:
    artifact = Artifact.open(VECTORS / "folder")
    assert artifact.architecture == architecture_of(CONFIG)


ADAPTER = {
    "name": "me/lora",
    "revision": None,
    "config_sha256": "0" * 64,
    "weights_sha256": "1" * 64,
}


def test_an_index_may_name_the_adapters_that_were_merged(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    spoil(
        folder,
        {"file": "moe_index.json", "at": "/source/adapters", "json": json.dumps([ADAPTER])},
    )
    (found,) = Artifact.open(folder).index.source.adapters
    assert (found.name, found.weights_sha256) == ("me/lora", "1" * 64)


@pytest.mark.parametrize(
    "change",
    [{"weights_sha256": "1"}, {"name": "\x1b[2J"}, {"rank": 8}, {"revision": 1}],
    ids=["hash", "label", "unknown", "type"],
)
def test_a_wrong_field_of_an_adapter_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = copy_of_good(tmp_path)
    text = json.dumps([{**ADAPTER, **change}])
    spoil(folder, {"file": "moe_index.json", "at": "/source/adapters", "json": text})
    refused(folder, "FormatError", "source.adapters[0]")


def test_an_index_may_name_the_parts_that_it_was_made_of(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    part = {
        "name": "node-0",
        "producer": {"name": "moe-convert", "version": "0", "versions": {}},
        "layers": [0],
    }
    spoil(folder, {"file": "moe_index.json", "at": "/parts", "json": json.dumps([part])})
    (found,) = Artifact.open(folder).index.parts
    assert (found.name, found.layers) == ("node-0", [0])


def test_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "MoeConvertError", f"{tmp_path / 'nowhere'} is not a folder")


def test_nesting_of_100000_is_refused_without_exhausting_the_stack(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    (folder / "moe_index.json").write_text("[" * 10**5)
    refused(folder, "FormatError", "moe_index.json: nested more than 32 deep")


def test_brackets_inside_strings_are_not_nesting(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    spoil(
        folder, {"file": "moe_index.json", "at": "/producer/name", "json": json.dumps('\\"[{' * 40)}
    )
    Artifact.open(folder)


def test_number_of_5000_digits_is_refused(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    spoil(
        folder, {"file": "moe_index.json", "at": "/layers/0/experts/0/offset", "json": "1" * 5000}
    )
    refused(folder, "FormatError", "moe_index.json: not JSON: Exceeds the limit")


def test_index_over_16_mib_is_refused(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    with open(folder / "moe_index.json", "r+b") as f:
        f.truncate((16 << 20) + 1)
    refused(folder, "DamageError", "moe_index.json has over 16777216 bytes")


def test_layer_that_was_saved_again_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    save_file(load_file(folder / LAYER), folder / LAYER)
    error = refused(folder, "DamageError", f"{LAYER}: ", "bytes, the index says 20480")
    assert "saved again by a general safetensors tool" in error.hint


def test_layer_that_was_saved_again_in_the_same_size_is_refused_with_the_reason(
    tmp_path: Path,
) -> None:
    folder = copy_of_good(tmp_path)
    tensors = load_file(folder / LAYER)
    save_file(tensors, folder / LAYER)
    missing = 20480 - (folder / LAYER).stat().st_size
    assert missing > 0
    save_file(tensors, folder / LAYER, metadata={"x": "y"})
    missing = 20480 - (folder / LAYER).stat().st_size
    save_file(tensors, folder / LAYER, metadata={"x": "y" * (1 + missing)})
    assert (folder / LAYER).stat().st_size == 20480
    error = refused(folder, "FormatError", f"{LAYER}: ")
    assert "saved again by a general safetensors tool" in error.hint


def test_trunk_that_was_saved_again_is_refused(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    save_file(load_file(folder / "trunk.safetensors"), folder / "trunk.safetensors")
    refused(folder, "DamageError", "trunk.safetensors: ", "bytes, the index says 24576")


def test_folder_with_two_packings_of_equal_size_swapped_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", packings=("tile32-q3-g32-s4", "tile32-q3-g32-s4"))
    text = (folder / "moe_index.json").read_text()
    (folder / "moe_index.json").write_text(text.replace("q3-g32-s4", "q3-g64-s8").replace("\r", ""))
    wrong = "tile32-q3-g32-s4,tile32-q3-g32-s4"
    refused(
        folder,
        "FormatError",
        f"{LAYER}: metadata 'down' is '{wrong}', the index says 'tile32-q3-g64-s8,",
    )


def test_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    (folder / LAYER).rename(tmp_path / "elsewhere")
    (folder / LAYER).symlink_to(tmp_path / "elsewhere")
    refused(
        folder,
        "PathError",
        f"{LAYER} is a symbolic link to {tmp_path / 'elsewhere'}, outside of {folder}",
    )


def test_index_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    (folder / "moe_index.json").rename(tmp_path / "elsewhere")
    (folder / "moe_index.json").symlink_to("../elsewhere")
    refused(folder, "PathError", "moe_index.json is a symbolic link to")


def test_experts_folder_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    (folder / "experts").rename(tmp_path / "elsewhere")
    (folder / "experts").symlink_to(tmp_path / "elsewhere")
    refused(folder, "PathError", f"{LAYER} is a symbolic link to")


def test_link_inside_the_folder_works(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    (folder / LAYER).rename(folder / "experts/stored")
    (folder / LAYER).symlink_to("stored")
    Artifact.open(folder)


def test_link_to_itself_is_refused(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    (folder / LAYER).unlink()
    (folder / LAYER).symlink_to(folder / LAYER)
    refused(folder, "PathError", LAYER)


def test_hub_cache_opens_through_its_links(tmp_path: Path) -> None:
    Artifact.open(hub_cache(tmp_path))


def test_hub_cache_does_not_open_through_links_to_other_models(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    other = tmp_path / "models--other--model/blobs"
    other.mkdir(parents=True)
    (snapshot / LAYER).resolve().rename(other / "stolen")
    (snapshot / LAYER).unlink()
    (snapshot / LAYER).symlink_to("../../../../models--other--model/blobs/stolen")
    refused(snapshot, "PathError", f"{LAYER} is a symbolic link to {other / 'stolen'}")


@pytest.mark.parametrize("name", ["moe_index.json", "config.json", "trunk.safetensors", LAYER])
def test_fifo_is_refused_without_waiting(tmp_path: Path, name: str) -> None:
    folder = copy_of_good(tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, "PathError", f"{name} in {folder} is not a regular file")


def test_trunk_tensors_of_any_float_type_and_unpacked_attention_are_taken(tmp_path: Path) -> None:
    config = {**CONFIG, "tie_word_embeddings": True, "num_hidden_layers": 2}
    artifact = Artifact.open(write_folder(tmp_path / "folder", config=config))
    assert "lm_head.weight" not in artifact.trunk_header().entries
    assert len(artifact.index.layers) == 2


def test_head_dim_and_key_value_heads_have_the_defaults_of_transformers() -> None:
    config = {k: v for k, v in CONFIG.items() if k not in ("head_dim", "tie_word_embeddings")}
    config["num_key_value_heads"] = None
    architecture = architecture_of(config)
    assert (architecture.head_dim, architecture.num_key_value_heads) == (16, 2)
    assert not architecture.tie_word_embeddings


def test_every_random_change_of_index_or_config_is_refused_with_a_typed_error_or_harmless(
    tmp_path: Path,
) -> None:
    folder = copy_of_good(tmp_path)
    rng = random.Random(0)
    values = [
        "-1",
        "0",
        "1",
        "1.5",
        "true",
        "null",
        '""',
        '"a"',
        "[]",
        "{}",
        str(2**53),
        str(2**64),
        "4096",
        "[[]]",
    ]
    values += [
        '"../x"',
        '"\\ud800"',
        '"' + "a" * 600 + '"',
        '{"\\udfff": 1}',
        '"tile32-q3-g64-s8"',
        '"zstd"',
        '[{"a": 1}]',
    ]
    for name in ("moe_index.json", "config.json"):
        good = (folder / name).read_bytes()
        places = list(pointers(json.loads(good)))
        for _ in range(400):
            spoiled = good
            for _ in range(rng.randint(1, 2)):
                raw = rng.choice([None, *values])
                try:
                    spoiled = set_json(spoiled, rng.choice(places), raw)
                except (KeyError, IndexError, TypeError, ValueError):
                    continue
            (folder / name).write_bytes(spoiled)
            outcome(folder)
        for _ in range(400):
            at = rng.randrange(len(good))
            (folder / name).write_bytes(
                good[:at] + rng.randbytes(rng.randint(0, 2)) + good[at + rng.randint(0, 2) :]
            )
            outcome(folder)
        (folder / name).write_bytes(good)


@pytest.mark.parametrize("name", ["trunk.safetensors", LAYER])
def test_every_random_change_of_a_header_is_refused_with_a_typed_error(
    tmp_path: Path, name: str
) -> None:
    folder = copy_of_good(tmp_path)
    good = (folder / name).read_bytes()
    rng = random.Random(1)
    for _ in range(300):
        at = rng.randrange(2000)
        spoiled = (
            good[:at]
            + rng.choice([b"9", b'"', b"[", b"-", b"\\", rng.randbytes(1)])
            + good[at + 1 :]
        )
        (folder / name).write_bytes(spoiled)
        if spoiled != good:
            with pytest.raises(FormatError):
                Artifact.open(folder)


def outcome(folder: Path) -> None:
    """Check that `folder` opens and verifies, or raises a typed error."""
    with suppress(MoeConvertError):
        Artifact.open(folder)
    verify_folder(folder, read_data=True)


def pointers(value: Any, here: str = "") -> Any:
    """Every JSON pointer into `value`."""
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield f"{here}/{key}"
        yield from pointers(child, f"{here}/{key}")


def hub_cache(parent: Path) -> Path:
    """Copy the good folder into a Hub cache: a snapshot of links to blobs."""
    entry = parent / "models--me--tiny"
    snapshot = entry / "snapshots" / ("0" * 40)
    (entry / "blobs").mkdir(parents=True)
    (snapshot / "experts").mkdir(parents=True)
    good = copy_of_good(parent)
    for number, path in enumerate(sorted(p for p in good.rglob("*") if p.is_file())):
        name = path.relative_to(good)
        path.rename(entry / "blobs" / str(number))
        (snapshot / name).symlink_to(Path(*[".."] * (1 + len(name.parts)), "blobs", str(number)))
    return snapshot


def test_message_stays_short_however_long_the_bad_value_is(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    good = (folder / "moe_index.json").read_bytes()
    for raw in (
        '"' + "a" * 10**6 + '"',
        "[" + "1," * 10**5 + "1]",
        '{"' + "b" * 10**6 + '": 1, "' + "b" * 10**6 + '": 1}',
    ):
        (folder / "moe_index.json").write_bytes(set_json(good, "/format_version", raw))
        assert len(refused(folder, "FormatError").message) < 1000
