"""The card and licence of a folder that is about to be published."""

import os
import re
from pathlib import Path

from converter.publish.model_card import CARD_NAME, MARK, CardOptions, card_text
from formats.artifact import Artifact
from formats.errors import MoeConvertError
from formats.files.paths import locate, read_small
from formats.quality import read_quality

_LICENSE_FILE = re.compile(r"LICEN[SC]E([.\-_].*)?", re.IGNORECASE)


def find_license(names: list[str], license_id: str | None, where: Path | str) -> str | None:
    """Return the licence file among the source's `names`; None if only `license_id` is given.

    MoeConvertError if there is neither. where: the folder, for the message.
    """
    for name in sorted(names):
        if _LICENSE_FILE.fullmatch(name):
            return name
    if license_id is None:
        raise MoeConvertError(
            f"{where}: the source's licence file is missing",
            "name its licence with --license, such as apache-2.0",
        )
    return None


def make_card(artifact: Artifact, repo: str, license_id: str | None, base_model: str | None) -> str:
    """Return the card to publish: the folder's if somebody edited it, else a new one.

    license_id, base_model: None for those that the folder names. MoeConvertError if there is no
    licence, or if the folder's card is not UTF-8.
    """
    folder = artifact.folder
    path = folder / CARD_NAME
    if os.path.lexists(path):
        # read_small refuses a link out of the folder, which must not be published.
        card = _decode(read_small(folder, CARD_NAME, str(folder)), path)
        if MARK not in card:
            return card
    license_file = find_license([f.file for f in artifact.index.files], license_id, folder)
    if license_id is None and license_file is not None:
        license_id = _license_id(locate(folder, license_file, "licence"))
    options = CardOptions(repo, license_id, license_file, base_model)
    return card_text(artifact.index, read_quality(folder), options)


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise MoeConvertError(
            f"{path}: not UTF-8 at byte {e.start}", "save the card as UTF-8"
        ) from None


def _license_id(path: Path) -> str:
    """Return the Hub's identifier of a licence text: apache-2.0, mit or other."""
    text = " ".join(path.read_text(errors="replace")[:2000].split())
    if "Apache License Version 2.0" in text:
        return "apache-2.0"
    return "mit" if text.startswith("MIT License") else "other"
