"""Caches addressed by position, against a dictionary."""

from __future__ import annotations

import torch
from torch import Tensor

from draftopd.targets.cache import ContextCache, PositionCache, PositionStore


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_store_equals_a_dictionary() -> None:
    store, written = PositionStore(16), {}
    starts = torch.tensor([[0, 3, 1], [2, 5, 1], [4, 9, 2]])  # a write each; later ones overlap earlier ones
    for step, start in enumerate(starts):
        positions = start[:, None] + torch.arange(4)
        keys, values = random(3, 2, 4, 5, seed=step), random(3, 2, 4, 6, seed=step + 100)
        store.write(keys, values, positions)
        for row in range(3):
            for i, position in enumerate(positions[row].tolist()):
                written[row, position] = keys[row, :, i], values[row, :, i]
    keys, values = store.read(13)
    assert keys.shape == (3, 2, 13, 5) and values.shape == (3, 2, 13, 6)
    for row in range(3):
        for position in range(13):
            key, value = written.get((row, position), (torch.zeros(2, 5), torch.zeros(2, 6)))
            assert torch.equal(keys[row, :, position], key)
            assert torch.equal(values[row, :, position], value)


def test_flat_positions_hold_for_every_row() -> None:
    ragged, flat = PositionStore(8), PositionStore(8)
    keys, values = random(3, 2, 4, 5), random(3, 2, 4, 5, seed=1)
    positions = torch.tensor([1, 2, 5, 6])
    flat.write(keys, values, positions)
    ragged.write(keys, values, positions.expand(3, -1))
    assert torch.equal(flat.read(8)[0], ragged.read(8)[0])
    assert torch.equal(flat.read(8)[1], ragged.read(8)[1])
    assert torch.equal(flat.read(8)[0][:, :, positions], keys)


def test_select_keeps_rows_in_the_order_asked() -> None:
    store = PositionStore(4)
    store.select(torch.tensor([0]))
    keys, values = random(3, 2, 4, 5), random(3, 2, 4, 5, seed=1)
    store.write(keys, values, torch.arange(4))
    store.select(torch.tensor([2, 0]))
    assert torch.equal(store.read(4)[0], keys[[2, 0]])
    assert torch.equal(store.read(4)[1], values[[2, 0]])


def test_position_cache_writes_where_it_was_told() -> None:
    cache = PositionCache(capacity=8, layers=2)
    first, second = random(2, 1, 3, 4), random(2, 1, 3, 4, seed=1)
    cache.at(torch.arange(3), 3)
    for layer in range(2):
        keys, values = cache.update(first + layer, -first - layer, layer)
        assert torch.equal(keys, first + layer) and torch.equal(values, -first - layer)
    keys, _ = cache.at(torch.tensor([[2, 3, 4], [1, 2, 3]]), 5).update(second, second, 1)
    assert cache.get_seq_length() == 5
    assert torch.equal(keys[0], torch.cat([first[0, :, :2] + 1, second[0]], 1))
    assert torch.equal(keys[1], torch.cat([first[1, :, :1] + 1, second[1], torch.zeros(1, 1, 4)], 1))
    assert torch.equal(cache.stores[0].read(3)[0], first)
    cache.select(torch.tensor([1]))
    assert all(torch.equal(store.read(1)[0], (first + i)[1:, :, :1]) for i, store in enumerate(cache.stores))


def test_context_cache_shows_but_does_not_keep() -> None:
    context = PositionCache(capacity=8, layers=1)
    recorded = random(2, 1, 6, 4)
    context.at(torch.arange(6), 6).update(recorded, -recorded, 0)
    blocks = random(2, 1, 3, 4, seed=1)
    cache = ContextCache(context, visible=5)
    keys, values = cache.update(blocks, 2 * blocks, 0)
    assert cache.get_seq_length() == 5
    assert torch.equal(keys, torch.cat([recorded[:, :, :5], blocks], 2))
    assert torch.equal(values, torch.cat([-recorded[:, :, :5], 2 * blocks], 2))
    assert torch.equal(context.stores[0].read(6)[0], recorded)
    assert not context.stores[0].read(8)[0][:, :, 6:].any()
