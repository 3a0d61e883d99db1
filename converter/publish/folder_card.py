"""The card of a converted folder: written at the end of a conversion, and renewed by an upload.

What a user wrote into the card is kept, in the folder and in the repository (`card_parts.py`).
"""

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from converter.publish.card_metadata import Metadata, carried_over, parse_metadata, split_card
from converter.publish.card_parts import Card
from converter.publish.model_card import (
    CARD_NAME,
    UNKNOWN,
    CardFacts,
    base_model,
    card_metadata,
    card_part,
)
from formats.artifact import Artifact
from formats.errors import MoeConvertError
from formats.files.log_once import warn_once
from formats.files.partial_file import write_file
from formats.files.paths import locate, read_small, read_small_source
from formats.index import Index
from formats.quality import read_quality
from formats.repo_names import is_repo_name, page_address

_LICENSE_FILE = re.compile(r"LICEN[SC]E([.\-_].*)?", re.IGNORECASE)
_LICENSE_FIELDS = ("license", "license_name", "license_link")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CardOptions:
    """Options of a publication.

    revision: a branch, None for main. license: one of the Hub's identifiers, None for the source's.
    base_model: None for the index's source. published: the repository's card, None without one.
    """

    repo: str
    revision: str | None = None
    license: str | None = None
    base_model: str | None = None
    published: bytes | None = None


def write_card(out: Path, index: Index, source: Path | None = None) -> None:
    """Write README.md of a folder whose index is not written yet; keep what a user wrote into it.

    source: the source's folder, whose card gives licence, languages and tags.
    """
    facts = _source_facts(index, source)
    artifact = Artifact(out, index, index.config)
    path = out / CARD_NAME
    card = Card("", {})
    if os.path.lexists(path):
        try:
            card = Card.parse(read_small(out, CARD_NAME, str(out)).decode())
        except (MoeConvertError, ValueError) as e:
            _log.warning("%s is kept as it is: %s", path, e)
            return
    if card.is_kept_whole:
        _log.info("%s was not made by moe-convert and is kept", path)
        return
    part = card_part(artifact, read_quality(out), facts)
    write_file(path, card.renewed(card_metadata(index, facts), part).encode())


def make_card(artifact: Artifact, options: CardOptions) -> str:
    """Return the card to publish.

    It is the folder's card, or the repository's if only that was edited, with our part and our
    metadata made anew. MoeConvertError if nobody states a licence, if both cards were edited, or
    if a card cannot be read.
    """
    folder = artifact.folder
    local = _local_card(folder)
    published = _published_card(options)
    card = _card_to_renew(local, published, folder, options.repo)
    known = [other.metadata for other in (card, local, published) if other]
    facts = _facts(artifact, options, known)
    if card.is_kept_whole:
        warn_once(f"{CARD_NAME} is published as you wrote it, without the lines of moe-convert")
        return card.text
    if base_model(artifact.index, facts.base_model) is None:
        warn_once(
            "the model card names no base model; moe-convert upload --base-model OWNER/MODEL does"
        )
    part = card_part(artifact, read_quality(folder), facts)
    stated: Metadata = {}
    if options.license:
        stated |= {name: facts.carried.get(name) for name in _LICENSE_FIELDS}
    if options.base_model:
        stated |= {"base_model": card_metadata(artifact.index, facts)["base_model"]}
    return card.renewed(card_metadata(artifact.index, facts), part, stated)


def check_license(source: Path, license_id: str | None) -> None:
    """Raise MoeConvertError if neither the source's files nor its card name a licence."""
    if license_id is None and "license" not in _read_source_card(source):
        _require_license(_license_file(path.name for path in source.iterdir()), source)


def card_license(folder: Path) -> str | None:
    """Return the Hub's identifier of the licence that the folder's card names; the first of many.

    None without a card that can be read, and for a card without a licence.
    """
    named = _read_source_card(folder).get("license")
    return named[0] if isinstance(named, list) else named


def _facts(artifact: Artifact, options: CardOptions, known: list[Metadata]) -> CardFacts:
    """Return the facts of a publication. known: metadata of cards, the most trusted first."""
    index = artifact.index
    license_file = _license_file(file.file for file in index.files)
    carried: Metadata = {}
    base = options.base_model
    for metadata in known:
        if "license" in carried:
            metadata = {k: v for k, v in metadata.items() if k not in _LICENSE_FIELDS}
        carried = carried_over(metadata) | carried
        bases = metadata.get("base_model")
        first = bases[0] if isinstance(bases, list) and bases else bases
        if base_model(index, base) is None and isinstance(first, str):
            base = first
    if options.license:
        carried = {k: v for k, v in carried.items() if k not in _LICENSE_FIELDS}
        carried["license"] = options.license
    if "license" not in carried:
        _require_license(license_file, artifact.folder)
    carried = _with_license_file(carried, license_file, artifact.folder)
    return CardFacts(options.repo, options.revision, base, carried, license_file)


def _source_facts(index: Index, source: Path | None) -> CardFacts:
    carried = _read_source_card(source) if source else {}
    license_file = _license_file(file.file for file in index.files)
    link = carried.get("license_link")
    if link and not link.startswith(("http://", "https://")) and link != license_file:
        # A file that is not copied: name the source's.
        del carried["license_link"]
        if index.source.revision and is_repo_name(index.source.name):
            carried["license_link"] = f"{page_address(index.source.name)}/blob/main/{link}"
    if source:
        carried = _with_license_file(carried, license_file, source)
    return CardFacts(carried=carried, license_file=license_file)


def _read_source_card(source: Path) -> Metadata:
    """Return what the card of the source carries over; {} without a card that can be read."""
    if not os.path.lexists(source / CARD_NAME):
        return {}
    try:
        text = read_small_source(source, CARD_NAME, str(source)).decode()
        return carried_over(parse_metadata(split_card(text)[0]))
    except (MoeConvertError, ValueError) as e:
        _log.warning("%s: no licence or tag is taken from it: %s", source / CARD_NAME, e)
        return {}


def _with_license_file(carried: Metadata, license_file: str | None, folder: Path) -> Metadata:
    """Return `carried` with the licence that the licence file shows, and with a link to it."""
    if license_file is None:
        return carried
    if "license" not in carried:
        carried = {**carried, "license": _license_id(locate(folder, license_file, "licence"))}
    if carried["license"] == "other":
        carried = {"license_name": license_file.lower(), **carried}
    return {"license_link": license_file, **carried}


def _license_file(names: Iterable[str]) -> str | None:
    return next((name for name in sorted(names) if _LICENSE_FILE.fullmatch(name)), None)


def _require_license(license_file: str | None, where: Path) -> None:
    if license_file is None:
        raise MoeConvertError(
            f"{where}: the source has no licence file, and its model card names no licence",
            f"name its licence with --license, such as apache-2.0, or --license {UNKNOWN}",
        )


def _license_id(path: Path) -> str:
    """Return the Hub's identifier of a licence text: apache-2.0, mit or other."""
    text = " ".join(path.read_text(errors="replace")[:2000].split())
    if "Apache License Version 2.0" in text:
        return "apache-2.0"
    return "mit" if text.startswith("MIT License") else "other"


def _card_to_renew(local: Card | None, published: Card | None, folder: Path, repo: str) -> Card:
    """Return the card with the edits of the folder's and of the repository's."""
    if local is None or published is None:
        return local or published or Card("", {})
    if local.conflicts_with(published):
        raise MoeConvertError(
            f"{CARD_NAME} was edited in {folder} and in the repository {repo}",
            f"copy the repository's {CARD_NAME} over the folder's, and edit that",
        )
    return local.merged_with(published)


def _local_card(folder: Path) -> Card | None:
    if not os.path.lexists(folder / CARD_NAME):
        return None
    # read_small refuses a link out of the folder, which must not be published.
    return _parsed(read_small(folder, CARD_NAME, str(folder)), str(folder / CARD_NAME))


def _published_card(options: CardOptions) -> Card | None:
    if options.published is None:
        return None
    return _parsed(options.published, f"{CARD_NAME} of the repository {options.repo}")


def _parsed(data: bytes, where: str) -> Card:
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        raise MoeConvertError(
            f"{where}: not UTF-8 at byte {e.start}", "save the card as UTF-8"
        ) from None
    try:
        return Card.parse(text)
    except ValueError as e:
        raise MoeConvertError(f"{where}: {e}", "correct the lines between the dashes") from None
