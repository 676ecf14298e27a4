"""Cross-entropy of rows whose classes lie on several ranks: what a rank's slice adds to the statistics of whole rows,
the two messages in which they are exchanged, and the gradient of the slice from the whole row's statistics.

With z the transformed logits, m a row's maximum and q the weights of its classes, all outputs follow from sums over the
classes: of exp(z - m), of q, of q (z - m), and for the entropy of exp(z - m) (z - m). The kernels give a slice's own,
relative to the slice's own maximum; they are shifted to that of the row.

Nothing is sent that follows from the rest, so that each message has at most four numbers of a row, 16 bytes of float32,
but for two sets of options: docs/distributed.md lists what each sends, and why these need more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..reference import OUTPUTS
from .groups import Group, Vocabulary
from .packing import LEAST, packed, packed_bits, unpacked, unpacked_bits
from .rows import NO_CLASS, Options, Saved, class_dim, holds_probabilities, row_shape, sum_type

_forward = torch.ops.regfast.cross_entropy_forward.default
_INF, _NAN = float("inf"), float("nan")


class Slice:
    """The logits of a rank's classes on their way to the outputs of whole rows. Where the vocabulary is known before
    the maxima are sent, the class weights of five sums go with these."""

    # Numbers where they are the same for all rows; of those that the call does not need there is none.
    max: Tensor
    log_sum: Tensor
    argmax: Any
    target: Any
    valid: Any = None
    mine: Any
    local: Any = None
    vocabulary: Vocabulary

    def __init__(
        self,
        group: Group,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: Options,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.group, self.logits, self.options = group, logits, options
        self.dim, self.shape = class_dim(logits), row_shape(logits)
        self.classes, self.rows = logits.shape[self.dim], self.shape.numel()
        self.type = sum_type(logits.dtype)
        self.weight = None if weight is None else weight.to(self.type)
        self.probabilities = target if holds_probabilities(logits, target) else None
        self.target = None if self.probabilities is not None else target.long().reshape(-1)
        wanted = options.outputs
        self.smoothed = options.label_smoothing > 0 and "loss" in wanted
        both = {"loss", "logprob"} <= wanted
        # Of probabilities without weights the loss has the sums that the logprob has.
        self.loss_follows = both and self.probabilities is not None and weight is None
        five = both and "entropy" in wanted and self.smoothed and weight is not None and self.probabilities is None
        self.weight_ahead = five and vocabulary is not None
        self._measure()
        if vocabulary is not None:
            self._place_rows(vocabulary)

    def _rows(self, value: float) -> Tensor:
        return self.logits.new_full((self.rows,), value, dtype=self.type)

    def _kernel(self, target: Tensor, names: set[str], smoothing: float) -> dict[str, Tensor]:
        o, bits = self.options, sum(1 << OUTPUTS.index(name) for name in names)
        results = _forward(
            self.logits, target, self.weight, NO_CLASS, 0, smoothing, 0.0, o.softcap, o.logit_scale, bits, self.type
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
            names |= {"logprob"} if self.loss_follows else {"loss", "logprob"} & wanted
            got = self._kernel(self.probabilities, names, 0.0)
            self.mass, self.target_mass = got["stats"][3], got["stats"][4]
        elif self.smoothed:
            got = self._kernel(any_class, names | {"loss"}, 1.0)
        else:
            got = self._kernel(any_class.fill_(NO_CLASS), names, 0.0)
        self.max, self.log_sum = got["stats"][0], got["stats"][1]
        self.argmax = got.get("argmax")
        if "entropy" in wanted:
            self.mean_logit = self.log_sum - got["stats"][2]  # sum p (z - max)
        if self.probabilities is not None:
            if "loss" in names:
                self.target_dot = self.mass * self.log_sum - got["loss"]  # sum w t (z - max)
            if "logprob" in names:
                self.plain_dot = got["logprob"] + self.target_mass * self.log_sum  # sum t (z - max)
            if self.smoothed:
                got = self._kernel(any_class, {"loss"}, 1.0)
        if self.smoothed:
            dot = self.weight_sum * self.log_sum - self.classes * got["loss"]  # sum w (z - max)
            # The loss of the class that stood for any was 0 times -inf there.
            first = self._transformed(self.logits.select(self.dim, 0).reshape(-1))
            of_first = -_INF if self.weight is None else -_INF * self.weight[0]  # NaN where that is 0, as elsewhere
            self.even_dot = torch.where(first == -_INF, of_first, dot)

    def _place_rows(self, vocabulary: Vocabulary) -> None:
        """Which rows' classes are here, once it is known where this rank's begin."""
        self.vocabulary = vocabulary
        if self.probabilities is None:
            local = self.target - vocabulary.begin
            self.valid = self.target != self.options.ignore_index
            self.mine = self.valid & (local >= 0) & (local < self.classes)
            self.local = torch.where(self.mine, local, NO_CLASS)

    # ---- the message of maxima

    def send_maxima(self, header: Tensor | None) -> None:
        """Starts the first collective: a maximum of each row, and with it where that is if argmax is wanted."""
        top = torch.where(self.max.isnan(), _INF, self.max)  # the sums will say that it is NaN
        words = [self._packed(top) if self._packs_argmax() else top]
        if self.weight_ahead and self._packs_argmax():
            words.append(packed_bits(self._class_weights(0.0), self.mine))
        elif self.weight_ahead:
            words.append(self._class_weights(-_INF))
        message = torch.cat(words if header is None else [*words, header.to(words[0].dtype)])
        self._wait = self.group.reduce(message, dist.ReduceOp.MAX, "all_reduce of maxima")

    def _packs_argmax(self) -> bool:
        return "argmax" in self.options.outputs and self.type == torch.float32

    def _place_bits(self) -> int:
        return 32 - (self.group.size - 1).bit_length()

    def _packed(self, top: Tensor) -> Tensor:
        if self.classes == 0:
            return torch.full_like(top, LEAST, dtype=torch.int64)
        place = (self.group.rank << self._place_bits()) + self.argmax
        return packed(torch.where(self._is_nan(), _NAN, top), place)

    def _is_nan(self) -> Tensor:
        return self.max.isnan() | (self.log_sum.isnan() & (self.max != _INF))

    def receive_maxima(self) -> Tensor:
        """Waits for it; what came besides the rows' maxima is returned."""
        message, count = self._wait(), 1 + self.weight_ahead
        top, rest = message[: self.rows], message[count * self.rows :]
        if self.weight_ahead:
            ahead = message[self.rows : count * self.rows]
            self.row_weight = unpacked_bits(ahead) if self._packs_argmax() else ahead
        if self._packs_argmax():
            top, self.place = unpacked(top)
            top = torch.where(top.isnan(), _INF, top)
        self.top = top
        return rest

    # ---- the message of sums

    def send_sums(self, vocabulary: Vocabulary, tail: Tensor | None = None) -> None:
        """Starts the second collective: of each row what its outputs need, in one message."""
        self._place_rows(vocabulary)
        wanted = self.options.outputs
        origin = torch.where(self.top.isfinite(), self.top, 0)
        exps = torch.where(self.max == _INF, _INF, torch.exp(self.log_sum + (self.max - origin)))
        shift = self.max - self.top
        even = self._rows(0)
        if self.smoothed and self.classes:
            even = self.options.label_smoothing / vocabulary.total * (self.even_dot + self.weight_sum * shift)
        of_target = self._sums_of_class(even) if self.probabilities is None else self._sums_of_chances(shift, even)
        words = {"exps": exps, **of_target}
        if "entropy" in wanted:
            # 0, not 0 times -inf, where nothing of the sum is on this rank; NaN stays.
            weighted = self._rows(0)
            if self.classes:
                weighted = torch.where(exps == 0, 0, exps * (self.mean_logit + shift))
            words["weighted"] = weighted
        self.words = tuple(words)
        parts = [*words.values(), exps.new_tensor([self.weight_sum])]
        message = torch.cat(parts if tail is None else [*parts, tail])
        self._wait = self.group.reduce(message, dist.ReduceOp.SUM, "all_reduce of sums")
        self._wait_place = None
        if "argmax" in wanted and self.type == torch.float64:
            self._wait_place = self.group.reduce(self._place(), dist.ReduceOp.MIN, "all_reduce of places")

    def _sums_of_class(self, even: Tensor) -> dict[str, Tensor]:
        """What the loss and the logprob of a class need: of its rank its logit and weight, and of all ranks their share
        of the smoothing, which is added to the logit's part unless that is wanted by itself."""
        wanted, keep = self.options.outputs, 1 - self.options.label_smoothing
        if not {"loss", "logprob"} & wanted:
            return {}
        above, words = self._above_maximum(), {}
        if self.weight is not None and not self.weight_ahead:
            words["weight"] = self._class_weights(0.0)
        if self.smoothed and "logprob" not in wanted:
            return {**words, "dot": keep * words.get("weight", 1) * above + even}
        return {**words, "above": above, **({"even": even} if self.smoothed else {})}

    def _sums_of_chances(self, shift: Tensor, even: Tensor) -> dict[str, Tensor]:
        """What the loss and the logprob of probabilities need: sums of these, and of them times the logits."""
        o, wanted, words = self.options, self.options.outputs, {}
        if "loss" in wanted and not self.loss_follows:
            words = {"mass": self._rows(0), "dot": self._rows(0)}
            if self.classes:
                keep = 1 - o.label_smoothing if self.smoothed else 1.0
                smooth = o.label_smoothing / self.vocabulary.total if self.smoothed else 0.0
                words["mass"] = keep * self.mass + smooth * self.weight_sum
                words["dot"] = self._smoothed_dot(self.mass, self.target_dot + self.mass * shift, even)
        if "logprob" in wanted:
            words |= {"plain_mass": self._rows(0), "plain": self._rows(0)}
            if self.classes:
                words |= {"plain_mass": self.target_mass, "plain": self.plain_dot + self.target_mass * shift}
        if self.loss_follows and self.smoothed:
            words["even"] = even
        return words

    def _smoothed_dot(self, mass: Tensor, dot: Tensor, even: Tensor) -> Tensor:
        """Of probabilities; smoothed, no class has a share of 0, which times -inf were NaN."""
        if not self.smoothed:
            return dot
        return (1 - self.options.label_smoothing) * torch.where((even == -_INF) & ~mass.isnan(), 0, dot) + even

    def _above_maximum(self) -> Tensor:
        """z - maximum of the class of each row that has it here, else 0. It is not positive."""
        if self.classes == 0:
            return self._rows(0)
        index = self.local.clamp(min=0).view(self.shape).unsqueeze(self.dim)
        z = self._transformed(self.logits.gather(self.dim, index).reshape(-1))
        return torch.where(self.mine, z - self.top, 0)

    def _class_weights(self, other: float) -> Tensor:
        """The weight of the class of each row that has it here."""
        if self.classes == 0 or self.weight is None:
            return self._rows(other)
        return torch.where(self.mine, self.weight[self.local.clamp(min=0)], other)

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
        count, wanted = len(self.words), self.options.outputs
        words = dict(zip(self.words, message[: count * self.rows].view(count, self.rows), strict=True))
        weight_sum, tail = message[count * self.rows], message[count * self.rows + 1 :]
        if self.weight is None:
            weight_sum = weight_sum.new_tensor(float(self.vocabulary.total))
        exps, infinite = words["exps"], self.top == _INF
        log_sum = torch.where(infinite, _NAN, exps.log())
        lse = torch.where(infinite, exps, self.top + log_sum)
        stats: list[Tensor] = [torch.where(infinite & exps.isnan(), _NAN, self.top), log_sum]
        results: dict[str, Tensor] = {"lse": lse}
        class_weight = None
        masses: list[Tensor] = []
        if self.probabilities is not None:
            masses = self._receive_chances(words, log_sum, results)
        elif {"loss", "logprob"} & wanted:
            class_weight = self._receive_class(words, weight_sum, log_sum, results)
        if "loss" in wanted and self.options.z_loss:
            results["loss"] = results["loss"] + self.options.z_loss * lse.square()
        if self.probabilities is None:
            for name in {"loss", "logprob"} & wanted:
                results[name] = torch.where(self.valid, results[name], 0)
        if "entropy" in wanted:
            results["entropy"] = log_sum - words["weighted"] / exps
        if self.probabilities is not None or "entropy" in wanted:
            stats.append(results["entropy"] if "entropy" in wanted else self._rows(0))
        if self._packs_argmax():
            begins = torch.tensor(self.vocabulary.begins, device=self.place.device)
            bits = self._place_bits()
            # Without any class, and for rows of no rank's, the place is beyond all ranks.
            rank = (self.place >> bits).clamp(max=len(begins) - 1)
            results["argmax"] = begins[rank] + (self.place & ((1 << bits) - 1))
        elif self._wait_place is not None:
            results["argmax"] = self._wait_place() & ((1 << 61) - 1)
        self.results = {name: results[name] for name in OUTPUTS if name in wanted}
        self.saved = Saved(
            torch.stack([*stats, *masses]), self.local, self.valid, class_weight, weight_sum.double()
        )  # fmt: skip
        return tail

    def _receive_class(
        self, words: dict[str, Tensor], weight_sum: Tensor, log_sum: Tensor, results: dict[str, Tensor]
    ) -> Tensor | None:
        """Loss and logprob of a class; its weight is returned if there are any."""
        smoothing = self.options.label_smoothing if self.smoothed else 0.0
        weight = None
        if self.weight is not None:
            weight = torch.where(self.valid, self.row_weight if self.weight_ahead else words["weight"], 0)
        if "loss" in self.options.outputs:
            mass: Any = (1 - smoothing) * (1.0 if weight is None else weight)
            dot = words["dot"] if "dot" in words else mass * words["above"] + words.get("even", 0.0)
            if self.smoothed:
                mass = mass + smoothing / self.vocabulary.total * weight_sum
            results["loss"] = mass * log_sum - dot
        if "logprob" in self.options.outputs:
            results["logprob"] = words["above"] - log_sum
        return weight

    def _receive_chances(
        self, words: dict[str, Tensor], log_sum: Tensor, results: dict[str, Tensor]
    ) -> list[Tensor]:  # fmt: skip
        """Loss and logprob of probabilities; the masses that are multiplied by the logarithm are returned."""
        wanted, zero = self.options.outputs, self._rows(0)
        mass, dot = words.get("mass", zero), words.get("dot", zero)
        plain_mass, plain = words.get("plain_mass", zero), words.get("plain", zero)
        if self.loss_follows:
            mass, dot = plain_mass, plain
            if self.smoothed:  # the smoothing's share of all classes is all of it
                mass = (1 - self.options.label_smoothing) * plain_mass + self.options.label_smoothing
                dot = self._smoothed_dot(plain_mass, plain, words["even"])
        if "loss" in wanted:
            results["loss"] = mass * log_sum - dot
        if "logprob" in wanted:
            results["logprob"] = plain - plain_mass * log_sum
        return [mass, plain_mass]
