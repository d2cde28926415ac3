"A pool that outgrows its device goes on beside it, with the same batches."

from __future__ import annotations

from typing import Any

import pytest
import torch

from dfkd_nb.foundations.image_store import ImageStore
from dfkd_nb.foundations.loop import GrowingPool
from dfkd_nb.generators.replay import ReplayPool
from dfkd_nb.toolbox.domains import DOMAINS

DIGITS = DOMAINS['digits']


def batch(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 1, 8, 8), generator=generator).to(torch.uint8)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    "A device that holds thirty images; the sizes that were asked of it."
    asked: list[int] = []
    plain = ImageStore._empty

    def empty(self: Any, count: int) -> torch.Tensor:
        if not self.spilled:
            asked.append(count)
            if count > 30:
                raise torch.OutOfMemoryError('CUDA out of memory')
        return plain(self, count)

    monkeypatch.setattr(ImageStore, '_empty', empty)
    return asked


def test_a_full_device_moves_the_images_beside_it(small: list[int]) -> None:
    store = ImageStore(DIGITS.shape, 'cpu')
    parts = [batch(8, seed) for seed in range(8)]
    for number, part in enumerate(parts, 1):
        store.append(part)
        assert store.spilled == (8 * number > 16), 'doubling asks for 32'
        assert store.images.equal(torch.cat(parts[:number]))
    assert store.fetch(torch.tensor([63, 0, 9])).equal(torch.cat(parts)[[63, 0, 9]])
    assert small.count(32) == 1, 'the device is not asked again'
    store.replace(parts[3])
    assert len(store) == 8 and store.images.equal(parts[3])


def test_a_replay_buffer_beside_its_device_draws_the_same(
    request: pytest.FixtureRequest,
) -> None:
    "Sixty-four images do not fit, and nothing else changes: draws, counts, checkpoints."
    roomy = ReplayPool(DIGITS, 64)
    request.getfixturevalue('small')
    full, resumed = ReplayPool(DIGITS, 64), ReplayPool(DIGITS, 64)
    assert full.store.spilled and not roomy.store.spilled
    for seed in range(5):  # one more than there is room for
        logits = torch.randn(16, 10, generator=torch.Generator().manual_seed(seed))
        for pool in (full, roomy):
            pool.add(batch(16, seed), teacher_logits=logits)
    assert full.images[:32].equal(torch.cat([batch(16, 4), batch(16, 1)]))
    resumed.load_state_dict(full.state_dict())
    drawn = []
    for pool in (full, roomy, resumed):
        images, labels = pool.sample(9, torch.Generator().manual_seed(3))
        assert images.equal(roomy.images[pool.last_indices])
        assert labels is not None and labels.equal(roomy.labels[pool.last_indices])
        drawn.append(images)
    assert drawn[0].equal(drawn[1]) and drawn[0].equal(drawn[2])


def test_memory_that_ends_everywhere_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ImageStore(DIGITS.shape, 'cpu')

    def empty(self: Any, count: int) -> torch.Tensor:
        raise torch.OutOfMemoryError('nothing left')

    monkeypatch.setattr(ImageStore, '_empty', empty)
    with pytest.raises(torch.OutOfMemoryError, match='nothing left'):
        store.append(batch(2, 0))


def test_batches_do_not_depend_on_where_the_images_are(
    small: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def filled() -> GrowingPool:
        pool = GrowingPool(DIGITS)
        for seed in range(6):
            pool.add(batch(8, seed), torch.arange(8))
        return pool

    spilled = filled()
    assert spilled.store.spilled
    monkeypatch.undo()
    usual = filled()
    assert not usual.store.spilled
    rngs = [torch.Generator().manual_seed(0) for _ in range(2)]
    for _ in range(9):
        drawn = [p.sample(10, rng) for p, rng in zip((spilled, usual), rngs)]
        assert all(a.equal(b) for a, b in zip(*drawn))  # type: ignore[union-attr]
    again = GrowingPool(DIGITS)
    again.load_state_dict(spilled.state_dict())
    assert again.images.equal(usual.images) and again.labels.equal(usual.labels)
    assert len(again) == 48
