"""DTensors whose classes or rows are sharded, and tensor parallel plans, on four real processes."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from util import class_targets, probability_targets, spiky

import regfast
from regfast import reference

if not dist.is_available():
    pytest.skip("this build of PyTorch has no distributed", allow_module_level=True)

from test_distributed import gradients, leaf, raises, together
from test_distributed_traffic import counted
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

S0, S1, R = Shard(0), Shard(1), Replicate()
NAMES = ("loss", "lse", "entropy", "logprob", "argmax")
_meshes: dict = {}


def mesh_of(*shape: int):
    """Of all ranks, made once."""
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=("data", "vocabulary")[-len(shape) :])
    return _meshes[shape]


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def check(what: str, ours: list, inputs: list, theirs: list, leaves: list) -> None:
    """Values and gradients of DTensors against those of whole float64 tensors."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert isinstance(a, DTensor), what
        torch.testing.assert_close(whole(a), b, rtol=1e-12, atol=1e-12, msg=lambda m, i=i: f"{what}, output {i}: {m}")
    expected = gradients(theirs, leaves, torch.float64)
    roots = [o.redistribute(placements=[R] * o.device_mesh.ndim) for o in ours if o.requires_grad]
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in roots]
    upstream = [DTensor.from_local(g, o.device_mesh, o.placements) for g, o in zip(upstream, roots, strict=True)]
    got = torch.autograd.grad(roots, inputs, upstream)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(whole(a), b, rtol=1e-12, atol=1e-12, msg=lambda m, i=i: f"{what}, gradient {i}: {m}")


OPTIONS = [
    {},
    {"reduction": "sum", "z_loss": 0.1},
    {"reduction": "none", "label_smoothing": 0.2},
    {"outputs": NAMES, "label_smoothing": 0.1, "softcap": 4.0},
    {"normalizer": 7},
]
KINDS = ("classes", "weighted", "probabilities")


def some(*choices):
    """A fifth of all combinations: for each of the others another of the last."""
    for i, combination in enumerate(itertools.product(*choices)):
        if i % 5 == i // 5 % 5:
            yield combination


def logits_case() -> None:
    layouts = [((4,), [S1]), ((4,), [S0]), ((2, 2), [S0, S1]), ((2, 2), [R, S1]), ((2, 2), [S1, S0]), ((2, 2), [S0, R])]
    for (shape, placements), size, kind, options in some(layouts, ((6, 10), (5, 7), (4, 9, 3)), KINDS, OPTIONS):
        mesh = mesh_of(*shape)
        x = spiky(*size, dtype=torch.float64)
        target = class_targets((size[0], *size[2:]), size[1], 0.3)
        if kind == "probabilities":
            target = probability_targets(*size, dtype=torch.float64)
        weight = None if kind == "classes" else torch.rand(size[1], dtype=torch.float64)
        true = leaf(x)
        theirs = together(reference.cross_entropy(true, target, weight, **options))
        ours = distribute_tensor(x, mesh, placements).requires_grad_()
        replicated = [R] * mesh.ndim
        w = weight if weight is None or shape == (4,) else distribute_tensor(weight, mesh, replicated)
        got = together(regfast.cross_entropy(ours, distribute_tensor(target, mesh, replicated), w, **options))
        what = f"{placements} {size} {options} {kind}"
        check(what, got, [ours], theirs, [true])
        reduction = options.get("reduction", "mean")
        placed = [S0 if p == S0 and reduction == "none" else Partial() if p == S0 and reduction == "sum" else R
                  for p in placements]  # fmt: skip
        assert got[0].placements == tuple(placed), what
        assert len(got) == 1 or got[-1].placements == tuple(S0 if p == S0 else R for p in placements), what


def linear_case() -> None:
    layouts = [
        ((4,), [R], [S0]),
        ((4,), [S0], [S0]),
        ((4,), [S0], [R]),
        ((2, 2), [S0, R], [R, S0]),
        ((2, 2), [S0, S0], [R, S0]),
        ((2, 2), [R, R], [S0, R]),
        ((2, 2), [R, S1], [R, S1]),
    ]
    for (shape, of_input, of_weight), kind, options in some(layouts, KINDS, OPTIONS):
        mesh = mesh_of(*shape)
        x, w, b = (spiky(*size, dtype=torch.float64) for size in ((6, 5), (11, 5), (11,)))
        target = class_targets((6,), 11, 0.3)
        if kind == "probabilities":
            target = probability_targets(6, 11, dtype=torch.float64)
        weight = None if kind == "classes" else torch.rand(11, dtype=torch.float64)
        true = [leaf(t) for t in (x, w, b)]
        theirs = together(
            reference.linear_cross_entropy(*true[:2], target, linear_bias=true[2], weight=weight, **options)
        )
        replicated = [R] * mesh.ndim
        of_bias = [S0 if p == S0 else R for p in of_weight]
        ours = [
            distribute_tensor(t, mesh, p).requires_grad_() for t, p in ((x, of_input), (w, of_weight), (b, of_bias))
        ]
        target = distribute_tensor(target, mesh, replicated)
        weight = None if weight is None else distribute_tensor(weight, mesh, replicated)
        got = together(regfast.linear_cross_entropy(*ours[:2], target, linear_bias=ours[2], weight=weight, **options))
        check(f"{of_input} {of_weight} {options} {kind}", got, ours, theirs, true)


def traffic_case() -> None:
    """Logits that are sharded by class stay where they are; of sharded rows only the mean's count travels."""
    mesh = mesh_of(4)
    x, target = spiky(64, 40), class_targets((64,), 40, 0.3)
    logits = distribute_tensor(x, mesh, [S1]).requires_grad_()
    with counted() as sent:
        regfast.cross_entropy(logits, distribute_tensor(target, mesh, [R])).backward()
    assert [name for name, _ in sent] == ["all_reduce"] * 2, sent
    logits = distribute_tensor(x, mesh, [S0]).requires_grad_()
    with counted() as sent:
        regfast.cross_entropy(logits, distribute_tensor(target, mesh, [S0])).backward()
    assert sent == [("all_reduce", 8)], sent  # and DTensor's own, of the loss


def plans_case() -> None:
    """Modules under parallelize_module, as a user writes them."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = mesh_of(4)
    data, target = spiky(12, 8), class_targets((12,), 18, 0.3)

    def model(linear):
        torch.manual_seed(3)
        return nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 18))

    theirs = model(nn.Linear)
    expected = F.cross_entropy(theirs(data), target, label_smoothing=0.1)
    expected.backward()

    ours = parallelize_module(
        model(regfast.Linear), mesh, {"2": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    )
    logits = ours(data)
    assert isinstance(logits, DTensor) and logits.placements == (S1,)
    with counted() as sent:
        loss = regfast.cross_entropy(logits, target, label_smoothing=0.1)  # a plain target: each process has all of it
    assert [name for name, _ in sent] == ["all_reduce"] * 2
    torch.testing.assert_close(loss.full_tensor(), expected)
    loss.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(whole(a.grad), b.grad)

    # The loss that has the head in it. Hidden features are plain, and so is the result.
    class Model(nn.Module):
        def __init__(self, linear, loss):
            super().__init__()
            torch.manual_seed(3)
            self.body = linear(8, 16)
            self.loss = loss(16, 18, bias=True)

        def forward(self, x, target):
            return self.loss(self.body(x).relu(), target)

    theirs, ours = (Model(regfast.Linear, regfast.LinearCrossEntropyLoss) for _ in range(2))
    expected = theirs(data, target)
    expected.backward()
    parallelize_module(ours, mesh, {"loss.linear": ColwiseParallel()})
    assert [p.placements for p in ours.loss.parameters()] == [(S0,), (S0,)]
    loss = ours(data, target)
    assert not isinstance(loss, DTensor)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(whole(a.grad), b.grad)


def replicated_case() -> None:
    """Nothing is divided: what each process has is whole, and so is a plain target beside it."""
    mesh = mesh_of(4)
    x, w, target = spiky(6, 5, dtype=torch.float64), spiky(11, 5, dtype=torch.float64), class_targets((6,), 11, 0.3)
    for of_target in (target, distribute_tensor(target, mesh, [S0])):
        for linear in (True, False):
            true = [leaf(x), leaf(w)]
            ours = [distribute_tensor(t, mesh, [R]).requires_grad_() for t in (x, w)]
            theirs = reference.linear_cross_entropy(*true, target)
            if linear:
                loss = regfast.linear_cross_entropy(*ours, of_target)
            else:
                loss = regfast.cross_entropy(ours[0] @ ours[1].T, of_target)
            check(f"{linear}", [loss], ours, [theirs], true)


def errors_case() -> None:
    mesh = mesh_of(2, 2)
    x, target = distribute_tensor(torch.randn(4, 8), mesh, [S1, S1]), torch.randint(8, (4,))
    with pytest.raises(
        NotImplementedError, match=r"regfast\.cross_entropy: expected classes that are sharded over one"
    ):
        regfast.cross_entropy(x, target)
    weight = distribute_tensor(torch.randn(8, 3), mesh, [R, S0])
    with pytest.raises(NotImplementedError, match=r"regfast\.linear_cross_entropy: input: expected a DTensor beside"):
        regfast.linear_cross_entropy(torch.randn(4, 3), weight, target)
    weight = distribute_tensor(torch.randn(8, 3), mesh_of(4), [S1])  # of each process's rows it would have a gradient
    with pytest.raises(NotImplementedError, match=r"linear_cross_entropy: input: expected a DTensor beside .* classes"):
        regfast.linear_cross_entropy(torch.randn(4, 3), weight, target)
    logits = distribute_tensor(torch.randn(4, 8), mesh, [R, S1])
    with pytest.raises(RuntimeError, match=r"regfast\.cross_entropy: target: expected a DTensor on .*, got one on"):
        regfast.cross_entropy(logits, distribute_tensor(target, mesh_of(4), [R]))
    raises(IndexError, lambda: regfast.cross_entropy(logits, target + 8), "classes from 0 to 7")
    # As a weight is that fully_shard has divided, outside of its module's forward: every rank has rows of its own.
    weight, own = distribute_tensor(torch.randn(8, 3), mesh_of(4), [S0]), (target + dist.get_rank()) % 8
    words = "target: expected the same classes on all ranks", "ranks 1, 2, 3 than on rank 0"
    raises(RuntimeError, lambda: regfast.linear_cross_entropy(torch.randn(4, 3), weight, own), *words)
    with pytest.raises(ValueError, match=r"regfast\.cross_entropy: reduction: expected one of"):
        regfast.cross_entropy(logits, target, reduction="max")


@pytest.mark.parametrize("case", [logits_case, linear_case, replicated_case, traffic_case, plans_case, errors_case])
def test_on_four_ranks(ranks, case):
    ranks(case)
