"""Opens what `plan` plans for: a converted model or a checkpoint, in a folder or on the Hub, or a
single config.json.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from formats.artifact import Artifact
    from formats.index import Architecture
    from loader.planning.memory_plan import ModelSizes


@dataclass(frozen=True)
class PlanSource:
    """Sizes of a model, its recipe's name, and its local weight files.

    converted: the folder, if it holds a converted model that can run.
    """

    sizes: "ModelSizes"
    recipe: str
    files: list[Path]
    converted: Path | None = None


def open_source(
    path: Path, recipe: str, revision: str | None, token: str | None, kv_bits: int
) -> PlanSource:
    """Open a folder, or else the Hub repository of this name.

    From a repository, only index and headers or config.json are downloaded. `recipe` applies to a
    checkpoint that is not converted yet. kv_bits: 8 or 16. Raises HubError, SourceError,
    RecipeError if the model cannot have a KV cache of 8 bits, and the errors of Artifact.open.
    """
    from formats import INDEX_NAME
    from formats.artifact import Artifact
    from formats.hub.remote_artifact import open_remote
    from formats.hub.repo import HubRepo
    from formats.repo_names import is_repo_name
    from formats.unconverted import check_finished, is_converted

    if path.exists() or not is_repo_name(str(path)):
        folder = path.parent if path.name == "config.json" and path.is_file() else path
        check_finished(folder)
        files = sorted(folder.rglob("*.safetensors"))
        if is_converted(folder):
            return _of_artifact(Artifact.open(folder), files, folder, kv_bits)
        return _of_checkpoint(folder, recipe, files, kv_bits)
    repo = HubRepo.open(str(path), revision, token)
    if INDEX_NAME in repo.files:
        with tempfile.TemporaryDirectory(prefix="moe-convert-") as temporary:
            artifact = open_remote(repo, Path(temporary))
            names = [layer.file for layer in artifact.index.layers]
            downloaded = [file for name in names if (file := repo.cached(name))]
            return _of_artifact(artifact, downloaded, None, kv_bits)
    from converter.checkpoint.shards.hub_model import HubModel

    folder = HubModel.open(repo.repo, repo.commit, token).folder
    return _of_checkpoint(folder, recipe, [], kv_bits)


def _of_artifact(
    artifact: "Artifact", files: list[Path], folder: Path | None, kv_bits: int
) -> PlanSource:
    from loader.planning.memory_plan import ModelSizes

    _check_kv_bits(kv_bits, artifact.architecture, artifact.config)
    sizes = ModelSizes.of_folder(artifact, kv_bits)
    return PlanSource(sizes, artifact.index.recipe.name, files, folder)


def _of_checkpoint(folder: Path, recipe: str, files: list[Path], kv_bits: int) -> PlanSource:
    from converter.output.planned_folder import PlannedFolder
    from converter.recipe.recipes import make_recipe
    from formats.config.checkpoint_config import read_config
    from loader.planning.memory_plan import ModelSizes

    planned = PlannedFolder.plan(folder, make_recipe(recipe))
    _check_kv_bits(kv_bits, planned.architecture, read_config(folder))
    sizes = ModelSizes.of_parts(planned, planned.trunk, kv_bits=kv_bits)
    return PlanSource(sizes, recipe, files)


def _check_kv_bits(kv_bits: int, architecture: "Architecture", config: "dict[str, Any]") -> None:
    """Raise RecipeError if the model cannot have a KV cache of so few bits."""
    if kv_bits == 8:
        # The module imports transformers.
        from loader.decode.kv_bits_check import check_8bit_cache

        check_8bit_cache(architecture, config, [])
