"""A KV cache layer in 8 bits holds what torch's reference makes of the appended keys and values."""

import copy

import pytest
import torch
from cache_changes import CACHE_CHANGES
from transformers.cache_utils import DynamicLayer

from formats.errors import MoeConvertError
from loader.hf.eight_bit_layer import EightBitLayer
from loader.hf.growing_cache import GrowingLayer

WIDTH = 80


def states(positions, seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, positions, WIDTH, generator=generator) for _ in range(2))


def in_8_bits(rows):
    """`rows` [..., WIDTH] as int8 codes times a bfloat16 scale of each 64 values."""
    parts = []
    for part in rows.split(64, -1):
        scale = (part.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
        parts.append((part / scale).round().clamp(-127, 127) * scale)
    return torch.cat(parts, -1)


def filled(lengths, batch=2):
    """A layer of 8 bits after appends of these lengths, and a DynamicLayer of its values."""
    ours, plain = EightBitLayer(), DynamicLayer()
    for number, length in enumerate(lengths):
        rows = states(length, number, batch)
        ours.update(*rows)
        plain.update(*map(in_8_bits, rows))
    return ours, plain


def agree(ours, plain):
    return all(torch.equal(a, b) for a, b in ((ours.keys, plain.keys), (ours.values, plain.values)))


@pytest.mark.parametrize("lengths", [[1], [16], [5, 1, 1, 16, 1], [300, 1, 700, 3]])
def test_appended_positions_are_quantized_once(lengths):
    ours, plain = filled(lengths)
    assert agree(ours, plain)
    assert ours.get_seq_length() == sum(lengths)


def test_the_memory_is_about_half_of_16_bits():
    rows = [torch.randn(1, 8, 4096, 128).bfloat16() for _ in range(2)]
    ours, plain = EightBitLayer(), GrowingLayer()
    ours.update(*rows)
    plain.update(*rows)
    bytes_8 = sum(part.nbytes for part in ours.memory)
    bytes_16 = sum(part.untyped_storage().nbytes() for part in (plain.keys, plain.values))
    assert bytes_8 == bytes_16 * 66 // 128


@pytest.mark.parametrize("change", CACHE_CHANGES.values(), ids=CACHE_CHANGES)
def test_changes_of_the_batch_and_crops_are_those_of_the_dynamic_layer(change):
    ours, plain = filled([20, 1])
    change(ours)
    change(plain)
    assert agree(ours, plain)
    rows = states(30, 9, plain.keys.shape[0])
    ours.update(*rows)
    plain.update(*map(in_8_bits, rows))
    assert agree(ours, plain)


def test_copies_are_independent():
    ours, plain = filled([20])
    copies = [copy.deepcopy(ours), ours.copied(20)]
    ours.update(*states(1, 5))
    assert all(agree(other, plain) for other in copies)
    part = ours.copied(18)
    plain.crop(-2)
    assert agree(part, plain)


def test_reset_empties():
    ours, _ = filled([6])
    ours.reset()
    assert ours.get_seq_length() == 0
    ours.update(*states(3, 0, batch=1))
    assert ours.keys.shape == (1, 3, 3, WIDTH)


def test_memory_of_inference_mode_may_go_on_outside():
    with torch.inference_mode():
        ours, plain = filled([6, 1])
    rows = states(2, 4)
    ours.update(*rows)
    assert torch.equal(ours.keys, torch.cat((plain.keys, in_8_bits(rows[0])), 2))


def test_native_code_gets_no_memory_of_other_sequences_or_heads():
    ours, _ = filled([20])
    for kind in ((3, WIDTH), (2, WIDTH), (3, 64)):
        with pytest.raises(ValueError, match="KV cache in 8 bits"):
            ours.place((*kind, torch.float32, torch.device("cpu")))


def test_gradients_are_refused():
    rows = [part.requires_grad_() for part in states(2, 0)]
    with pytest.raises(MoeConvertError, match=r"kv_bits.*gradients"):
        EightBitLayer().update(*rows)


def test_an_assignment_is_refused():
    ours, plain = filled([2])
    with pytest.raises(MoeConvertError, match="kv_bits"):
        ours.keys = plain.keys


def test_values_that_are_not_finite_or_too_small_keep_their_meaning():
    rows = torch.full((1, 1, 3, WIDTH), 127.0)
    rows[0, 0, 0, 70] = torch.inf
    rows[0, 0, 1] = 1e-31
    ours = EightBitLayer()
    ours.update(rows, rows)
    assert ours.keys[0, 0, 0, 64:].isnan().all()
    assert ours.keys[0, 0, 0, :64].eq(127).all()
    assert ours.keys[0, 0, 1].eq(0).all()
