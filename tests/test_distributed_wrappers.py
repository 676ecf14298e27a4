"""All modules together under DDP, FSDP, fully_shard, activation checkpoints and torch.distributed.checkpoint, on four
real processes, against a single process that has all rows."""

import pytest
import ranks as here
import torch
import torch.distributed as dist
from torch import nn

import regfast

if not dist.is_available():
    pytest.skip("this build of PyTorch has no distributed", allow_module_level=True)

from regfast.distributed import VocabParallelLinearCrossEntropyLoss

ROWS, FEATURES, CLASSES, STEPS = 16, 8, 24, 3


class Model(nn.Module):
    """Every module that has parameters, and every loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = regfast.Linear(FEATURES, 16, activation="gelu")
        self.second = regfast.PHMLinear(16, 16, 4, activation="tanh")
        self.head = regfast.LinearCrossEntropyLoss(16, CLASSES, bias=True, label_smoothing=0.1, reduction="sum")
        self.regression = regfast.LinearNLLLoss(16, 2, family="gaussian", sigma="learned", reduction="sum")
        self.logits = regfast.Linear(16, 5)
        self.loss = regfast.CrossEntropyLoss(z_loss=1e-2, reduction="sum")
        self.square = regfast.MSELoss(reduction="sum")

    def features(self, x):
        return self.second(self.first(x))

    def forward(self, x, classes, values):
        h = self.features(x)
        logits = self.logits(h)
        return (
            self.head(h, classes)
            + self.regression(h, values)
            + self.loss(logits, classes.clamp(max=4))
            + self.square(logits[:, :2], values)
        )


class Checkpointed(Model):
    def features(self, x):
        return torch.utils.checkpoint.checkpoint(super().features, x, use_reentrant=False)


def batch():
    generator = torch.Generator().manual_seed(5)
    x, values = (torch.randn(ROWS, n, generator=generator) for n in (FEATURES, 2))
    return x, torch.randint(CLASSES, (ROWS,), generator=generator), values


def trained(model: nn.Module, rows: slice = slice(None), scale: float = 1.0) -> list[float]:
    """Losses of a few steps. Sums are divided by all rows; wrappers divide gradients by the ranks, which is undone."""
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-2, momentum=0.9)  # wrong scales show, unlike in Adam
    losses = []
    for _ in range(STEPS):
        loss = model(*(t[rows] for t in batch())) / ROWS
        (loss * scale).backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if rows != slice(None):
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


def true_model(cls=Model):
    torch.manual_seed(1)
    return cls()


def compare(state: dict, losses: list[float]) -> None:
    model = true_model()
    expected = trained(model)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    theirs = model.state_dict()
    assert state.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def my_rows() -> slice:
    each = ROWS // dist.get_world_size()
    return slice(each * dist.get_rank(), each * (dist.get_rank() + 1))


def ddp_case(cls) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = true_model(cls)
    losses = trained(DistributedDataParallel(model), my_rows(), dist.get_world_size())
    compare(model.state_dict(), losses)


def fsdp_case(cls) -> None:
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = FullyShardedDataParallel(
        true_model(cls), auto_wrap_policy=ModuleWrapPolicy({regfast.PHMLinear, regfast.LinearNLLLoss}),
        device_id=torch.device("cpu"), use_orig_params=True,
    )  # fmt: skip
    losses = trained(model, my_rows(), dist.get_world_size())
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        compare(model.state_dict(), losses)


def fully_shard_case(cls, folder: str) -> None:
    """And its state through torch.distributed.checkpoint, into a model that is sharded anew."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def sharded(model):
        for layer in (model.first, model.second, model.head, model.regression):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    model = sharded(true_model(cls))
    losses = trained(model, my_rows(), dist.get_world_size())
    compare(
        {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}, losses
    )

    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    torch.manual_seed(2)
    other = sharded(cls())
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state["model"])
    for (name, a), (_, b) in zip(other.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a.to_local(), b.to_local()), name
    again = trained(other, my_rows(), dist.get_world_size())
    assert again[0] < losses[-1]  # it goes on where the first one was


def two_dimensions_case() -> None:
    """Data parallel over pairs (by DDP), the vocabulary over the ranks of a pair."""
    from torch.nn.parallel import DistributedDataParallel

    rank = dist.get_rank()
    data = [dist.new_group([r, r + 2]) for r in range(2)][rank % 2]

    class Body(nn.Module):
        def __init__(self, head) -> None:
            super().__init__()
            self.body, self.head = regfast.Linear(FEATURES, 16, activation="gelu"), head

        def forward(self, x, classes, values):
            return self.head(self.body(x), classes)

    def model(head):
        torch.manual_seed(1)
        return Body(head())

    def whole_head():
        torch.manual_seed(9)
        return regfast.LinearCrossEntropyLoss(16, CLASSES, bias=True, reduction="sum")

    def part_of_head():
        head = VocabParallelLinearCrossEntropyLoss(16, CLASSES, group=here.groups[2], bias=True, reduction="sum")
        places = slice(12 * (rank % 2), 12 * (rank % 2) + 12)
        head.load_state_dict({name: t[places] for name, t in whole_head().state_dict().items()})
        return head

    theirs, ours = model(whole_head), model(part_of_head)
    expected = trained(theirs)
    rows = slice(0, 8) if rank < 2 else slice(8, 16)
    losses = trained(DistributedDataParallel(ours, process_group=data), rows, 2)
    # The sum over all ranks has each row twice.
    torch.testing.assert_close([loss / 2 for loss in losses], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.body.state_dict(), theirs.body.state_dict(), rtol=1e-4, atol=1e-4)
    places = slice(12 * (rank % 2), 12 * (rank % 2) + 12)
    torch.testing.assert_close(ours.head.linear.weight, theirs.head.linear.weight[places], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [Model, Checkpointed])
@pytest.mark.parametrize("case", [ddp_case, fsdp_case])
def test_data_parallel(ranks, case, model):
    ranks(case, model)


@pytest.mark.parametrize("model", [Model, Checkpointed])
def test_fully_shard(ranks, model, tmp_path):
    ranks(fully_shard_case, model, str(tmp_path))


def test_data_and_vocabulary_parallel(ranks):
    ranks(two_dimensions_case)
