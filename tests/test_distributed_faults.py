"""Ranks that die, that disagree or that never come: an error that names op and rank, within the group's timeout."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

if not dist.is_available():
    pytest.skip("this build of PyTorch has no distributed", allow_module_level=True)

from regfast.distributed import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

SECONDS = 3


@pytest.fixture(scope="module")
def pair():
    processes = Ranks(2, SECONDS)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def debugged_pair():
    processes = Ranks(2, SECONDS, debug=True)
    yield processes
    processes.close()


def logits(rows=6, dtype=torch.float32, op=vocab_parallel_cross_entropy, seed=0, **options):
    torch.manual_seed(seed)
    return op(torch.randn(rows, 5, dtype=dtype), torch.randint(10, (rows,)), **options)


def linear(rows=6, dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    x, w = (torch.randn(shape, dtype=dtype) for shape in ((rows, 3), (5, 3)))
    return vocab_parallel_linear_cross_entropy(x, w, torch.randint(10, (rows,)), **options)


def message_of(call, *arguments, **options) -> str:
    """Of the error that it ends in, and within which time."""
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        call(*arguments, **options)
    assert time.monotonic() - begin < 3 * SECONDS
    return str(raised.value)


DISAGREEMENTS = [
    ({"rows": 7}, "input: expected the same on all ranks, got torch.float32 (6, ", "(7, "),
    ({"dtype": torch.float64}, "input: expected the same on all ranks, got torch.float32", "torch.float64"),
    ({"label_smoothing": 0.1}, "label_smoothing: expected the same on all ranks, got 0.0 on rank 0", "0.1 on rank 1"),
    ({"outputs": ("lse",)}, "outputs: expected the same on all ranks, got ('loss',) on rank 0", "('lse',) on rank 1"),
    ({"seed": 1}, "target: expected the same classes on all ranks, got others on rank 1 than on rank 0"),
]


def debugged_case() -> None:
    second = dist.get_rank() == 1
    for call, name in ((logits, "vocab_parallel_cross_entropy"), (linear, "vocab_parallel_linear_cross_entropy")):
        assert call().isfinite()
        for options, *words in DISAGREEMENTS:
            message = message_of(call, **(options if second else {}))
            for word in (f"regfast.{name}: ", *words):
                assert word in message, (word, message)
    message = message_of(linear if second else logits)
    assert "got vocab_parallel_cross_entropy on rank 0 and vocab_parallel_linear_cross_entropy on rank 1" in message
    assert logits().isfinite()  # nothing is left in the group by any of them


def test_debug_mode_tells_what_differs(debugged_pair):
    debugged_pair(debugged_case)


def undebugged_case(call, options) -> str:
    return message_of(call, **(options if dist.get_rank() == 1 else {}))


@pytest.mark.parametrize("options", [{"rows": 7}, {"dtype": torch.float64}, {"z_loss": 0.1}], ids=str)
def test_without_it_each_rank_has_an_error_from_the_header(pair, options):
    for message in pair(undebugged_case, linear, options):
        assert "regfast.vocab_parallel_linear_cross_entropy: group: expected the same shapes, dtypes and" in message
        assert "got others on rank 1 than on rank 0; TORCH_DISTRIBUTED_DEBUG=DETAIL tells which" in message


@pytest.mark.parametrize("call", [logits, linear])
def test_without_it_other_targets_are_an_error_too(pair, call):
    for message in pair(undebugged_case, call, {"seed": 1}):
        assert "cross_entropy: target: expected the same classes on all ranks, got others on rank 1" in message


@pytest.mark.parametrize("options", [{"rows": 4000}, {"dtype": torch.float64}], ids=str)
def test_without_it_messages_of_different_sizes_give_no_number(pair, options):
    """gloo ends the process that receives too much, and the other one is told that it is gone."""
    answers = pair.ask(undebugged_case, logits, options)
    assert not all(well for well, _ in answers)
    for rank, (well, message) in enumerate(answers):
        if well:
            assert "regfast.vocab_parallel_cross_entropy: all_reduce of maxima: expected all 2 ranks" in message
            assert f"got on rank {rank}: " in message
        else:
            assert message == f"rank {rank} has died"


def dying_case(call) -> str:
    if dist.get_rank() == 1:
        os._exit(1)
    return message_of(call)


@pytest.mark.parametrize("call", [logits, linear])
def test_a_rank_that_dies(pair, call):
    (well, message), other = pair.ask(dying_case, call)
    assert well, message
    assert other == (False, "rank 1 has died")
    assert f"regfast.vocab_parallel_{'linear_' if call is linear else ''}cross_entropy: all_reduce of" in message
    assert "expected all 2 ranks of the group to take part" in message
    assert "got on rank 0: " in message


def missing_case(call) -> str:
    if dist.get_rank() == 1:
        with pytest.raises(RuntimeError, match="label_smoothing"):
            call(label_smoothing=2.0)
        time.sleep(1.5 * SECONDS)
        return "absent"
    return message_of(call)


def test_a_rank_that_raises_on_its_own_leaves_the_others_no_longer_than_the_timeout(pair):
    message, absent = pair(missing_case, logits)
    pair.close()  # a group that has waited in vain is of no use
    assert absent == "absent"
    assert "regfast.vocab_parallel_cross_entropy: all_reduce of maxima: expected all 2 ranks" in message


def missing_in_debug_mode_case() -> str:
    if dist.get_rank() == 1:
        time.sleep(1.5 * SECONDS)
        return "absent"
    return message_of(logits)


def test_debug_mode_names_the_rank_that_is_missing(debugged_pair):
    message, absent = debugged_pair(missing_in_debug_mode_case)
    debugged_pair.close()
    assert absent == "absent"
    assert "regfast.vocab_parallel_cross_entropy: debug mode: expected all 2 ranks" in message
    assert "Ranks 1 failed" in message
