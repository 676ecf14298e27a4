"""The gradient of a slice of classes: the kernel's that has the whole row's maximum and the logarithm of its sum in the
place of the slice's."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .groups import Vocabulary
from .rows import NO_CLASS, Options, Saved, row_shape, sum_type

_backward = torch.ops.regfast.cross_entropy_backward.default
_backward_in_place = torch.ops.regfast.cross_entropy_backward_.default


def slice_gradient(
    upstream: dict[str, Tensor | None],
    logits: Tensor,
    probabilities: Tensor | None,
    weight: Tensor | None,
    saved: Saved,
    options: Options,
    vocabulary: Vocabulary,
    *,
    in_place: bool,
    wants: tuple[bool, bool] = (True, False),
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a slice's logits and probabilities for upstream gradients of each row's outputs."""
    shape, type, o = row_shape(logits), sum_type(logits.dtype), options
    valid, classes = cast(Any, saved.valid), cast(Any, saved.classes)  # where there are no probabilities
    if vocabulary.size == 0:
        return torch.zeros_like(logits), None if probabilities is None else torch.zeros_like(probabilities)
    rows: dict[str, Any] = {
        name: None if grad is None else grad.reshape(-1).to(type) for name, grad in upstream.items()
    }
    loss, logprob = cast(Any, rows.get("loss")), cast(Any, rows.get("logprob"))
    zero = torch.zeros(shape.numel(), dtype=type, device=logits.device)
    lse: Any = zero if rows.get("lse") is None else rows["lse"]
    weight = None if weight is None else weight.to(type)
    share = vocabulary.size / vocabulary.total
    smoothing = o.label_smoothing if loss is not None else 0.0
    if loss is not None and valid is not None:
        loss = torch.where(valid, loss, 0)
    if loss is not None and o.z_loss:
        lse = lse + torch.where(loss == 0, 0, 2 * o.z_loss * loss * (saved.stats[0] + saved.stats[1]))

    stats = saved.stats
    if probabilities is None:
        # Of each row its class's weight of p - [class], wherever that class is.
        hot = (
            zero if loss is None else (1 - smoothing) * loss * (1 if saved.class_weight is None else saved.class_weight)
        )
        if logprob is not None and valid is not None:
            hot = hot - torch.where(valid, logprob, 0)
        mine = classes >= 0
        lse = lse + torch.where(mine, 0, hot)
        logprob = torch.where(mine, -hot, 0)
        target, kernel_loss, kernel_smoothing, kernel_weight = classes, None, 0.0, None
        if smoothing and loss is not None:
            # All of a loss that is this slice's share of the smoothing. The kernel adds up the slice's own weights.
            target = torch.where(valid & ~mine, 0, target)
            own = float(vocabulary.size) if weight is None else weight.sum(dtype=torch.float64)
            others = saved.weight_sum - own
            lse = lse + loss * (smoothing / vocabulary.total * others).to(type)
            kernel_loss, kernel_smoothing, kernel_weight = loss * (smoothing * share), 1.0, weight
        target = target.view(shape)
    else:
        # (1 - s) t + s / V as a multiple of (1 - r) t + r / C, which the kernel knows.
        factor = 1 - smoothing + smoothing * share
        target, kernel_smoothing, kernel_weight = probabilities, smoothing * share / factor, weight
        kernel_loss = None if loss is None else factor * loss
        if factor != 1:
            stats = stats.clone()
            stats[3] /= factor

    grads = [None if g is None else g.view(shape) for g in (kernel_loss, lse, rows.get("entropy"), logprob)]
    arguments = (
        *grads, logits, target, kernel_weight, stats, torch.ones((), dtype=torch.float64, device=logits.device),
        NO_CLASS, 0, kernel_smoothing, 0.0, o.softcap, o.logit_scale,
    )  # fmt: skip
    if in_place:
        of_target = _backward_in_place(*arguments, wants[1])
        return logits.detach(), of_target
    return _backward(*arguments, list(wants))
