"""How DTensors may be sharded for each op that their dispatcher meets, registered once torch.distributed.tensor is
imported: importing it costs as much as importing torch, so regfast does not. Cross-entropies of parts of the rows or
classes come from regfast/distributed/dtensor.py; their ops meet the rules when they are called by themselves.

Each rule lists what one dimension of the mesh may do: placements of the outputs, then of the tensors that are given.
The means of rows are computed from whole tensors: those of shards would have to be weighted by what is not ignored."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

import torch

from . import _extension  # noqa: F401  registers the ops

_MODULE = "torch.distributed.tensor"
_NONE, _MEAN, _SUM = range(3)  # torch's numbers of reductions


def is_dtensor(t: object) -> bool:
    """Whether a cross-entropy of it is :mod:`regfast.distributed.dtensor`'s. Compilers trace the ops, whose rules are
    below."""
    if torch.compiler.is_compiling() or (module := sys.modules.get(_MODULE)) is None:
        return False
    return isinstance(t, module.DTensor)


def is_sharded(t: Any) -> bool:
    """Whether it is a DTensor of which each process has a part."""
    return is_dtensor(t) and any(p.is_shard() for p in t.placements)


def _rules() -> dict[str, Callable[..., Any]]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, part = Replicate(), Partial()

    def linear_forward(input: Any, weight: Any, bias: Any, activation: Any, save_preactivation: Any) -> Iterator[Any]:
        last = input.ndim - 1

        def rule(y: Any, x: Any, w: Any, b: Any) -> Any:
            return [y, y if save_preactivation else whole], [x, w, b]

        yield rule(Shard(last), whole, Shard(0), Shard(0))
        for dim in range(last):
            yield rule(Shard(dim), Shard(dim), whole, whole)
        if activation == "none":
            yield [part, whole], [Shard(last), Shard(1), part]

    def linear_backward(grad: Any, input: Any, weight: Any, saved: Any, activation: Any, mask: Any) -> Iterator[Any]:
        last = grad.ndim - 1

        def rule(dx: Any, dw: Any, db: Any, g: Any, x: Any, w: Any) -> Any:
            outputs = [p if wanted else whole for p, wanted in zip((dx, dw, db), mask, strict=True)]
            return outputs, [g, x, w, g]

        yield rule(part, Shard(0), Shard(0), Shard(last), whole, Shard(0))
        yield rule(Shard(last), Shard(1), whole, whole, Shard(last), Shard(1))
        for dim in range(last):
            yield rule(Shard(dim), part, part, Shard(dim), Shard(dim), whole)

    def others(tensor: Any, dim: Any) -> Iterator[Any]:
        """The dimensions but this one, and where they are once it was reduced."""
        dim = dim % max(tensor.ndim, 1)
        for kept in range(tensor.ndim):
            if kept != dim:
                yield Shard(kept), Shard(kept - (kept > dim))

    def softmax_forward(input: Any, dim: Any, log: Any) -> Iterator[Any]:
        for kept, _ in others(input, dim):
            yield [kept], [kept]

    def softmax_backward(grad: Any, output: Any, dim: Any, log: Any) -> Iterator[Any]:
        for kept, _ in others(output, dim):
            yield [kept], [kept, kept]

    def logsumexp_forward(input: Any, dim: Any, keepdim: Any) -> Iterator[Any]:
        for kept, reduced in others(input, dim):
            yield [kept if keepdim else reduced], [kept]

    def logsumexp_backward(grad: Any, input: Any, lse: Any, dim: Any) -> Iterator[Any]:
        for kept, reduced in others(input, dim):
            yield (
                [kept],
                [kept if grad.ndim == input.ndim else reduced, kept, kept if lse.ndim == input.ndim else reduced],
            )

    def mse_loss_forward(input: Any, target: Any, reduction: Any) -> Iterator[Any]:
        for dim in range(input.ndim if reduction != _MEAN else 0):
            yield [Shard(dim) if reduction == _NONE else part], [Shard(dim), Shard(dim)]

    def mse_loss_backward(grad: Any, input: Any, target: Any, reduction: Any, mask: Any) -> Iterator[Any]:
        for dim in range(input.ndim if reduction != _MEAN else 0):
            outputs = [Shard(dim) if wanted else whole for wanted in mask]
            yield outputs, [Shard(dim) if reduction == _NONE else whole, Shard(dim), Shard(dim)]

    def rows_shard(input: Any) -> bool:
        # Statistics of rows have one dimension for all of them, whose shards are those of input's rows if these are
        # of one position each.
        return input.ndim == 2

    def cross_entropy_forward(
        input: Any,
        target: Any,
        weight: Any,
        ignore: Any,
        reduction: Any,
        smoothing: Any,
        z_loss: Any,
        cap: Any,
        scale: Any,
        outputs: Any,
        dtype: Any,
    ) -> Any:
        if reduction != _MEAN and rows_shard(input):
            each: list[Any] = [Shard(0)] * (outputs.bit_count())
            if outputs & 1 and reduction == _SUM:
                each[0] = part
            yield [*each, Shard(1), part], [Shard(0), Shard(0), whole]

    def cross_entropy_backward(
        loss: Any,
        lse: Any,
        entropy: Any,
        logprob: Any,
        input: Any,
        target: Any,
        weight: Any,
        stats: Any,
        weight_sum: Any,
        *options: Any,
    ) -> Any:
        reduction, mask = options[1], options[-1]
        if reduction != _MEAN and rows_shard(input):
            row = Shard(0)
            upstream = [row if reduction == _NONE else whole, row, row, row]
            yield [row if wanted else whole for wanted in mask], [*upstream, row, row, whole, Shard(1), whole]

    return {name: rule for name, rule in locals().items() if name.endswith(("_forward", "_backward"))}


def _register() -> None:
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._op_schema import OpStrategy, RuntimeSchemaInfo
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

    def strategy(rule: Callable[..., Any], schema: Any) -> OpStrategy:
        arguments = [a.strategies[0].output_spec if isinstance(a, OpStrategy) else a for a in schema.args_schema]
        given = [a is not arguments[i] for i, a in enumerate(schema.args_schema)]
        rules = list(rule(*arguments))
        tensors = [i for i, a in enumerate(schema.op._schema.arguments) if "Tensor" in str(a.type)]
        outputs = len(rules[0][0]) if rules else _outputs(schema.op, arguments)
        rules.append(([Replicate()] * outputs, [Replicate()] * len(tensors)))
        placed = [
            [*outs, *(p for p, i in zip(ins, tensors, strict=True) if given[i])]  # nothing where None was given
            for outs, ins in rules
        ]
        return expand_to_full_mesh_op_strategy(schema.get_mesh_from_args(), schema, placed, input_index=outputs)

    for name, rule in _rules().items():
        # All arguments are part of what a strategy is remembered for.
        DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
            getattr(torch.ops.regfast, name).default,
            partial(strategy, rule),
            RuntimeSchemaInfo(0, needs_pytree=True),
        )


def _outputs(op: torch._ops.OpOverload, arguments: list[Any]) -> int:
    """How many tensors an op returns; cross_entropy's are one for each bit, then two of its own."""
    if op is torch.ops.regfast.cross_entropy_forward.default:
        return arguments[9].bit_count() + 2
    return len(op._schema.returns)


def _register_or_warn() -> None:
    """The rules' interface is torch's own affair: a torch that has changed it must not fail to import for our sake."""
    try:
        _register()
    except (ImportError, AttributeError, TypeError) as error:
        warnings.warn(f"regfast: no sharding rules for DTensor with torch {torch.__version__}: {error}", stacklevel=2)


class _WhenImported(MetaPathFinder):
    """Registers the rules as soon as the module has been imported by someone."""

    def find_spec(self, name: Any, path: Any, target: Any = None) -> Any:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec: Any = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _register_or_warn()

        spec.loader.exec_module = exec_module
        return spec


if torch.distributed.is_available():
    if _MODULE in sys.modules:
        _register_or_warn()
    else:
        sys.meta_path.insert(0, _WhenImported())
