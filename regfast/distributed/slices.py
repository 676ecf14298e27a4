"""Cross-entropy of rows whose classes lie on several ranks: what a rank's slice adds to the statistics of whole rows,
the two messages in which they are exchanged, and the gradient of the slice from the whole row's statistics.

With z the transformed logits, m a row's maximum and q the weights of its classes, all outputs follow from sums over the
classes: of exp(z - m), of q, of q (z - m), and for the entropy of exp(z - m) (z - m). The kernels give a slice's own,
relative to the slice's own maximum; they are shifted to that of the row. The gradient of the slice is the kernel's that
has the row's maximum and the logarithm of its sum in the place of the slice's.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..reference import OUTPUTS
from .groups import Group, Vocabulary

_forward = torch.ops.regfast.cross_entropy_forward.default
_backward = torch.ops.regfast.cross_entropy_backward.default
_backward_in_place = torch.ops.regfast.cross_entropy_backward_.default
_NO_CLASS = -100  # of rows whose class is on another rank or nowhere, in what the kernels are given
_INF, _NAN = float("inf"), float("nan")


class Options(NamedTuple):
    """Those of cross_entropy that say what a row's outputs are."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float | None
    outputs: frozenset[str]


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """What statistics of logits of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def class_dim(logits: Tensor) -> int:
    return 1 if logits.dim() > 1 else 0


def row_shape(logits: Tensor) -> torch.Size:
    dim = class_dim(logits)
    return logits.shape[:dim] + logits.shape[dim + 1 :]


def holds_probabilities(logits: Tensor, target: Tensor) -> bool:
    return target.is_floating_point() and target.shape == logits.shape


class Saved(NamedTuple):
    """What the gradient of a slice is computed from, besides logits, probabilities and class weights: numbers of
    each row, and of the whole vocabulary."""

    stats: Tensor  # as the kernels have them: maximum, log of the sum, entropy, mass, mass of the target
    classes: Tensor | None  # of rows whose class is of this slice its number there; not of probabilities
    valid: Tensor | None  # not ignored
    class_weight: Tensor | None  # of the row's class, 0 where ignored
    weight_sum: Tensor  # of all classes


class Slice:
    """The logits of a rank's classes on their way to the outputs of whole rows."""

    # Numbers where they are the same for all rows; of those that the call does not need there is none.
    max: Tensor
    log_sum: Tensor
    argmax: Any
    target: Any
    valid: Any
    mine: Any
    local: Any

    def __init__(self, group: Group, logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> None:
        self.group, self.logits, self.options = group, logits, options
        self.dim, self.shape = class_dim(logits), row_shape(logits)
        self.classes, self.rows = logits.shape[self.dim], self.shape.numel()
        self.type = sum_type(logits.dtype)
        self.weight = None if weight is None else weight.to(self.type)
        self.probabilities = target if holds_probabilities(logits, target) else None
        self.target = None if self.probabilities is not None else target.long().reshape(-1)
        self.smoothed = options.label_smoothing > 0 and "loss" in options.outputs
        self._measure()

    def _rows(self, value: float) -> Tensor:
        return self.logits.new_full((self.rows,), value, dtype=self.type)

    def _kernel(self, target: Tensor, names: set[str], smoothing: float) -> dict[str, Tensor]:
        o, bits = self.options, sum(1 << OUTPUTS.index(name) for name in names)
        results = _forward(
            self.logits, target, self.weight, _NO_CLASS, 0, smoothing, 0.0, o.softcap, o.logit_scale, bits, self.type
        )
        in_order = sorted(names, key=OUTPUTS.index)
        of_names = {name: result.reshape(-1) for name, result in zip(in_order, results, strict=False)}
        return {**of_names, "stats": results[-2]}

    def _measure(self) -> None:
        """One pass over the slice; a second one where probabilities are smoothed."""
        wanted = self.options.outputs
        self.weight_sum = float(self.classes) if self.weight is None else self.weight.sum(dtype=torch.float64).item()
        if self.classes == 0:
            self.max, self.log_sum = self._rows(-_INF), self._rows(-_INF)
            return
        names = {"lse"} | ({"entropy", "argmax"} & wanted)
        # With all of the smoothing, the loss is the sum of (lse - z) over the classes, whatever the target.
        any_class = torch.zeros(self.shape, dtype=torch.int64, device=self.logits.device)
        if self.probabilities is not None:
            names |= {"loss", "logprob"} & wanted
            got = self._kernel(self.probabilities, names, 0.0)
            self.mass, self.target_mass = got["stats"][3], got["stats"][4]
        elif self.smoothed:
            got = self._kernel(any_class, names | {"loss"}, 1.0)
        else:
            got = self._kernel(any_class.fill_(_NO_CLASS), names, 0.0)
        self.max, self.log_sum = got["stats"][0], got["stats"][1]
        self.argmax = got.get("argmax")
        if "entropy" in wanted:
            self.mean_logit = self.log_sum - got["stats"][2]  # sum p (z - max)
        if self.probabilities is not None:
            if "loss" in wanted:
                self.target_dot = self.mass * self.log_sum - got["loss"]  # sum w t (z - max)
            if "logprob" in wanted:
                self.plain_dot = got["logprob"] + self.target_mass * self.log_sum  # sum t (z - max)
            if self.smoothed:
                got = self._kernel(any_class, {"loss"}, 1.0)
        if self.smoothed:
            dot = self.weight_sum * self.log_sum - self.classes * got["loss"]  # sum w (z - max)
            # The loss of the class that stood for any was 0 times -inf there.
            first = self._transformed(self.logits.select(self.dim, 0).reshape(-1))
            of_first = -_INF if self.weight is None else -_INF * self.weight[0]  # NaN where that is 0, as elsewhere
            self.even_dot = torch.where(first == -_INF, of_first, dot)

    # ---- the message of maxima

    def send_maxima(self, header: Tensor | None) -> None:
        """Starts the first collective: a maximum of each row, and with it where that is if argmax is wanted."""
        top = torch.where(self.max.isnan(), _INF, self.max)  # the sums will say that it is NaN
        if self._packs_argmax():
            top = self._packed(top)
        message = top if header is None else torch.cat((top, header.to(top.dtype)))
        self._wait = self.group.reduce(message, dist.ReduceOp.MAX, "all_reduce of maxima")

    def _packs_argmax(self) -> bool:
        return "argmax" in self.options.outputs and self.type == torch.float32

    def _place_bits(self) -> int:
        return 32 - (self.group.size - 1).bit_length()

    def _packed(self, top: Tensor) -> Tensor:
        """A maximum and its place as one integer, which grows with the maximum, then towards the first place; a NaN
        counts for more than any number."""
        if self.classes == 0:
            return torch.full_like(top, torch.iinfo(torch.int64).min, dtype=torch.int64)
        bits = torch.where(self._is_nan(), _NAN, top + 0.0).view(torch.int32).long()  # + 0.0: there is one zero
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        place = (self.group.rank << self._place_bits()) + self.argmax
        return (ordered << 32) + (0xFFFFFFFF - place)

    def _is_nan(self) -> Tensor:
        return self.max.isnan() | (self.log_sum.isnan() & (self.max != _INF))

    def receive_maxima(self) -> Tensor:
        """Waits for it; what came besides the rows' maxima is returned."""
        message = self._wait()
        top, rest = message[: self.rows], message[self.rows :]
        if self._packs_argmax():
            self.place = 0xFFFFFFFF - (top & 0xFFFFFFFF)
            ordered = top >> 32
            bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
            top = bits.to(torch.int32).view(torch.float32)
            top = torch.where(top.isnan(), _INF, top)
        self.top = top
        return rest

    # ---- the message of sums

    def send_sums(self, vocabulary: Vocabulary, tail: Tensor | None = None) -> None:
        """Starts the second collective: of each row what its outputs need, in one message."""
        self.vocabulary, wanted, o = vocabulary, self.options.outputs, self.options
        smooth = o.label_smoothing / max(vocabulary.total, 1) if self.smoothed else 0.0
        origin = torch.where(self.top.isfinite(), self.top, 0)
        shift = self.max - self.top
        exps = torch.where(self.max == _INF, _INF, torch.exp(self.log_sum + (self.max - origin)))
        words: dict[str, Any] = {"exps": exps}
        none = self.classes == 0
        even: Any = 0.0 if none or not self.smoothed else smooth * (self.even_dot + self.weight_sum * shift)
        if self.probabilities is None:
            local = self.target - vocabulary.begin
            self.valid = self.target != o.ignore_index
            self.mine = self.valid & (local >= 0) & (local < self.classes)
            self.local = torch.where(self.mine, local, _NO_CLASS)
            if {"loss", "logprob"} & wanted:
                above = self._above_maximum()
                weight: Any = 1.0
                if self.weight is not None:
                    weight = self._rows(0) if none else torch.where(self.mine, self.weight[self.local.clamp(min=0)], 0)
                    words["weight"] = weight
                if self.smoothed or self.weight is not None:
                    words["dot"] = (1 - o.label_smoothing) * weight * above + even
                    if "logprob" in wanted:
                        words["plain"] = above
                else:
                    words["dot"] = above
        else:
            if "loss" in wanted:
                keep = 1 - o.label_smoothing
                mass: Any = 0.0 if none else keep * self.mass + smooth * self.weight_sum
                dot: Any = 0.0
                if not none:
                    dot = self.target_dot + self.mass * shift
                    if self.smoothed:  # then no class has a share of 0, which times -inf were NaN
                        dot = torch.where((even == -_INF) & ~self.mass.isnan(), 0, dot)
                    dot = keep * dot + even
                words |= {"mass": self._rows(0) + mass, "dot": self._rows(0) + dot}
            if "logprob" in wanted:
                words["plain_mass"] = self._rows(0) if none else self.target_mass
                words["plain"] = self._rows(0) if none else self.plain_dot + self.target_mass * shift
        if "entropy" in wanted:
            # 0, not 0 times -inf, where nothing of the sum is on this rank; NaN stays.
            weighted = self._rows(0) if none else torch.where(exps == 0, 0, exps * (self.mean_logit + shift))
            words["weighted"] = weighted
        self.words = tuple(words)
        parts = [*words.values(), exps.new_tensor([self.weight_sum])]
        message = torch.cat(parts if tail is None else [*parts, tail])
        self._wait = self.group.reduce(message, dist.ReduceOp.SUM, "all_reduce of sums")
        self._wait_place = None
        if "argmax" in wanted and self.type == torch.float64:
            self._wait_place = self.group.reduce(self._place(), dist.ReduceOp.MIN, "all_reduce of places")

    def _above_maximum(self) -> Tensor:
        """z - maximum of the class of each row that has it here, else 0. It is not positive."""
        if self.classes == 0:
            return self._rows(0)
        index = self.local.clamp(min=0).view(self.shape).unsqueeze(self.dim)
        z = self._transformed(self.logits.gather(self.dim, index).reshape(-1))
        return torch.where(self.mine, z - self.top, 0)

    def _transformed(self, logits: Tensor) -> Tensor:
        z = logits.to(self.type)
        if self.options.logit_scale is not None:
            z = z * self.options.logit_scale
        if self.options.softcap is not None:
            z = self.options.softcap * torch.tanh(z / self.options.softcap)
        return z

    def _place(self) -> Tensor:
        """Of float64, whose maxima fill a word: the place where this rank has the row's maximum, else a large number;
        a NaN comes before any number."""
        if self.classes == 0:
            return torch.full((self.rows,), 1 << 62, device=self.logits.device)
        place, nan = self.vocabulary.begin + self.argmax, self._is_nan()
        return torch.where(nan, place, torch.where(self.max == self.top, place + (1 << 61), 1 << 62))

    def receive_sums(self) -> Tensor:
        """Waits for it, and has the rows' outputs and what backward needs then; what came besides is returned."""
        message = self._wait()
        count, o, wanted = len(self.words), self.options, self.options.outputs
        words = dict(zip(self.words, message[: count * self.rows].view(count, self.rows), strict=True))
        weight_sum, tail = message[count * self.rows], message[count * self.rows + 1 :]
        if self.weight is None:
            weight_sum = weight_sum.new_tensor(float(self.vocabulary.total))
        exps, infinite = words["exps"], self.top == _INF
        log_sum = torch.where(infinite, _NAN, exps.log())
        lse = torch.where(infinite, exps, self.top + log_sum)
        stats: list[Tensor] = [torch.where(infinite & exps.isnan(), _NAN, self.top), log_sum]
        results: dict[str, Tensor] = {}
        class_weight = None
        if self.probabilities is None:
            if {"loss", "logprob"} & wanted and self.weight is not None:
                class_weight = torch.where(self.valid, words["weight"], 0)
            if "loss" in wanted:
                mass: Any = 1.0 if self.weight is None else words["weight"]
                if self.smoothed:
                    mass = (1 - o.label_smoothing) * mass + o.label_smoothing / self.vocabulary.total * weight_sum
                loss = mass * log_sum - words["dot"]
                loss = loss + o.z_loss * lse.square() if o.z_loss else loss
                results["loss"] = torch.where(self.valid, loss, 0)
            if "logprob" in wanted:
                plain = words.get("plain", words["dot"])
                results["logprob"] = torch.where(self.valid, plain - log_sum, 0)
        else:
            if "loss" in wanted:
                loss = words["mass"] * log_sum - words["dot"]
                results["loss"] = loss + o.z_loss * lse.square() if o.z_loss else loss
            if "logprob" in wanted:
                results["logprob"] = words["plain"] - words["plain_mass"] * log_sum
        if "entropy" in wanted:
            results["entropy"] = log_sum - words["weighted"] / exps
        zero: Any = self._rows(0) if self.probabilities is not None else None
        if self.probabilities is not None or "entropy" in wanted:
            entropy: Any = results.get("entropy", zero)
            stats.append(entropy)
        if self.probabilities is not None:
            masses: list[Any] = [words.get("mass", zero), words.get("plain_mass", zero)]
            stats += masses
        results["lse"] = lse
        if self._packs_argmax():
            begins = torch.tensor(self.vocabulary.begins, device=self.place.device)
            bits = self._place_bits()
            # Without any class, and for rows of no rank's, the place is beyond all ranks.
            rank = (self.place >> bits).clamp(max=len(begins) - 1)
            results["argmax"] = begins[rank] + (self.place & ((1 << bits) - 1))
        elif self._wait_place is not None:
            results["argmax"] = self._wait_place() & ((1 << 61) - 1)
        self.results = {name: results[name] for name in OUTPUTS if name in wanted}
        is_class = self.probabilities is None
        self.saved = Saved(
            torch.stack(stats),
            self.local if is_class else None,
            self.valid if is_class else None,
            class_weight,
            weight_sum.double(),
        )
        return tail


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
        _NO_CLASS, 0, kernel_smoothing, 0.0, o.softcap, o.logit_scale,
    )  # fmt: skip
    if in_place:
        of_target = _backward_in_place(*arguments, wants[1])
        return logits.detach(), of_target
    return _backward(*arguments, list(wants))
