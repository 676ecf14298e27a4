"""Every op of the schema that has kernels, with arguments that it takes."""

import torch
from util import class_targets, probability_targets, spiky

import regfast  # noqa: F401  registers the ops

N, D, V, P, Q = 5, 4, 6, 3, 2  # rows, features, classes or outputs, positions, and n of phm_linear
FORWARD_NAMES = {  # as users know the ops, in messages
    "linear_forward": "linear",
    "phm_linear_forward": "phm_linear",
    "softmax_forward": "softmax",
    "logsumexp_forward": "logsumexp",
    "cross_entropy_forward": "cross_entropy",
    "cross_entropy_forward_backward": "cross_entropy",
    "linear_cross_entropy_forward": "linear_cross_entropy",
    "linear_cross_entropy_forward_backward": "linear_cross_entropy",
    "linear_nll_forward": "linear_nll",
    "linear_nll_forward_backward": "linear_nll",
    "mse_loss_forward": "mse_loss",
}
NAMES = sorted({*FORWARD_NAMES, *(name.replace("_forward", "_backward") for name in FORWARD_NAMES)})
NAMES = [n for n in NAMES if n != "cross_entropy_backward_backward" and not n.endswith("_backward_backward")]
NAMES += ["cross_entropy_backward_", "cross_entropy_backward_unless_"]


def op_of(name):
    return getattr(torch.ops.regfast, name).default


def loss_options(**others):
    options = {"ignore_index": -100, "reduction": 1, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 9.0}
    return {
        **options,
        "logit_scale": 0.9,
        "loss_dtype": torch.float32,
        "memory_budget": 1 << 20,
        "filter_eps": 0.0,
        "upstream": 1.0,
        **others,
    }


def statistics(x, target, weight, reduction, outputs):
    """What cross_entropy saves for backward: its last two results."""
    o = loss_options(reduction=reduction)
    named = [o[k] for k in ("ignore_index", "reduction", "label_smoothing", "z_loss", "softcap", "logit_scale")]
    return op_of("cross_entropy_forward")(x, target, weight, *named, outputs, None)[-2:]


def right_arguments(name, dtype=torch.float32, kind="classes", reduction=1):
    """Arguments by name that each op takes; kind: of cross-entropy's targets."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def values(*shape, dtype=dtype):
        return spiky(*shape, dtype=dtype)

    if name.startswith("linear_nll"):
        each = (N, V) if reduction == 0 else ()
        return {
            **{"input": values(N, D), "weight": values(V, D), "target": values(N, V), "bias": values(V)},
            **{
                "scale": values(V, dtype=acc).exp(),
                "sample_weight": values(N, dtype=acc).exp(),
                "family": 1,
                "variance": 1.0,
            },
            **{"full": True, "reduction": reduction, "loss_dtype": torch.float32, "output_mask": [True] * 4},
            "grad": values(*each, dtype=acc),
        }
    if "cross_entropy" in name:
        linear = name.startswith("linear")
        shape, each = (N, V, P), (N, P)
        probable = kind == "probabilities"
        target = probability_targets(*shape, dtype=dtype) if probable else class_targets(each, V, 0.2)
        tensors = {"input": values(*shape), "target": target, "weight": values(V).exp()}
        if linear:
            tensors |= {"input": values(N, D), "linear_weight": values(V, P, D), "linear_bias": values(V, P)}
        elif "backward" in name and not name.endswith("forward_backward"):
            stats, weight_sum = statistics(*tensors.values(), reduction, 1 if name.endswith("unless_") else 31)
            tensors |= {"stats": stats, "weight_sum": weight_sum, "grad": torch.zeros(shape, dtype=dtype)}
        upstream = dict.fromkeys(("grad_lse", "grad_entropy", "grad_logprob"))
        upstream = {k: values(*each, dtype=acc) for k in upstream}
        upstream["grad_loss"] = values(*(each if reduction == 0 else ()), dtype=acc)
        mask = [True, True, True, probable] if linear else [True, probable]
        if name == "linear_cross_entropy_forward_backward":
            mask = [True] * 3
        others = {"outputs": 31, "argmax": True, "output_mask": mask, "grad_target": probable}
        return {**tensors, **upstream, **loss_options(reduction=reduction), **others}
    if name.startswith("phm"):
        layer = {"a": values(Q, Q, Q), "s": values(Q, V // Q, D // Q)}
        return {
            **{"input": values(N, D), "bias": values(V), "activation": "gelu", "save_preactivation": True},
            **layer,
        } | {"grad": values(N, V), "saved": values(N, V), "output_mask": [True] * 4}
    if name.startswith("linear"):
        layer = {"input": values(N, D), "weight": values(V, D), "bias": values(V), "activation": "gelu"}
        return {**layer, "save_preactivation": True} | {
            "grad": values(N, V),
            "saved": values(N, V),
            "output_mask": [True] * 3,
        }
    if name.startswith("mse"):
        grad = values(*((N, D) if reduction == 0 else ()))
        return {
            "input": values(N, D),
            "target": values(N, D),
            "reduction": reduction,
            "grad": grad,
            "output_mask": [True] * 2,
        }
    x = values(N, V, P)
    rows = {"lse": x.float().logsumexp(1), "grad": values(N, P)} if name.startswith("logsumexp") else {}
    return {
        **{"input": x, "output": x.softmax(1), "grad": values(N, V, P), "dim": 1, "log": False, "keepdim": False},
        **rows,
    }


def arguments_of(name, values):
    """Of the given values, those that the op's schema has, in its order."""
    return {a.name: values[a.name] for a in op_of(name)._schema.arguments}


def call(name, arguments):
    return op_of(name)(*arguments.values())
