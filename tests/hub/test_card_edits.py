"""An upload keeps what a user wrote into the card, here or on the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

from converter.publish.card_metadata import parse_metadata, split_card
from converter.publish.hub_commit import PublishOptions, publish_folder
from formats.errors import MoeConvertError
from formats.quality import Comparison, Evaluation, save_evaluation

REPO = "me/tiny-2bit"
Upload = Callable[..., str]


@pytest.fixture
def upload(hub: HubServer, converted_copy: Path) -> Upload:
    """Function (options) -> the card in the repository after an upload of the copy."""

    def publish(**options: Any) -> str:
        publish_folder(converted_copy, PublishOptions(REPO, **options))
        return hub.files(REPO)["README.md"].decode()

    return publish


def metadata_of(card: str) -> dict[str, Any]:
    return parse_metadata(split_card(card)[0])


def edit(hub: HubServer, change: Callable[[str], str]) -> None:
    """Edit the card on the Hub's page."""
    card = hub.files(REPO)["README.md"].decode()
    hub.commit(REPO, {"README.md": change(card).encode()})


def measure(folder: Path) -> None:
    row = Comparison("english", 4, 1000, 61.9, 61.0, 1.0147, 0.001, 0.0123, 0.001, 0.95, [0.9])
    save_evaluation(folder, Evaluation("tiny", 256, {}, [row], row))


def test_text_written_on_the_hub_stays_and_new_quality_comes(
    hub: HubServer, upload: Upload, converted_copy: Path
) -> None:
    upload(license="mit")
    edit(hub, lambda card: card.replace("\n<!--", "\nMy words.\n\n<!--", 1) + "\nMy thanks.\n")
    measure(converted_copy)
    for _ in range(2):
        card = upload(license="mit")
        assert card.index("My words.") < card.index("## Install")
        assert card.endswith("\nMy thanks.\n")
        assert "1.0147" in card


def test_metadata_written_on_the_hub_stay(hub: HubServer, upload: Upload) -> None:
    upload(license="mit")
    edit(
        hub, lambda card: card.replace("tags:\n", "language: de\ndatasets:\n- a/b\ntags:\n- mine\n")
    )
    for _ in range(2):
        metadata = metadata_of(upload())
        assert (metadata["language"], metadata["datasets"]) == ("de", ["a/b"])
        assert "mine" in metadata["tags"]
        assert metadata["license"] == "mit"


def test_licence_that_a_user_states_replaces_the_one_on_the_hub(
    hub: HubServer, upload: Upload
) -> None:
    upload(license="mit")
    edit(hub, lambda card: card.replace("license: mit", "license: openrail\nlanguage: de"))
    assert metadata_of(upload())["license"] == "openrail"
    metadata = metadata_of(upload(license="apache-2.0"))
    assert (metadata["license"], metadata["language"]) == ("apache-2.0", "de")


def test_options_of_an_earlier_upload_need_not_be_given_again(upload: Upload) -> None:
    first = upload(license="mit", base_model="me/tiny")
    assert metadata_of(first)["base_model"] == "me/tiny"
    assert upload() == first


def test_card_that_was_made_on_the_hub_before_the_first_upload_stays(
    hub: HubServer, upload: Upload
) -> None:
    own = "---\nlicense: mit\n---\n# Mine\n"
    hub.add(REPO, {"README.md": own.encode()})
    assert upload() == own


def test_licence_that_was_chosen_on_the_hub_is_used(hub: HubServer, upload: Upload) -> None:
    hub.add(REPO, {"README.md": b"---\nlicense: openrail\n---\n"})
    card = upload()
    assert metadata_of(card)["license"] == "openrail"
    assert "## Install" in card


def test_text_in_the_folder_is_published_and_stays_there(
    hub: HubServer, upload: Upload, converted_copy: Path
) -> None:
    path = converted_copy / "README.md"
    for text in ("\nFirst.\n", "\nSecond.\n"):
        path.write_text(path.read_text().partition("\nFirst.")[0] + text)
        card = upload(license="mit")
        assert card.endswith(text)
        assert "First." not in card or text == "\nFirst.\n"
        assert path.read_text().endswith(text)


def test_different_texts_here_and_on_the_hub_are_an_error(
    hub: HubServer, upload: Upload, converted_copy: Path
) -> None:
    path = converted_copy / "README.md"
    path.write_text(f"{path.read_text()}\nWritten here.\n")
    upload(license="mit")
    edit(hub, lambda card: card + "Written there.\n")
    with pytest.raises(MoeConvertError, match=r"was edited in .* and in the repository") as raised:
        upload(license="mit")
    assert "copy the repository's README.md over the folder's" in raised.value.hint
    path.write_bytes(hub.files(REPO)["README.md"])
    path.write_text(f"{path.read_text()}Both.\n")
    assert upload(license="mit").endswith("\nWritten here.\nWritten there.\nBoth.\n")


def test_our_part_that_somebody_edited_is_kept_with_the_card(
    hub: HubServer, upload: Upload, converted_copy: Path
) -> None:
    upload(license="mit")
    edit(hub, lambda card: card.replace("## Install", "## How to install"))
    measure(converted_copy)
    card = upload(license="mit")
    assert "## How to install" in card
    assert "1.0147" not in card


def test_own_card_with_a_licence_needs_no_option(upload: Upload, converted_copy: Path) -> None:
    (converted_copy / "README.md").write_text("---\nlicense: mit\n---\nmine")
    assert upload() == "---\nlicense: mit\n---\nmine"


def test_metadata_that_cannot_be_read_are_named(
    hub: HubServer, upload: Upload, converted_copy: Path
) -> None:
    (converted_copy / "README.md").write_text("---\nlicense: [\n---\nmine")
    with pytest.raises(MoeConvertError, match=r"README\.md: its metadata is no plain YAML"):
        upload()
    assert REPO not in hub.repos


def test_unknown_licence_is_said(upload: Upload) -> None:
    card = upload(license="unknown")
    assert metadata_of(card)["license"] == "unknown"
    assert "The licence is not known" in card


def published_from_hub(
    hub: HubServer, run_command: Callable[..., tuple[int, str, str]], out: Path
) -> dict[str, Any]:
    """Convert and upload the repository me/tiny; return the metadata of the published card."""
    words = ["--solver", "hqq", "--upload-repo", REPO]
    code, _, err = run_command("convert", "me/tiny", "-o", out, *words)
    assert code == 0, err
    return metadata_of(hub.files(REPO)["README.md"].decode())


def test_card_of_a_source_on_the_hub_gives_licence_and_languages(
    hub: HubServer,
    run_command: Callable[..., tuple[int, str, str]],
    example_folder: Path,
    tmp_path: Path,
) -> None:
    hub.add("me/tiny", example_folder)
    hub.commit(
        "me/tiny", {"README.md": b"---\nlicense: apache-2.0\nlanguage: [fr, en]\n---\n# x\n"}
    )
    metadata = published_from_hub(hub, run_command, tmp_path / "out")
    assert (metadata["license"], metadata["language"]) == ("apache-2.0", ["fr", "en"])
    assert metadata["base_model"] == "me/tiny"


def test_licence_file_of_a_source_that_is_not_copied_is_linked_there(
    hub: HubServer,
    run_command: Callable[..., tuple[int, str, str]],
    example_folder: Path,
    tmp_path: Path,
) -> None:
    hub.add("me/tiny", example_folder)
    card = b"---\nlicense: other\nlicense_name: own\nlicense_link: terms.md\n---\n# x\n"
    hub.commit("me/tiny", {"README.md": card})
    metadata = published_from_hub(hub, run_command, tmp_path / "out")
    assert metadata["license_link"] == "https://huggingface.co/me/tiny/blob/main/terms.md"
