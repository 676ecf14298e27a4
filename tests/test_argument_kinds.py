"""Arguments of the wrong kind: every function x argument x kind raises what torch's namesake raises, in our words."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from util import BEFORE_2_13, class_targets, spiky

import regfast

N, D, V = 5, 4, 6
KINDS = {
    "None": None,
    "an array": np.zeros((N, D), np.float32),
    "a list": [[0.0] * D] * N,
    "a tuple": (1, 2),
    "an int": 1,
    "a large int": 1 << 70,
    "a float": 1.5,
    "nan": float("nan"),
    "a str": "abc",
    "a bool": True,
    "a complex number": 1j,
    "an object": object(),
    "an int of numpy": np.int64(1),
    "a float of numpy": np.float32(0.5),
    "a tensor of an int": torch.tensor(1),
    "a tensor of a float": torch.tensor(0.5),
    "a dtype": torch.float64,
    "a storage": torch.zeros(3).untyped_storage(),
}
TENSORS = {"input", "weight", "bias", "target", "linear_weight", "linear_bias", "a", "s", "sample_weight", "pos_weight"}


def functions():
    """Ours, torch's namesake or None, and right arguments."""
    torch.manual_seed(0)
    x, w, b, rows = spiky(N, D), spiky(V, D), spiky(V), spiky(N, V)
    classes, likelihood = class_targets((N,), V), {"family": "bernoulli", "reduction": "mean", "loss_dtype": None}
    dims = {"input": x, "dim": 1, "dtype": None}
    loss = {"reduction": "mean", "label_smoothing": 0.1}
    legacy = {"size_average": None, "reduce": None}
    yield regfast.linear, F.linear, {"input": x, "weight": w, "bias": b}
    yield regfast.softmax, torch.softmax, dims
    yield regfast.log_softmax, torch.log_softmax, dims
    yield regfast.logsumexp, torch.logsumexp, {"input": x, "dim": 1, "keepdim": False}
    logits = {"input": rows, "target": classes, "weight": b.exp(), **legacy, "ignore_index": -100, **loss}
    yield regfast.cross_entropy, F.cross_entropy, logits
    ours = {"z_loss": 0.1, "softcap": 9.0, "logit_scale": 1.0, "loss_dtype": None}
    yield regfast.cross_entropy, None, {"input": rows, "target": classes, **ours, "inplace_backward": False}
    linear = {"input": x, "linear_weight": w, "target": classes, "linear_bias": b, "weight": b.exp(), **loss}
    yield regfast.linear_cross_entropy, getattr(F, "linear_cross_entropy", None), {**linear, "ignore_index": None}
    yield regfast.linear_cross_entropy, None, {**linear, **ours, "memory_budget": None, "filter_eps": 0.0}
    squares = {"input": x, "target": spiky(N, D), **legacy, "reduction": "mean"}
    yield regfast.mse_loss, F.mse_loss, squares
    nll = {"input": x, "weight": w, "target": rows.sigmoid(), "bias": b, "sample_weight": spiky(N).exp()}
    yield regfast.linear_nll, None, {**nll, "pos_weight": b.exp(), **likelihood}
    yield regfast.linear_mse_loss, None, {**nll, "reduction": "mean", "loss_dtype": None}
    phm = {"input": x, "a": spiky(2, 2, 2), "s": spiky(2, V // 2, D // 2), "bias": b}
    yield regfast.phm_linear, None, {**phm, "activation": "none"}


FUNCTIONS = {
    f"{ours.__name__}{'' if true else ' (ours alone)'}": (ours, true, given) for ours, true, given in functions()
}
# Not as torch: patterns of "function argument kind", each with its reason.
DIFFERENCES = {
    r"((log_)?softmax|cross_entropy) input a tensor of an int": "integers are refused before dimensions are looked at",
    r"(linear_)?cross_entropy label_smoothing nan": "torch takes it for none",
}


def outcome(fn, given):
    try:
        fn(**given)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_kinds_raise_what_torch_raises(function):
    ours, true, given = FUNCTIONS[function]
    assert outcome(ours, given) is None
    faults = []
    for argument in given:
        if true is None and argument in ("reduction", "family"):  # compared by their values, as torch does
            continue
        for kind, value in KINDS.items():
            case = f"{function} {argument} {kind}"
            if any(re.fullmatch(pattern, case) for pattern in DIFFERENCES):
                continue
            wrong = {**given, argument: value}
            got = outcome(ours, wrong)
            if argument in TENSORS and not (isinstance(value, torch.Tensor) or value is None):
                expected = TypeError  # an array has a shape and is refused by it in some of torch's functions
            elif true is not None:
                # A missing attribute is how some of torch's functions find out.
                theirs = type(outcome(true, wrong))
                odd = {AttributeError, RuntimeError} if BEFORE_2_13 and argument == "dim" else {AttributeError}
                expected = TypeError if theirs in odd else theirs
            else:  # in our words at least
                expected = type(got) if got is None or "regfast." in str(got) else TypeError
            if type(got) is not expected:
                faults.append(f"{case}: expected {expected.__name__}, got {got!r}")
    assert faults == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_messages_name_function_and_argument(function):
    ours, _, given = FUNCTIONS[function]
    for argument in given.keys() - {"size_average", "reduce", "reduction", "family"}:
        message = rf"regfast\.{ours.__name__}: {argument}: expected .*, got object"
        with pytest.raises(TypeError, match=message):
            ours(**{**given, argument: object()})
