"""The original, layer by layer: transformers' numbers, in bounded memory, and refusals."""

import errno
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import inside
from make_checkpoint import SHAPES, make_checkpoint
from safetensors.torch import load_file, save_file
from streamed_answers import some_windows, streamed, transformers_answer

from converter.checkpoint.source import Checkpoint
from converter.forward import expert_forward, outer_model, streamed_model
from converter.forward.streamed_model import StreamedModel
from formats.errors import DoesNotFitError, SourceError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "mini"
    make_checkpoint(folder, SHAPES["mini"], 3, dtype="F32", layout="fused")
    return folder


@pytest.mark.parametrize("model", ["source", "example_folder"])
def test_streamed_predictions_are_those_of_transformers(
    model: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    windows = some_windows(5, 40)
    logits, chosen = streamed(folder, windows)
    expected, expected_chosen = transformers_answer(folder, windows)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(chosen, expected_chosen, strict=True)
    )


def test_a_tied_head_is_the_embeddings(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, SHAPES["mini"], 1, dtype="F32", tied=True)
    windows = some_windows(1, 8)
    torch.testing.assert_close(
        streamed(tmp_path, windows)[0], transformers_answer(tmp_path, windows)[0]
    )


def test_pieces_change_nothing_but_rounding(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = some_windows(5, 40)
    whole = streamed(source, windows)[0]
    monkeypatch.setattr(streamed_model, "TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(expert_forward, "ROWS_AT_ONCE", 32)
    monkeypatch.setattr(outer_model, "VOCABULARY_AT_ONCE", 1000)
    torch.testing.assert_close(streamed(source, windows)[0], whole)


def test_positions_of_a_window_come_as_asked_for(source: Path) -> None:
    with Checkpoint(source) as checkpoint:
        model = StreamedModel(checkpoint, some_windows(2, 16))
        model.run()
        (logits, chosen), _ = model.predictions()
        assert logits(3, 7).shape == (4, 4096)
        torch.testing.assert_close(logits(3, 7), logits(0, 16)[3:7])
        assert chosen.shape == (3, 16, 2)


class CountingCheckpoint(Checkpoint):
    """A checkpoint that counts the bytes of weights in memory.

    The source is float32, so computation uses the weights as they were read.
    """

    alive = most = 0

    def read_rows(self, *arguments: Any) -> torch.Tensor:
        array = super().read_rows(*arguments).numpy().copy()
        self.alive += array.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(array, self._gone, array.nbytes)
        return torch.from_numpy(array)

    def _gone(self, n_bytes: int) -> None:
        self.alive -= n_bytes


def test_a_layers_weights_and_two_slices_of_an_expert_are_the_most_in_memory(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_forward, "ROWS_AT_ONCE", 32)
    monkeypatch.setattr(outer_model, "VOCABULARY_AT_ONCE", 64)
    windows = some_windows(4, 32)
    checkpoint = CountingCheckpoint(source)
    with checkpoint:
        model = StreamedModel(checkpoint, windows)
        model.run()
        for logits, _ in model.predictions():
            logits(0, 32)
        # hidden 64, two of four key and value heads of 16, 4 experts: q, k, v, o, two norms, the
        # router.
        layer = 4 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 2 * 64 + 4 * 64)
        whole = checkpoint.n_bytes
    assert checkpoint.most == layer + 4 * (2 * 32 * 64)
    assert checkpoint.alive == 0
    assert whole > 15 * checkpoint.most


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells mappings by /proc")
def test_activations_stand_in_nameless_files(source: Path) -> None:
    def mapped(address: int) -> str:
        for line in Path("/proc/self/maps").read_text().splitlines():
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            if begin <= address < end:
                return line
        return ""

    with Checkpoint(source) as checkpoint:
        model = StreamedModel(checkpoint, some_windows(2, 16))
        model.run()
        for tensor in (inside(model, "stream"), *inside(model, "files").tensors):
            assert mapped(tensor.data_ptr()).endswith("(deleted)")


def test_no_room_for_activations_is_said_before_the_work(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streamed_model.os, "posix_fallocate", full)
    with (
        Checkpoint(source) as checkpoint,
        pytest.raises(DoesNotFitError, match=r"no room for 8192 bytes.*\n.*TMPDIR"),
    ):
        StreamedModel(checkpoint, some_windows(2, 16))


def test_a_token_without_embedding_is_named(source: Path) -> None:
    with (
        Checkpoint(source) as checkpoint,
        pytest.raises(SourceError, match=r"token 4096.*vocabulary of 4096"),
    ):
        StreamedModel(checkpoint, torch.tensor([[1, 4096]]))


def test_activations_that_are_not_finite_name_the_layer(source: Path, tmp_path: Path) -> None:
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (shard,) = tmp_path.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.layers.1.self_attn.o_proj.weight"][:] = 3e38
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(
        SourceError,
        match=r"layer 1: after attention.*largest weight there is 3e\+38: .*o_proj.weight",
    ):
        streamed(tmp_path, some_windows(1, 8))
