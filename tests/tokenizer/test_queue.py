"""The queue of latents: test V7 of the method, the fill count, and the waiting latents."""

import copy

import pytest
import torch
from torch import Tensor

from tokenizer.quantizers.base.latent_queue import LatentQueue


def rows(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def stored(queue: LatentQueue) -> list[float]:
    return queue.samples[:, 0].tolist()


def in_order(queue: LatentQueue) -> list[float]:
    """Oldest first."""
    return stored(queue)[int(queue.head) :] + stored(queue)[: int(queue.head)]


def test_v7_the_oldest_leave_first():
    queue = LatentQueue(5, 1, flush=1)
    queue.add(rows(1, 1, 1))
    queue.add(rows(2, 2, 2))
    assert stored(queue) == [2, 1, 1, 2, 2]
    assert int(queue.head) == 1


@pytest.mark.parametrize("before", [0, 3, 5])
def test_v7_of_more_than_it_holds_the_last_remain(before):
    queue = LatentQueue(5, 1, flush=1)
    queue.add(rows(*[0] * before))
    queue.add(rows(1, 2, 3, 4, 5, 6))
    assert in_order(queue) == [2, 3, 4, 5, 6]


def test_any_sequence_of_batches_keeps_the_last_of_them_in_order():
    queue, seen = LatentQueue(7, 1, flush=1), []
    for step, count in enumerate([3, 0, 2, 4, 1, 9, 14, 2, 6]):
        batch = [float(100 * step + i) for i in range(count)]
        queue.add(torch.tensor(batch).reshape(-1, 1))
        seen += batch
        if len(seen) >= 7:
            assert in_order(queue) == seen[-7:]


def test_filled_counts_up_to_the_capacity():
    queue = LatentQueue(5, 1, flush=1)
    counts = []
    for _ in range(4):
        queue.add(rows(1, 2))
        counts.append((int(queue.filled), queue.full))
    assert counts == [(2, False), (4, False), (5, True), (5, True)]


def test_a_full_queue_changes_only_when_enough_latents_wait():
    queue = LatentQueue(5, 1, flush=3)
    queue.add(rows(1, 2, 3, 4, 5))
    assert not queue.add(rows(6, 7))
    assert stored(queue) == [1, 2, 3, 4, 5]
    assert queue.add(rows(8, 9))
    assert in_order(queue) == [5, 6, 7, 8, 9]
    assert int(queue.num_waiting) == 0


def test_add_tells_whether_the_samples_changed():
    queue = LatentQueue(4, 1, flush=2)
    batches = [rows(1), torch.empty(0, 1), rows(2, 3, 4), rows(5), torch.empty(0, 1), rows(6), rows(7, 8)]
    for batch in batches:
        before = queue.samples.clone()
        assert queue.add(batch) == (not torch.equal(queue.samples, before))


def test_a_loaded_queue_goes_on_as_if_it_never_stopped():
    queue, loaded = LatentQueue(5, 1, flush=3), LatentQueue(5, 1, flush=3)
    queue.add(rows(1, 2, 3, 4, 5, 6))
    queue.add(rows(7, 8))
    loaded.load_state_dict(queue.state_dict())
    for each in (queue, loaded):
        each.add(rows(9))
    assert in_order(loaded) == in_order(queue) == [5, 6, 7, 8, 9]


def test_a_copy_is_another_queue():
    queue = LatentQueue(3, 1, flush=1)
    copy.deepcopy(queue).add(rows(1, 2, 3))
    assert not queue.full


def test_latents_enter_without_their_gradient():
    queue = LatentQueue(4, 1, flush=2)
    queue.add(rows(1.0, 2, 3, 4).requires_grad_())
    queue.add(rows(5.0).requires_grad_())
    assert not queue.samples.requires_grad
    assert not queue.waiting.requires_grad


def test_bfloat16_latents_are_stored_as_float32():
    queue = LatentQueue(2, 1, flush=1)
    queue.add(rows(1.5, 2.5).bfloat16())
    assert queue.samples.dtype == torch.float32
    assert stored(queue) == [1.5, 2.5]
