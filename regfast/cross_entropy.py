"""Softmax cross-entropy, and what else the same pass over the logits can give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack, cast, overload

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.jit import is_scripting
from torch.nn import _reduction

from . import _C, kinds
from ._dtensor import is_dtensor
from ._extension import REDUCTION_NUMBERS, reduction_number, without_tensors
from .outputs import LOSS, LOSS_BIT, CrossEntropyOutput, require_one_for_scripts, select_outputs
from .reference import divided, normalized, sum_to_divide
from .types import LossOptions, Output, Reduction, Several

_cross_entropy: Callable[..., list[Tensor]] = kinds.op("cross_entropy")


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    outputs: Output | tuple[Output] = ...,
    inplace_backward: bool = False,
    **further: Unpack[LossOptions],
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    outputs: Several,
    inplace_backward: bool = False,
    **further: Unpack[LossOptions],
) -> CrossEntropyOutput: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    outputs: Output | tuple[Output, ...],
    inplace_backward: bool = False,
    **further: Unpack[LossOptions],
) -> Tensor | CrossEntropyOutput: ...


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    outputs: Output | tuple[Output, ...] = LOSS,
    inplace_backward: bool = False,
    loss_dtype: torch.dtype | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor | CrossEntropyOutput:
    """Softmax cross-entropy of logits, as :func:`torch.nn.functional.cross_entropy`, and more from the same pass.

    With ``z = softcap * tanh(logit_scale * input / softcap)`` (each factor only where given) and ``lse = logsumexp(z)``
    over the classes, the loss of a row is ``F.cross_entropy``'s of ``z`` plus ``z_loss * lse**2`` (which class weights
    do not multiply), and 0 where the row is ignored.

    Args:
        input: logits ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``, any strides; float32, float64, bfloat16 or float16.
        target: class indices, input's shape without C, of any integer type; or probabilities of input's shape, of any
            floating dtype: both are computed in the wider one.
        weight: of each class, ``(C)``: input's dtype, as in torch, or any with probabilities. Under autocast half types
            count as float32. It is read in the type of the sums, float32 for half types, and never rounded to less.
        size_average, reduce: deprecated, as in torch.
        ignore_index: rows with this target have no loss and no gradient, and do not count in the mean. That holds
            whatever is in them: infinities and NaN, as padding may have them, make torch's gradient NaN there.
        reduction: none, mean (over the rows' class weights for indices, over the rows for probabilities) or sum.
        label_smoothing: from 0 to 1 (Szegedy et al., "Rethinking the Inception architecture", 2016).
        z_loss: coefficient of the squared log-normalizer (Chowdhery et al., "PaLM", 2022).
        softcap: bound on the logits' magnitude (Gemma Team, "Gemma 2", 2024). logit_scale: their inverse temperature.
        outputs: names among loss, lse, entropy, logprob (differentiable) and argmax (the first maximum). logprob is
            that of the target class, 0 where ignored; ``sum(target * log p)`` for probabilities. All but a reduced loss
            have one number per row.
        inplace_backward: let backward write the gradient over input, whose version counter moves: a training step then
            needs no second buffer of input's size. input must not be a leaf that requires grad. Compiled code ignores
            it.
        loss_dtype: of all floating outputs; input's dtype by default. Half types are computed in float32 either way.
        normalizer: what a mean's sum is divided by in place of its rows' weights: a number, or a tensor of one, such as
            the count of all micro-batches whose gradients are accumulated, or of all ranks' rows.

    Returns:
        The tensor for one name, a named tuple for several.

    Raises:
        IndexError: for a class out of range. ValueError: for batch sizes that differ, an unknown reduction or output.
        RuntimeError: for shapes, dtypes or options that do not fit, as ``F.cross_entropy`` does.

    Saved for backward: input, target, weight, and per row the maximum and the log of the sum (with the entropy, or with
    probabilities the target's mass, where these are used); and of a reduced loss as the only output the gradient, for
    which the row's exponentials serve that gave the loss. It is that for the upstream gradient of the last backward, 1
    at first: where another one comes, where a graph is kept, or where saved tensors are packed away (checkpoints,
    offloading), backward computes ``softmax - target`` from the statistics in one pass of its own, with the same bits.
    So the logits have to stay as they are until then. ``F.cross_entropy`` saves log-probabilities instead, and does not
    mind. Here an operation in place on input, or on a tensor that shares its memory, makes backward raise; what PyTorch
    is not told of (a write through ``.data``, or through the array of ``input.detach().numpy()``, by a metric, say) may
    make its gradient wrong: do that to a clone, or after backward.
    """
    if outputs is LOSS and size_average is None and reduce is None and not is_dynamo_compiling():
        number, wide = REDUCTION_NUMBERS.get(reduction) if type(reduction) is str else None, loss_dtype
        if normalizer is not None:
            number, wide = sum_to_divide("cross_entropy", input, target, reduction, loss_dtype, normalizer)
        result = _C.cross_entropy(
            input,
            target,
            weight,
            ignore_index,
            number,
            label_smoothing,
            z_loss,
            softcap,
            logit_scale,
            LOSS_BIT,
            inplace_backward,
            wide,
        )
        if result is not None:
            return result[0] if normalizer is None else divided(result[0], normalizer).to(input.dtype)
    further: dict[str, Any] = {
        "z_loss": z_loss,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "outputs": outputs,
        "inplace_backward": inplace_backward,
    }
    if not (
        isinstance(input, Tensor) and isinstance(target, Tensor) and (weight is None or isinstance(weight, Tensor))
    ):
        return without_tensors(
            cross_entropy,
            {"input": input, "target": target},
            {"weight": weight},
            input,
            target,
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            label_smoothing,
            loss_dtype=loss_dtype,
            normalizer=normalizer,
            **further,
        )
    if size_average is not None or reduce is not None:
        reduction = cast(Reduction, _reduction.legacy_get_string(size_average, reduce))
    if is_dtensor(input):
        from .distributed import dtensor

        return dtensor.cross_entropy(
            cast(Any, input),
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            loss_dtype=loss_dtype,
            normalizer=normalizer,
            **further,
        )
    if normalizer is not None:
        call = partial(
            cross_entropy,
            input,
            target,
            weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            **further,
        )
        return normalized("cross_entropy", call, input, target, weight, reduction, outputs, loss_dtype, normalizer)
    bits, result, places = select_outputs("cross_entropy", outputs)
    tensors = _cross_entropy(
        input,
        target,
        weight,
        kinds.integer("cross_entropy", "ignore_index", ignore_index),
        reduction_number("cross_entropy", reduction),
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        bits,
        kinds.boolean("cross_entropy", "inplace_backward", inplace_backward),
        kinds.dtype("cross_entropy", "loss_dtype", loss_dtype),
    )
    return tensors[0] if result is None else result(*(tensors[i] for i in places))


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` computed by :func:`regfast.cross_entropy`, whose further options it takes."""

    if TYPE_CHECKING:
        reduction: Reduction

    # Of an nn.CrossEntropyLoss whose __class__ became this one.
    z_loss, softcap, logit_scale = 0.0, None, None
    outputs, inplace_backward, loss_dtype, _bits = LOSS, False, None, LOSS_BIT

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float | None = None,
        outputs: Output | tuple[Output, ...] = LOSS,
        inplace_backward: bool = False,
        loss_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.logit_scale = z_loss, softcap, logit_scale
        self.outputs, self.inplace_backward, self.loss_dtype = cast(Any, outputs), inplace_backward, loss_dtype
        self._bits = select_outputs("CrossEntropyLoss", outputs)[0]

    def __prepare_scriptable__(self) -> CrossEntropyLoss:
        """Itself with all options of its own: TorchScript sees none of a class, which a changed __class__ has left."""
        made: CrossEntropyLoss = copy.copy(require_one_for_scripts(self))
        for name in ("z_loss", "softcap", "logit_scale", "outputs", "inplace_backward", "loss_dtype", "_bits"):
            vars(made).setdefault(name, getattr(CrossEntropyLoss, name))
        return made

    def forward(self, input: Tensor, target: Tensor) -> Any:  # of one type unless outputs has several names
        if is_scripting():
            return torch.ops.regfast.cross_entropy(
                input,
                target,
                self.weight,
                self.ignore_index,
                _reduction.get_enum(self.reduction),
                self.label_smoothing,
                self.z_loss,
                self.softcap,
                self.logit_scale,
                self._bits,
                self.inplace_backward,
                self.loss_dtype,
            )[0]
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            outputs=self.outputs,
            inplace_backward=self.inplace_backward,
            loss_dtype=self.loss_dtype,
        )
