"""The likelihoods of linear models, as ops.py has the layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import regfast
from regfast import reference

from . import terms
from .compare import accumulator
from .draw import DTYPES
from .losses import call_options, exact_options
from .ops import REDUCTIONS, Op, dtype_of, register
from .terms import Terms


class LinearNLL(Op):
    name = "linear_nll"

    def draw(self, r):
        family = r.choice(("squared", "gaussian", "bernoulli", "poisson"))
        n, d, v = r.sizes(3, least=0 if r.chance(0.03) else 1)
        options: dict = {"reduction": r.choice(REDUCTIONS)}
        observed = {"bernoulli": ("observed",), "poisson": ("counts",)}.get(family, ("normal", "spiky", "integers"))
        tensors = {
            "input": r.tensor(),
            "weight": r.tensor(r.choice(("normal", "small", "small"))),
            "target": r.tensor(r.choice(observed), grad=0.15),
        }
        if r.chance(0.5):
            tensors["bias"] = r.tensor()
        if r.chance(0.2):
            tensors["sample_weight"] = r.tensor(r.choice(("uniform", "few_zero")), grad=0.2)
        if r.chance(0.1):
            tensors["target"]["dtype"] = r.choice((*DTYPES, "int64", "int32"))
            if "int" in tensors["target"]["dtype"]:
                tensors["target"] |= {"values": "counts" if family != "bernoulli" else "ones", "grad": False}
                tensors["target"].pop("hostile", None)
        scalar = r.chance(0.3)
        if family == "gaussian":
            kind = r.choice(("none", "number", "tensor", "tensor"))
            if kind == "number":
                options["sigma"] = r.choice((0.1, 1.0, 2.5, 1e-4))
            elif kind == "tensor":
                tensors["sigma"] = r.tensor("positive", grad=0.5)
        if family == "bernoulli" and r.chance(0.5):
            tensors["pos_weight"] = r.tensor("positive", grad=0.2)
        if family in ("gaussian", "poisson") and r.chance(0.4):
            options["full"] = r.chance(0.5)
        if r.chance(0.1):
            options["loss_dtype"] = r.choice(DTYPES)
        return {
            "sizes": {"n": r.leading(n), "d": d, "v": v},
            "family": family,
            "scalar": scalar,
            "options": options,
            "tensors": tensors,
            "module": r.chance(0.05),
        }

    def shapes(self, case):
        s = case["sizes"]
        scale = () if case["scalar"] else (s["v"],)
        return {
            "input": (*s["n"], s["d"]),
            "weight": (s["v"], s["d"]),
            "target": (*s["n"], s["v"]),
            "bias": (s["v"],),
            "sample_weight": tuple(s["n"]),
            "sigma": scale,
            "pos_weight": scale,
        }

    def text(self, case):
        if case["family"] == "squared":
            return super().text(case).replace("linear_nll", "linear_mse_loss")
        return super().text(case)[:-1] + f", family={case['family']!r})"

    def places(self, case):
        return [f"{n}={n}" if n in ("sample_weight", "sigma", "pos_weight") else n for n in case["tensors"]]

    def call(self, module, t, case, options):
        x, w, y, b = t["input"], t["weight"], t["target"], t.get("bias")
        options = options | {"sample_weight": t.get("sample_weight")}
        if case["family"] == "squared":
            return module.linear_mse_loss(x, w, y, b, **options)
        options |= {k: t[k] for k in ("sigma", "pos_weight") if t.get(k) is not None}
        return module.linear_nll(x, w, y, b, family=case["family"], **options)

    def ours(self, t, case):
        options = call_options(case["options"])
        if case.get("module") and case["family"] != "squared" and not any(k in t for k in ("sigma", "pos_weight")):
            module = regfast.LinearNLLLoss(
                1, 1, t.get("bias") is not None, device="meta", family=case["family"], **options
            )
            own = {f"linear.{k}": t[k] for k in ("weight", "bias") if t.get(k) is not None}
            return torch.func.functional_call(module, own, (t["input"], t["target"], t.get("sample_weight")))
        return self.call(regfast, t, case, options)

    def torchs(self, t, case):
        return self.call(reference, t, case, call_options(case["options"]))

    def is_torchs(self, case):
        return False

    def exact(self, t, case):
        return self.call(reference, t, case, exact_options(case["options"]))

    def terms(self, t, case, ups):
        family, options = case["family"], case["options"]
        x, w, b, y = t["input"], t["weight"], t.get("bias"), t["target"].double()
        eta = F.linear(x, w, b)
        absolute = {k: None if v is None else terms.clean(v).abs() for k, v in (("x", x), ("w", w), ("b", b))}
        error = F.linear(absolute["x"], absolute["w"], absolute["b"])
        v = None
        if family == "gaussian":
            sigma = t["sigma"] if t.get("sigma") is not None else torch.tensor(options.get("sigma", 1.0))
            v = sigma.double().square().clamp(min=1e-6)
        each, slope, by_target, by_scale = terms.of_likelihood(
            eta, error, y, family, v, t.get("pos_weight"), bool(options.get("full"))
        )
        share = torch.ones((*eta.shape[:-1], 1), dtype=torch.float64)
        if t.get("sample_weight") is not None:
            share = share * terms.clean(t["sample_weight"]).abs().unsqueeze(-1)
        total = share.sum() * max(1, eta.shape[-1])
        reduction = options["reduction"]
        inverse = 1 / total if reduction == "mean" and total else torch.ones(())
        weighted = each * share
        acc = accumulator(dtype_of(case["dtype"]))
        found = Terms([weighted if reduction == "none" else terms.beyond(weighted.sum(), acc) * inverse])
        if ups[0] is None:
            return found
        g = terms.clean(ups[0]).abs() * inverse
        tensors = {"input": x, "weight": w, "bias": b}
        if reduction == "none":
            found.grads = terms.of_products(terms.linear_of, tensors, slope * share * g)
        else:  # forward computes them, undivided
            undivided = terms.of_products(terms.linear_of, tensors, terms.beyond(slope * share, acc))
            found.grads = {k: terms.beyond(size, acc) * g for k, size in undivided.items()}
        for name in ("input", "weight"):
            found.grads[name] = terms.rounded_factors(found.grads[name], dtype_of(case["dtype"]))
        if not error.isfinite().all():  # terms of predictions that overflow together: nothing is known of slopes
            found.grads = {k: torch.full_like(size, torch.inf) for k, size in found.grads.items()}
        found.grads["target"] = by_target * share * g
        lead = tuple(range(eta.dim() - 1))
        for name in ("sigma", "pos_weight"):
            if t.get(name) is not None:
                size = by_scale * share * g * (2 * terms.clean(t[name]).abs() if name == "sigma" else 1)
                found.grads[name] = size.sum(lead) if t[name].dim() else size.sum()
        if t.get("sample_weight") is not None:
            rows = (each * g).sum(-1)
            found.grads["sample_weight"] = rows + (found.outputs[0] * g).sum() * max(1, eta.shape[-1])
        return found


register(LinearNLL())
