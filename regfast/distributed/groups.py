"""A process group as the vocabulary-parallel losses use it: collectives whose errors name op and rank, and the checks
that all ranks make the same call."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import wraps
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import _C

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    GroupOrMesh = dist.ProcessGroup | DeviceMesh | None

# Their names since torch 2.13, which warns of the former ones; builds without torch.distributed have neither.
_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)

P = ParamSpec("P")
R = TypeVar("R")

# Messages carry counts as digits, each of which float32 holds exactly.
_BASE = 1 << 20


def _digits(count: int) -> tuple[int, int]:
    return count % _BASE, count // _BASE


def group_of_mesh(op: str, mesh: Any, axis: int = 0) -> Any:
    """The process group of a mesh's dimension. torch numbers its ranks in ascending order, whatever order the mesh has,
    and the parts of a vocabulary would be taken for each other's."""
    here = mesh.get_coordinate()
    along = mesh.mesh[tuple(slice(None) if i == axis else at for i, at in enumerate(here or [0] * mesh.ndim))].tolist()
    if along != sorted(along):
        raise ValueError(f"regfast.{op}: group: expected a mesh whose ranks ascend along its dimension, got {along}")
    return mesh.get_group(axis)


class Group:
    """The ranks that share a vocabulary, for one call of an op."""

    def __init__(self, op: str, group: Any) -> None:
        self.op = op
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(f"regfast.{op}: group: expected torch.distributed to be initialised, got none that is")
        if hasattr(group, "get_group"):  # a DeviceMesh
            if group.ndim != 1:
                raise ValueError(f"regfast.{op}: group: expected a mesh of one dimension, got {group.ndim}: {group}")
            group = group_of_mesh(op, group)
        self.group: Any = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise RuntimeError(
                f"regfast.{op}: group: expected one that this process is in, got one without rank {dist.get_rank()}"
            )

    def names(self, ranks: list[int]) -> str:
        """Ranks of the group, as who started the processes knows them."""
        of_all = [dist.get_global_rank(self.group, rank) for rank in ranks]
        return f"rank{'s' if len(of_all) > 1 else ''} {', '.join(map(str, of_all))}"

    def _attempt(self, what: str, run: Callable[..., Any]) -> Any:
        try:
            return run()
        except RuntimeError as error:  # torch.distributed's errors are
            raise RuntimeError(
                f"regfast.{self.op}: {what}: expected all {self.size} ranks of the group to take part with the same "
                f"shapes, dtypes and options, got on {self.names([self.rank])}: {error}"
            ) from error

    def _start(self, what: str, run: Callable[..., Any]) -> Callable[[], Tensor]:
        """Starts a collective that gives a tensor, and returns what waits for it."""
        work, result = self._attempt(what, run)

        def wait() -> Tensor:
            self._attempt(what, work.wait)
            return result

        return wait

    def reduce(self, message: Tensor, how: dist.ReduceOp.RedOpType, what: str) -> Callable[[], Tensor]:
        """Reduces a message in place over all ranks; the result of the call that is returned is the same on each."""
        return self._start(what, lambda: (dist.all_reduce(message, how, self.group, async_op=True), message))

    def gather_rows(self, rows: Tensor, what: str) -> Callable[[], Tensor]:
        """The rows of all ranks, as many on each, in the order of ranks."""
        whole = rows.new_empty((self.size * rows.shape[0], *rows.shape[1:]))
        rows = rows.contiguous()
        return self._start(what, lambda: (_gather(whole, rows, group=self.group, async_op=True), whole))

    def scatter_rows(self, rows: Tensor, what: str) -> Callable[[], Tensor]:
        """Of the sum of all ranks' rows, this rank's part."""
        part = rows.new_empty((rows.shape[0] // self.size, *rows.shape[1:]))
        return self._start(what, lambda: (_reduce_scatter(part, rows, group=self.group, async_op=True), part))

    def compare(self, call: dict[str, object]) -> None:
        """With TORCH_DISTRIBUTED_DEBUG=DETAIL, an error on every rank that says how the calls of two ranks differ."""
        if dist.get_debug_level() != dist.DebugLevel.DETAIL:
            return
        calls: list[tuple[str, dict[str, Any]]] = [("", {})] * self.size
        mine = (self.op, call)
        self._attempt("debug mode", lambda: dist.all_gather_object(calls, mine, self.group))
        for rank, (op, other) in enumerate(calls):
            if op != calls[0][0]:
                raise RuntimeError(
                    f"regfast.{self.op}: group: expected one op on all ranks, got {calls[0][0]} on {self.names([0])} "
                    f"and {op} on {self.names([rank])}"
                )
            for name, value in calls[0][1].items():
                if repr(other.get(name)) != repr(value):  # NaN is the same as NaN
                    raise RuntimeError(
                        f"regfast.{self.op}: {name}: expected the same on all ranks, got {value} on {self.names([0])} "
                        f"and {other.get(name)} on {self.names([rank])}"
                    )

    def header(self, classes: int, call: dict[str, object], target: Tensor | None, like: Tensor) -> Tensor:
        """What a message of maxima says besides: each rank's number of classes, and checksums of its call and of the
        rows' classes, if these are not probabilities."""
        header = like.new_zeros((self.size, 4))
        checksum = zlib.crc32(repr((self.op, sorted(call.items()))).encode()) % _BASE
        header[self.rank, :3] = header.new_tensor((*_digits(classes), checksum))
        if target is not None:
            # Multiplied by odd constants (of splitmix64), with the upper half of the product in the lower one.
            place = torch.arange(target.numel(), device=target.device)
            mixed = (target + place * -7046029254386353131) * -4658895280553007687
            header[self.rank, 3] = (mixed ^ (mixed >> 31)).sum() % _BASE
        return header.flatten()

    def read_header(self, header: Tensor) -> Vocabulary:
        """Which classes this rank has, once all calls were found to be the same."""
        ranks = [[int(number) for number in rank] for rank in header.view(self.size, 4).tolist()]
        if others := [rank for rank, numbers in enumerate(ranks) if numbers[2] != ranks[0][2]]:
            raise RuntimeError(
                f"regfast.{self.op}: group: expected the same shapes, dtypes and options on all ranks, got others on "
                f"{self.names(others)} than on {self.names([0])}; TORCH_DISTRIBUTED_DEBUG=DETAIL tells which"
            )
        sizes = [low + _BASE * high for low, high, *_ in ranks]
        return Vocabulary(self.rank, sizes, [rank for rank, numbers in enumerate(ranks) if numbers[3] != ranks[0][3]])

    def first_bad(self, bad: Tensor | None, like: Tensor) -> Tensor:
        """What a message of sums says besides: for each rank the first of its rows whose target is no class."""
        tail = like.new_zeros((self.size, 2))
        if bad is not None and bool(bad.any()):
            tail[self.rank] = tail.new_tensor(_digits(int(bad.nonzero()[0]) + 1))
        return tail.flatten()

    def check_targets(self, tail: Tensor, vocabulary: Vocabulary) -> None:
        """The same error on all ranks if any of them has a target that is no class, or other targets than the first."""
        rows = [int(low) + _BASE * int(high) - 1 for low, high in tail.view(self.size, 2).tolist()]
        bad = [rank for rank, row in enumerate(rows) if row >= 0]
        if bad:
            raise IndexError(
                f"regfast.{self.op}: target: expected classes from 0 to {vocabulary.total - 1}, got another one on "
                f"{self.names(bad)}, first in row {rows[bad[0]]}"
            )
        if vocabulary.other_targets:
            raise RuntimeError(
                f"regfast.{self.op}: target: expected the same classes on all ranks, got others on "
                f"{self.names(vocabulary.other_targets)} than on {self.names([0])}"
            )


class Vocabulary:
    """How the classes lie on the ranks: in their order, any number on each."""

    def __init__(self, rank: int, sizes: list[int], other_targets: list[int]) -> None:
        self.sizes, self.total, self.other_targets = sizes, sum(sizes), other_targets
        self.begins = [0, *accumulate(sizes)][:-1]
        self.begin, self.size = self.begins[rank], sizes[rank]


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """Derivatives that would need collectives of their own are errors, never wrong numbers."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"regfast.{op}: expected no transform of torch.func around it, got one; use reverse mode (backward)"
        )
    if any(isinstance(t, Tensor) and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"regfast.{op}: expected tensors without tangents, got some of forward mode; use reverse mode (backward)"
        )


def refuse_second_derivatives(op: str, *grads: Tensor | None) -> None:
    """Called by backward: it records nothing that could be differentiated again, and takes one upstream gradient."""
    batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
    if any(grad is not None and is_batch(grad) for grad in grads for is_batch in batched):
        raise NotImplementedError(f"regfast.{op}: expected one upstream gradient, got a batch of them")
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"regfast.{op}: expected a backward without create_graph=True, got one with it; it has first derivatives"
        )


def require_kernels(op: str, logits: Tensor) -> None:
    """The kernels of slices have no composite in plain torch."""
    kind = logits.device.type
    has_kernels = kind == "cpu" or (
        kind == "cuda" and _C.cuda_kernels_in_use("cross_entropy", logits.device.index or 0)
    )
    if not has_kernels:
        raise NotImplementedError(
            f"regfast.{op}: input: expected a device with kernels of regfast, a CPU or a CUDA device on which "
            f"python -m regfast prove has found them right, got {logits.device}"
        )


def outside_of_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Compilers break their graph at a call, which waits for what other processes say. torch.compiler.disable does no
    more, but takes seconds to be imported by programs that compile nothing."""
    disabled = torch._disable_dynamo(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (disabled if is_dynamo_compiling() else function)(*args, **kwargs)

    return call
