import pytest
import torch

from fdkit.errors import ConfigError
from fdkit.methods._queue import Queue, check_queue


def filled(*batches: int) -> Queue:
    """A queue of 6 zeros that took batches of the numbers 1, 2, 3 and so on."""
    queue, number = Queue(torch.zeros(6, 1)), 0
    for size in batches:
        queue.hold(torch.arange(number + 1, number + size + 1.0)[:, None])
        queue.push_held()
        number += size
    return queue


def test_rows_held_join_at_the_push_and_not_before() -> None:
    queue = Queue(torch.zeros(6, 1))
    queue.hold(torch.ones(2, 1))
    assert queue.rows.sum() == 0
    queue.hold(2 * torch.ones(1, 1))
    queue.push_held()
    assert queue.rows.flatten().tolist() == [1, 1, 2, 0, 0, 0]
    queue.push_held()
    assert queue.num_pushed == 3


def test_the_oldest_rows_are_replaced_and_the_place_wraps() -> None:
    assert filled(2, 2, 2).rows.flatten().tolist() == [1, 2, 3, 4, 5, 6]
    assert filled(2, 2, 2, 2).rows.flatten().tolist() == [7, 8, 3, 4, 5, 6]
    assert filled(4, 4).rows.flatten().tolist() == [7, 8, 3, 4, 5, 6]  # even within a batch


def test_it_is_full_once_no_first_row_is_left() -> None:
    assert [filled(*[2] * count).is_full() for count in range(5)] == [False, False, False, True, True]


def test_rows_held_have_no_gradient() -> None:
    queue = Queue(torch.zeros(2, 1))
    queue.hold(torch.ones(2, 1, requires_grad=True))
    queue.push_held()
    assert not queue.rows.requires_grad


def test_a_loaded_state_goes_on_and_forgets_what_was_known() -> None:
    half, full = filled(2), filled(2, 2, 2)
    assert full.is_full()
    full.hold(9 * torch.ones(2, 1))
    full.load_state_dict(half.state_dict())
    assert not full.is_full()
    full.push_held()
    assert torch.equal(full.rows, half.rows)
    assert full.num_pushed == 2


def test_a_queue_that_batches_do_not_fill_is_refused() -> None:
    check_queue(0, 8, section="swav")
    check_queue(16, 8, section="swav")
    with pytest.raises(ConfigError, match=r"swav.queue_size 20 is no multiple of the 8 images.*\n.*-size 16"):
        check_queue(20, 8, section="swav")
    with pytest.raises(ConfigError, match=r"--swav.queue-size 8"):
        check_queue(3, 8, section="swav")
