import json
import shutil

import pytest

from converter.checkpoint.outline import Outline
from converter.checkpoint.source import Checkpoint
from formats.errors import SourceError


def test_an_outline_has_the_checkpoints_trunk(example_folder):
    outline = Outline.of_folder(example_folder)
    with Checkpoint(example_folder) as checkpoint:
        assert outline.architecture == checkpoint.architecture
        assert {n: (w.dtype, w.shape) for n, w in outline.trunk.items()} == {
            n: (w.dtype, w.shape) for n, w in checkpoint.trunk.items()
        }


def test_an_unknown_dtype_is_refused(example_folder, tmp_path):
    shutil.copy(example_folder / "config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("torch_dtype", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float8"}))
    with pytest.raises(SourceError, match="'float8'"):
        Outline.of_folder(tmp_path)
