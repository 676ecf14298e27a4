"""The cross-entropy of a linear classifier, without ever storing its logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack, overload

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from . import _C, kinds
from ._dtensor import is_dtensor, is_sharded
from ._extension import REDUCTION_NUMBERS, are_tensors, reduction_number, refuse_scripts, without_tensors
from .cross_entropy import cross_entropy
from .linear import is_product
from .outputs import LOSS, LOSS_BIT, CrossEntropyOutput, select_outputs
from .reference import as_batch, divided, normalized, sum_to_divide, unbatched
from .types import LossOptions, Output, Reduction, Several

# Of a matrix: their bytes, and a few times these, can be counted in 64 bits.
_MOST_NUMBERS = 2**58

_linear_cross_entropy: Callable[..., list[Tensor]] = kinds.op("linear_cross_entropy")


def _name(dtype: torch.dtype) -> str:
    """The extension's name of a dtype: float32, not torch.float32."""
    return str(dtype).removeprefix("torch.")


class _Options(LossOptions, total=False):
    """Keywords that say nothing of the result's type."""

    linear_bias: Tensor | None
    weight: Tensor | None
    reduction: Reduction
    ignore_index: int | None
    label_smoothing: float
    memory_budget: int | None
    filter_eps: float
    options: object


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    outputs: Output | tuple[Output] = ...,
    **further: Unpack[_Options],
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, outputs: Several, **further: Unpack[_Options]
) -> CrossEntropyOutput: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    outputs: Output | tuple[Output, ...],
    **further: Unpack[_Options],
) -> Tensor | CrossEntropyOutput: ...
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    outputs: Output | tuple[Output, ...] = LOSS,
    memory_budget: int | None = None,
    filter_eps: float = 0.0,
    loss_dtype: torch.dtype | None = None,
    options: object = None,
    normalizer: float | Tensor | None = None,
) -> Tensor | CrossEntropyOutput:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`` in chunks of rows.

    As ``torch.nn.functional.linear_cross_entropy`` (since torch 2.13), and with all that :func:`regfast.cross_entropy`
    has besides. Logits exist for a chunk of rows at a time, on the CPU in float32 for half types; sums over chunks are
    kept in float32 (float64 for float64) and rounded once. Rows all of whose targets are ignored cost nothing, nor do
    gradients of inputs that need none: 6 N V D operations for a reduced loss with its gradients, 2 N V D without them,
    and 8 N V D where the logits are computed again in backward (``reduction="none"`` or further differentiable
    outputs).

    Where the CPU multiplies pairs of bfloat16 (AVX512-BF16, AMX), the logits' gradient is rounded to it for its
    products with input and weight. The CUDA kernels, where they are enabled, round the logits and their gradients
    to a half type, as ``F.linear`` does, and never wait for the device: so ignored rows take part in their
    products, and NaN in such a row of ``input`` makes the gradient of ``linear_weight`` NaN, as it does in PyTorch.

    Args:
        input: rows ``(D)`` or ``(N, D)``, any strides; float32, float64, bfloat16 or float16. More dimensions, as of
            ``(B, T, D)``, which torch refuses, are a batch of B * T rows: targets and results have B and T for N.
        linear_weight: ``(C, D)``, or ``(C, d1, ..., D)`` for a K-dimensional loss, input's dtype.
        target: class indices ``()``, ``(N)`` or ``(N, d1, ...)``, of any integer type; or probabilities ``(C)``,
            ``(N, C)`` or ``(N, C, d1, ...)``, of any floating dtype; float64 makes all of the call float64.
        linear_bias: linear_weight's shape without D. weight: of each class, ``(C)``, as in
            :func:`regfast.cross_entropy`.
        reduction: none, mean (over the rows' class weights for indices, over the rows for probabilities) or sum.
        ignore_index: class that has no loss; -100 by default, and not to be given with probabilities.
        label_smoothing, z_loss, softcap, logit_scale, outputs, loss_dtype: as in :func:`regfast.cross_entropy`. Where
            logits stay in float32, argmax tells apart those that ``F.linear`` rounds to the same number of a half type,
            or to infinity.
        memory_budget: bytes that a call may take besides inputs, results and gradients. By default 32 MiB for
            each core of the machine, and 1 GiB at most; of a CUDA device, one 32nd of its memory. A few rows are
            computed at a time however small it is. :func:`linear_cross_entropy_plan` tells what comes of it.
        filter_eps: the products that give the gradients of input and linear_weight leave out entries of the logits'
            gradient of at most filter_eps times the magnitude ``g`` of the row's upstream gradient (divided by the
            mean's denominator), provided that at most 3% of a chunk's entries are left; 0 computes all. The
            gradient of a row of input is then off by at most ``filter_eps * g * sum(abs(linear_weight), 0)``, that of
            each row of linear_weight by at most ``filter_eps * sum(g * abs(input), 0)`` (the idea is from Wijmans et
            al., "Cut your losses in large-vocabulary language models", 2025, who leave out whole tiles). The CUDA
            kernels leave out none.
        normalizer: as in :func:`regfast.cross_entropy`.
        options: a ``torch.nn.LinearCrossEntropyOptions``. Its batch_chunk_size sets the budget; its accumulation
            policies make no difference, since sums have full precision.

    Returns:
        The tensor for one name in ``outputs``, a named tuple for several.

    Raises:
        IndexError: for a class out of range. ValueError: for batch sizes that differ, an unknown reduction or output.
        RuntimeError: for shapes, dtypes or options that do not fit.

    Saved for backward: the inputs, and for a reduced loss alone (argmax at most besides, and no gradient of target) its
    gradients, in float32 for half types. Under saved tensor hooks (a checkpoint's, ``save_on_cpu``) the inputs alone,
    from which backward computes the logits again. Inputs have to stay as they are until backward, which raises where
    they were changed in place, and may be wrong where PyTorch was not told (``.data``, numpy). Second derivatives,
    forward mode and ``torch.func`` take plain torch operators, which store the logits; so do CUDA tensors where the
    CUDA kernels are not enabled.
    """
    # A matrix of rows and a class for each, as plain as they come.
    plain = outputs is LOSS and ignore_index is None and options is None
    if plain and not is_dynamo_compiling():
        number, wide = REDUCTION_NUMBERS.get(reduction) if type(reduction) is str else None, loss_dtype
        if normalizer is not None:
            number, wide = sum_to_divide("linear_cross_entropy", input, target, reduction, loss_dtype, normalizer)
        if isinstance(input, Tensor) and input.ndim == 2:
            result = _C.linear_cross_entropy(
                input,
                linear_weight,
                target,
                linear_bias,
                weight,
                -100,
                number,
                label_smoothing,
                z_loss,
                softcap,
                logit_scale,
                LOSS_BIT,
                memory_budget,
                filter_eps,
                wide,
            )
            if result is not None:
                return result[0] if normalizer is None else divided(result[0], normalizer).to(input.dtype)
    further: dict[str, Any] = {
        "linear_bias": linear_bias,
        "weight": weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "outputs": outputs,
        "memory_budget": memory_budget,
        "filter_eps": filter_eps,
    }
    if not are_tensors(input, linear_weight, target, linear_bias, weight):
        return without_tensors(
            linear_cross_entropy,
            {"input": input, "linear_weight": linear_weight, "target": target},
            {"linear_bias": linear_bias, "weight": weight},
            input,
            linear_weight,
            target,
            reduction=reduction,
            loss_dtype=loss_dtype,
            options=options,
            normalizer=normalizer,
            **further,
        )
    if is_dtensor(input) or is_sharded(linear_weight):
        from .distributed import dtensor

        return dtensor.linear_cross_entropy(
            input,
            linear_weight,
            target,
            reduction=reduction,
            loss_dtype=loss_dtype,
            normalizer=normalizer,
            **further,
        )
    if normalizer is not None:
        call = partial(linear_cross_entropy, input, linear_weight, target, options=options, **further)
        return normalized(
            "linear_cross_entropy", call, input, target, weight, reduction, outputs, loss_dtype, normalizer
        )
    if ignore_index is not None and torch.is_floating_point(target):
        raise RuntimeError(
            f"regfast.linear_cross_entropy: ignore_index: expected None with probability targets, got {ignore_index}"
        )
    chunk = getattr(options, "batch_chunk_size", None)
    if memory_budget is None and chunk is not None:
        memory_budget = _C.linear_cross_entropy_budget(
            chunk, input.shape[-1], linear_weight.shape[:-1].numel(), _name(input.dtype), input.is_cuda
        )
    bits, result, places = select_outputs("linear_cross_entropy", outputs)
    input, target, batch = as_batch(input, linear_weight.shape[0] if linear_weight.dim() else 0, target)
    tensors = _linear_cross_entropy(
        input,
        linear_weight,
        target,
        linear_bias,
        weight,
        -100 if ignore_index is None else kinds.integer("linear_cross_entropy", "ignore_index", ignore_index),
        reduction_number("linear_cross_entropy", reduction),
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        bits,
        memory_budget,
        filter_eps,
        kinds.dtype("linear_cross_entropy", "loss_dtype", loss_dtype),
    )
    if batch is not None:
        tensors = [unbatched(tensor, batch) for tensor in tensors]
    return tensors[0] if result is None else result(*(tensors[i] for i in places))


if TYPE_CHECKING:
    _Base = nn.modules.loss._WeightedLoss
else:  # since torch 2.13
    _Base = getattr(nn, "LinearCrossEntropyLoss", nn.modules.loss._WeightedLoss)


class LinearCrossEntropyLoss(_Base):
    """``torch.nn.LinearCrossEntropyLoss`` computed by :func:`regfast.linear_cross_entropy`, whose options it takes.

    Its parameters are those of ``linear``, a :class:`torch.nn.Linear` of ``num_classes * prod(out_features)`` outputs.
    Assign another module's Parameter to ``linear.weight`` to tie weights. Where ``linear`` has come to do more than
    multiply (an adapter, hooks, a quantised weight), it is called, and its logits are stored.
    """

    linear: nn.Linear
    reduction: Reduction
    further: dict[str, Any] = {}  # noqa: RUF012 of a torch.nn.LinearCrossEntropyLoss whose __class__ became this one

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: Reduction = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float | None = None,
        outputs: Output | tuple[Output, ...] = LOSS,
        memory_budget: int | None = None,
        filter_eps: float = 0.0,
        loss_dtype: torch.dtype | None = None,
    ) -> None:
        # Not torch's own constructor, which torch 2.11 and 2.12 do not have.
        nn.modules.loss._WeightedLoss.__init__(self, weight=weight, reduction=reduction)
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"regfast.LinearCrossEntropyLoss: weight: expected shape {(num_classes,)}, got {tuple(weight.shape)}"
            )
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(
                f"regfast.LinearCrossEntropyLoss: label_smoothing: expected a number from 0 to 1, got {label_smoothing}"
            )
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.linear = nn.Linear(in_features, num_classes * math.prod(out_features), bias, device, dtype)
        self.options = options
        self.further = {
            "z_loss": z_loss,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "outputs": outputs,
            "memory_budget": memory_budget,
            "filter_eps": filter_eps,
            "loss_dtype": loss_dtype,
        }

    __prepare_scriptable__ = refuse_scripts

    def forward(self, input: Tensor, target: Tensor) -> Any:  # of one type unless outputs has several names
        shape = (self.num_classes, *self.out_features)
        # What parallelize_module hooks to a layer would gather its logits, or leave each rank with its own.
        if not is_product(self.linear) and not is_sharded(self.linear.weight):
            rows, classes, batch = as_batch(input, self.num_classes, target)
            result = self._of_logits(self.linear(rows).unflatten(-1, shape), classes)
            if batch is None:
                return result
            return (
                unbatched(result, batch)
                if isinstance(result, Tensor)
                else type(result)(*(unbatched(x, batch) for x in result))
            )
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            **self.further,
        )

    def _of_logits(self, logits: Tensor, target: Tensor) -> Any:
        """The loss without what is about memory and speed alone."""
        return cross_entropy(
            logits,
            target,
            self.weight,
            ignore_index=-100 if self.ignore_index is None else self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **{name: value for name, value in self.further.items() if name not in ("memory_budget", "filter_eps")},
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, bias={getattr(self.linear, 'bias', None) is not None}, "
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, "
            f"options={self.options}"
        )


@dataclass(frozen=True)
class Plan:
    """How a call of :func:`linear_cross_entropy` is carried out. Bytes are those of a call with all gradients, besides
    inputs, results and gradients; operations are multiplications and additions."""

    rows_per_chunk: int
    chunks: int
    peak_bytes: int
    flops: int
    path: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.chunks} chunks of {self.rows_per_chunk} rows, {self.peak_bytes / 2**20:.1f} MiB, "
            f"{self.flops / 1e9:.1f} GFLOP, {self.path}: {self.reason}"
        )


def linear_cross_entropy_plan(
    N: int, D: int, V: int, dtype: torch.dtype, device: torch.device | str = "cpu", *, memory_budget: int | None = None
) -> Plan:
    """What :func:`linear_cross_entropy` does for N rows of D features and V classes (times positions).

    That is for a reduced loss of class indices, with the gradients of input, linear_weight and linear_bias; on a CUDA
    device, of which none is needed if there is a budget, where its kernels are enabled. ``peak_bytes`` counts what is
    allocated at one time; half types need ``4 * (N + V) * D`` for float32 gradients on top of it until backward rounds
    them, and on a CUDA device each product may have a workspace.

    Raises: NotImplementedError for a dtype without kernels, ValueError for a negative size or budget or for
    matrices beyond any memory, RuntimeError for a CUDA device whose memory cannot be asked for.
    """
    for name, size in {"N": N, "D": D, "V": V}.items():
        if size < 0:
            raise ValueError(f"regfast.linear_cross_entropy_plan: {name}: expected at least 0, got {size}")
    shorter, longer = sorted((N, D, V))[1:]
    if max(1, shorter) * longer >= _MOST_NUMBERS:
        raise ValueError(
            "regfast.linear_cross_entropy_plan: N, D, V: expected matrices of less than 2**58 numbers, "
            f"got {N}, {D}, {V}"
        )
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(
            "regfast.linear_cross_entropy_plan: memory_budget: expected a positive number of bytes or None, "
            f"got {memory_budget}"
        )
    place = torch.device(device)
    if place.type not in ("cpu", "cuda") or dtype not in (
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
    ):
        raise NotImplementedError(
            "regfast.linear_cross_entropy_plan: expected float32, float64, bfloat16 or float16 on a CPU or a CUDA "
            f"device, got {dtype} on {device}"
        )
    cuda, memory = place.type == "cuda", 0
    if cuda and memory_budget is None:
        if not torch.cuda.is_available():
            raise RuntimeError(
                "regfast.linear_cross_entropy_plan: memory_budget: expected a number of bytes where no CUDA device is "
                "found whose memory would give the default, got None"
            )
        memory = torch.cuda.get_device_properties(place).total_memory
    rows, peak, budget = _C.linear_cross_entropy_plan(N, D, V, _name(dtype), cuda, memory_budget, memory)
    chunks = max(1, -(-N // rows))
    if peak > budget:
        fewer = "leave tiles of the products empty" if cuda else "be all packing"
        reason = f"fewer rows would {fewer}; the budget is {budget / 2**20:.1f} MiB"
    elif not cuda and rows < _C.linear_cross_entropy_plan(N, D, V, _name(dtype), cuda, budget, memory)[0]:
        reason = "as many rows as stay in a core's cache, since the weight is small"
    elif chunks == 1:
        reason = f"all logits fit the budget of {budget / 2**20:.1f} MiB"
    else:
        reason = f"as many rows as fit the budget of {budget / 2**20:.1f} MiB, in equal parts"
    return Plan(rows, chunks, peak, 6 * N * V * D, "logits, loss and gradients chunk by chunk", reason)
