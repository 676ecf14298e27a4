"""How large the terms are that an op's results sum up: what an epsilon of its arithmetic is measured by.

All tensors are float64. A bound is taken from the exact formula with absolute values in place of differences, so that
it stays where terms cancel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from regfast import _C, reference

from .compare import EPSILONS, accumulator


@dataclass
class Terms:
    """Bounds for each output, and for the gradients by name, that broadcast with them; None is the largest result."""

    outputs: list[Tensor | None]
    grads: dict[str, Tensor] = field(default_factory=dict)
    # Whether intermediate results are rounded to the dtype of the tensors: a saved output, in half types.
    rounds: bool = False
    # Of argmax: the scores that are compared, and the size of their terms.
    scores: tuple[Tensor, Tensor] | None = None


def clean(x: Tensor) -> Tensor:
    """Without what is not finite: of that, patterns are compared and not sizes."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def beyond(size: Tensor, acc: torch.dtype) -> Tensor:
    """Infinite where finite terms may leave the accumulators' range: what follows is anything, by the order of sums."""
    return torch.where(size * 4 <= torch.finfo(acc).max, size, torch.inf)


def rounded_factors(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of products one of whose factors is rounded to bfloat16 where pairs of them are multiplied."""
    if dtype != torch.bfloat16 or not _C.multiplies_pairs():
        return size
    return size * (1 + torch.finfo(dtype).eps / 2 / (EPSILONS * torch.finfo(torch.float32).eps))


def largest(x: Tensor, dim: int) -> Tensor:
    return x.amax(dim, keepdim=True) if x.shape[dim] else x.sum(dim, keepdim=True)


def of_products(product, tensors: dict[str, Tensor | None], upstream: Tensor) -> dict[str, Tensor]:
    """Sizes of the gradients of a multilinear function: its derivative at absolute values."""
    leaves = {k: clean(t.detach()).abs().requires_grad_() for k, t in tensors.items() if t is not None}
    with torch.enable_grad():
        out = product(**{k: leaves.get(k) for k in tensors})
        grads = torch.autograd.grad(out, list(leaves.values()), upstream.expand(out.shape))
    return dict(zip(leaves, grads, strict=True))


def of_layer(product, tensors, activation: str, upstream: Tensor | None, dtype: torch.dtype) -> Terms:
    """A layer: `product` of the tensors by name, then an activation."""
    z = clean(product(**tensors))
    before = product(**{k: None if t is None else clean(t).abs() for k, t in tensors.items()})
    before, eps = beyond(before, accumulator(dtype)), torch.finfo(dtype).eps
    terms = Terms([before * 1.2], rounds=activation != "none")
    if upstream is not None:
        slope = torch.ones_like(before)
        if activation != "none":
            slope = torch.where(before.isinf(), torch.inf, 1.2 + before.clamp(max=1 / eps))
        if activation == "relu":  # on which side of zero a sum is that cancels
            slope = slope + (z.abs() <= 8 * eps * before) / eps
        terms.grads = of_products(product, tensors, clean(upstream).abs() * slope)
    return terms


@dataclass
class Rows:
    """Softmax of rows (dimension 1) and what its errors are multiples of."""

    z: Tensor
    error: Tensor  # of z, in epsilons

    def __post_init__(self):
        finite = torch.where(self.z.isfinite(), self.z, -torch.inf)
        self.top = largest(finite, 1) if self.z.shape[1] else finite.sum(1, keepdim=True)
        self.top = torch.where(self.top.isfinite(), self.top, 0)
        self.below = clean(self.top - finite).clamp(min=0)  # 0 where z is not finite
        self.p = torch.where(finite == -torch.inf, 0.0, (-self.below).exp())
        total = self.p.sum(1, keepdim=True).clamp(min=1)
        self.p, self.log = self.p / total, total.log()
        self.error = largest(self.error, 1) if self.error.dim() else self.error
        # A logarithm of a probability, and a probability with its relative error.
        self.log_p = self.below + self.log + 1 + self.error
        self.lse = self.top.abs() + self.log + 1 + self.error
        self.share = self.p * (1 + self.log_p)


def of_softmax(x: Tensor, dim: int, log: bool, upstream: Tensor | None, acc: torch.dtype) -> Terms:
    x = x.reshape(1, -1) if x.dim() == 0 else x.movedim(dim, 1) if x.dim() > 1 else x.reshape(1, -1)
    rows = Rows(x, torch.zeros(()))
    terms = Terms([rows.log_p + x.abs().nan_to_num(0, 0, 0) * 0 if log else rows.share], rounds=True)
    if upstream is not None:
        g = clean(upstream).abs().reshape(x.shape) if upstream.dim() < 2 else clean(upstream).abs().movedim(dim, 1)
        if log:
            terms.grads["input"] = g + rows.share * beyond(g.sum(1, keepdim=True), acc)
        else:
            terms.grads["input"] = rows.share * (g + (g * rows.share).sum(1, keepdim=True))
    back = (lambda t: t.movedim(1, dim)) if upstream is not None and upstream.dim() > 1 else (lambda t: t.reshape(-1))
    return back_to(terms, back)


def back_to(terms: Terms, back) -> Terms:
    terms.outputs = [None if t is None else back(t) for t in terms.outputs]
    terms.grads = {k: back(t) for k, t in terms.grads.items()}
    return terms


def of_cross_entropy(z: Tensor, error: Tensor, target: Tensor, weight: Tensor | None, options: dict, ups: dict, acc):
    """Rows of logits (N, C, positions): sizes of each output by name, of d loss / d z, d target, d weight."""
    rows = Rows(z, error)
    n_classes = z.shape[1]
    w = torch.ones(n_classes, dtype=z.dtype) if weight is None else clean(weight).abs()
    w = w.view(1, -1, *([1] * (z.dim() - 2)))
    probabilities = target.shape == z.shape
    smoothing = max(0.0, options.get("label_smoothing", 0.0))
    if probabilities:
        t, valid = clean(target).abs(), torch.ones_like(rows.lse)
    else:
        valid = (target != options.get("ignore_index", -100)).unsqueeze(1)
        index = torch.where(valid, target.long().unsqueeze(1), 0)
        t = torch.zeros_like(z).scatter_(1, index, 1.0) * valid if n_classes else torch.zeros_like(z)
        valid = valid.to(z.dtype)
    smooth = t * (1 - smoothing) + smoothing / max(1, n_classes) * valid
    z_loss = abs(options.get("z_loss", 0.0))
    each = (smooth * w * rows.log_p).sum(1, keepdim=True) + valid * z_loss * 3 * rows.lse.square()
    reduction = options.get("reduction", "mean")
    if reduction == "mean":
        count = valid.sum() if probabilities or weight is None else (t * w).sum()
        part = 1 / count if count else torch.zeros_like(count)
        if (number := options.get("normalizer")) is not None:
            number = torch.tensor(number[0] if isinstance(number, list) else number, dtype=z.dtype).abs()
            part = 1 / number if number else torch.ones_like(number)  # what is infinite then are no terms
    else:
        part = torch.ones((), dtype=z.dtype)
    entropy = rows.log_p * 0 + (rows.log + 1 + (rows.p * rows.below).sum(1, keepdim=True)) * (1 + rows.error)
    outputs = {
        "loss": each.squeeze(1) if reduction == "none" else beyond(each.sum(), acc) * part,
        "lse": rows.lse.squeeze(1),
        "entropy": entropy[:, 0] if n_classes else rows.lse.squeeze(1),
        "logprob": (t * rows.log_p).sum(1),
    }
    g = {k: clean(u).abs() for k, u in ups.items()}
    dz, dt = torch.zeros_like(z), torch.zeros_like(z)
    # In gradients, probabilities below a bound count as zero; see kLeastLogProbability in cross_entropy_logits.inl.h.
    least, eps = (1e-29, 1.2e-7) if acc == torch.float32 else (1e-298, 2.3e-16)
    share = rows.share + least * rows.log_p / eps
    # Where logits may be off by a half, as products of numbers far above one are, so may any probability.
    share = torch.where(EPSILONS * eps * rows.error > 0.5, 1 / eps, share)
    if "loss" in g:
        up = g["loss"].unsqueeze(1) if reduction == "none" else g["loss"] * part
        mass = (smooth * w).sum(1, keepdim=True)
        dz = dz + up * (share * (mass + 6 * z_loss * valid * rows.lse) + smooth * w)
        dt = dt + up * w * rows.log_p
    if "lse" in g:
        dz = dz + g["lse"].unsqueeze(1) * share
    if "entropy" in g:
        dz = dz + g["entropy"].unsqueeze(1) * share * (rows.log_p + entropy)
    if "logprob" in g:
        dz = dz + g["logprob"].unsqueeze(1) * (t + share * t.sum(1, keepdim=True))
        dt = dt + g["logprob"].unsqueeze(1) * rows.log_p
    # What a row's probabilities are multiplied by is computed once, and may leave the range by itself.
    factor = 0
    if "loss" in g:
        factor = factor + up * (mass + 6 * z_loss * valid * rows.lse)
    for name, size in (("lse", 1), ("entropy", rows.lse + entropy), ("logprob", t.sum(1, keepdim=True))):
        if name in g:
            factor = factor + g[name].unsqueeze(1) * size
    if isinstance(factor, Tensor):
        dz = dz + torch.where(beyond(factor, acc).isinf(), torch.inf, 0.0)
    return outputs, dz, dt


def of_likelihood(eta, error, y, family: str, v: Tensor | None, factor: Tensor | None, full: bool):
    """Sizes of each loss, and of its derivatives by eta, by target, and by the scale."""
    # Where the terms of a prediction overflow together, nothing is known of its error.
    a = torch.where(error.isinf() & eta.isfinite(), torch.inf, clean(error))
    eta, y = clean(eta), clean(y).abs()
    one = torch.ones_like(eta)
    if family == "squared":
        residual = eta.abs() + y + a
        return residual.square(), 2 * residual, 2 * residual, one
    if family == "gaussian":
        residual = eta.abs() + y + a
        each = residual.square() / v + v.log().abs() + 1
        return each, residual / v, residual / v, (1 + residual.square() / v) / v
    if family == "bernoulli":
        f = one if factor is None else 1 + clean(factor).abs()
        each = (1 + y) * f * (1 + eta.abs() + a)
        return each, f * (1 + y) * (1 + a), f * (1 + eta.abs() + a), y * (1 + eta.abs() + a)
    mean = clean(eta.exp())
    each = mean * (1 + a + eta.abs()) + y * (eta.abs() + a) + (y * (y + 1).log() * 3 + 3 if full else 0)
    return each, mean * (1 + a + eta.abs()) + y, eta.abs() + a + (y + 2).log() * (3 if full else 1), one


def activation_of(name: str):
    return reference.ACTIVATIONS[name]


def linear_of(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(input, weight, bias)


def phm_of(input: Tensor, a: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(input, reference.phm_weight(a, s), bias)
