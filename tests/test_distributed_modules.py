"""Copies and files of the vocabulary-parallel modules: their process group is shared, left out or refused in words."""

import copy
import io
import pickle

import pytest
import ranks as here
import torch
import torch.distributed as dist
from util import class_targets

if not dist.is_available():
    pytest.skip("this build of PyTorch has no distributed", allow_module_level=True)

from regfast.distributed import VocabParallelCrossEntropyLoss, VocabParallelLinearCrossEntropyLoss


def modules(group) -> list[torch.nn.Module]:
    options = {"label_smoothing": 0.1, "loss_dtype": torch.float64}
    loss = VocabParallelCrossEntropyLoss(torch.rand(5), group=group, **options)
    return [loss, VocabParallelLinearCrossEntropyLoss(3, 20, group=group, bias=True, weight=torch.rand(5), **options)]


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_same(other, module, group) -> None:
    """Of one more module, that it is the same with this group, and works."""
    assert type(other) is type(module) and other.options == module.options
    assert other.group is group
    x = torch.randn(6, 5 if isinstance(module, VocabParallelCrossEntropyLoss) else 3)
    target = class_targets((6,), 20, 0.3)
    assert torch.equal(other(x, target), module(x, target))


def copies_case() -> None:
    for group in (None, here.groups[4], dist.new_group([0, 1, 2, 3])):
        for module in modules(group):
            for other in (copy.deepcopy(module), copy.deepcopy(torch.nn.Sequential(module))[0]):
                assert_same(other, module, group)
                assert other.weight is not module.weight
                assert not {id(p) for p in other.parameters()} & {id(p) for p in module.parameters()}
            shallow = copy.copy(module)
            assert_same(shallow, module, group)
            assert shallow.weight is module.weight  # as of any module
            twice = torch.nn.ModuleList([module, module])
            assert len({id(m) for m in copy.deepcopy(twice)}) == 1


def files_case() -> None:
    for group in (None, here.groups[4]):  # all ranks, however they were named
        for module in modules(group):
            assert_same(pickle.loads(pickle.dumps(module)), module, None)
            assert_same(saved_and_loaded(torch.nn.Sequential(module))[0], module, None)
            assert module.group is group
    for module in modules(dist.new_group([0, 1, 2, 3])):
        message = rf"regfast\.{type(module).__name__}: group: expected None .* got a process group of 4 ranks"
        for save in (pickle.dumps, lambda m: torch.save(torch.nn.Sequential(m), io.BytesIO())):
            with pytest.raises(pickle.PicklingError, match=message):
                save(module)
        # What the message says to do.
        group, module.group = module.group, None
        other = pickle.loads(pickle.dumps(module))
        module.group = other.group = group
        assert_same(other, module, group)
        other.load_state_dict(module.state_dict())


def mesh_case() -> None:
    """torch writes a mesh as its ranks, and makes the groups of it again."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("vocabulary",))
    for module in modules(mesh):
        assert_same(copy.deepcopy(module), module, mesh)
        for other in (pickle.loads(pickle.dumps(module)), saved_and_loaded(module)):
            assert other.group == mesh
            assert_same(other, module, other.group)


@pytest.mark.parametrize("case", [copies_case, files_case, mesh_case])
def test_modules(ranks, case):
    ranks(case)


def test_a_file_of_a_process_without_ranks():
    """A module of all ranks is read where no group is yet."""
    module = VocabParallelCrossEntropyLoss(torch.rand(5), label_smoothing=0.1)
    other = pickle.loads(pickle.dumps(module))
    assert other.group is None and other.options == module.options and torch.equal(other.weight, module.weight)
