"""Ops are public, so each refuses what its kernels cannot take: every argument wrong in every way, one at a time.

The ways are made from the schemas. A wrong argument that a call answers all the same stands in ANSWERED, with a reason.
"""

import math
import re

import pytest
import torch
from op_arguments import FORWARD_NAMES, NAMES, N, V, arguments_of, call, right_arguments
from torch.testing import assert_close
from util import class_targets, spiky

import regfast

WRITTEN_OVER = {("cross_entropy_backward_", "input"), ("cross_entropy_backward_unless_", "grad")}

# ---- the ways to be wrong -------------------------------------------------------------------------------------------


def wrong_tensors(t):
    yield "none", None
    yield "a dimension more", t.unsqueeze(0).repeat_interleave(2, 0)
    if t.dim():
        yield "a dimension less", t[0]
    for d in range(t.dim()):
        yield f"larger in {d}", torch.cat([t, t.narrow(d, 0, 1)], d)
        yield f"smaller in {d}", t.narrow(d, 1, t.shape[d] - 1)
        yield f"empty in {d}", t.narrow(d, 0, 0)
    for dtype in (torch.float64, torch.bfloat16, torch.float32, torch.complex64, torch.int32, torch.bool):
        if dtype != t.dtype:
            yield str(dtype), t.to(dtype)
    yield "meta", t.to("meta")
    if t.dim() and not t.is_meta:  # which has no sparse kernels and no memory
        yield "sparse", t.to_sparse()
        released = t.clone()
        released.untyped_storage().resize_(0)
        yield "without memory", released


NUMBERS = {
    "dim": (-4, 3, 1 << 40, -(1 << 62)),
    "reduction": (-1, 3, 1 << 40),
    "family": (-1, 4, 1 << 40),
    "outputs": (0, -1, 32, 1 << 40),
    "label_smoothing": (-0.1, 1.1, math.nan),
    "softcap": (0.0, -1.0, math.nan),
    "filter_eps": (-1.0, math.nan),
    "memory_budget": (0, -1),
    "activation": ("swish", ""),
    "loss_dtype": (torch.int64, torch.bool, torch.complex64),
}
CLASSES = (V, -1, 1 << 40, 1 << 62, -(1 << 63))  # V is the first that is not one


def wrong_values(argument, value, kind):
    if isinstance(value, torch.Tensor):
        yield from wrong_tensors(value)
    numbers = {**NUMBERS, "ignore_index": (0, 3)} if kind == "probabilities" else NUMBERS
    for number in numbers.get(argument, ()):
        yield repr(number), number


# What is taken all the same: patterns of "op argument way", each with the reason.
ANSWERED = {
    r"(phm_)?linear_forward input (a dimension (more|less)|(larger|smaller|empty) in 0)": "any leading dimensions",
    r"(softmax|logsumexp)_forward input (a dimension \w+|(larger|smaller|empty) in .)": "any that has the dimension",
    r"(softmax|logsumexp)_forward input (torch\.(float64|bfloat16)|meta)": "there is nothing to differ from",
    r"\w+ (bias|linear_bias|weight|scale|sample_weight|grad_\w+) none": "the argument is optional",
    r"(linear_)?cross_entropy_backward\w* grad_\w+ torch\.(float64|bfloat16)": "loss_dtype is gone by then",
    r"(linear_nll|logsumexp)_backward (grad|lse) torch\.(float64|bfloat16)": "converted to the accumulator's type",
    r"cross_entropy_backward_unless_ stats larger in 0": "the entropy may be among them",
    r"logsumexp_backward input torch\.(float64|bfloat16)": "grad and lse are converted to its accumulator's type",
    r"logsumexp_backward input (larger|smaller|empty) in 1": "the dimension that grad and lse do not have",
    r"linear_backward (input|weight) (larger|smaller|empty) in 1": "each is the operand of a product of its own",
    r"\w*cross_entropy\w* target torch\.int32": "class indices of any integer type",
    r"linear_nll\w* target torch\.(bfloat16|int32|bool)": "real numbers of any type that fits",
    r"linear_nll\w* scale a dimension less": "one number for all outputs",
    r"(linear_)?cross_entropy\w* weight torch\.(float64|bfloat16)": "converted to the accumulator's type",
    r"linear_nll\w* (scale|sample_weight) torch\.(float64|bfloat16)": "converted to the accumulator's type",
    r"cross_entropy_\w+ input torch\.(float64|bfloat16)": "beside classes only statistics could differ",
}


def disagreements(name, arguments, message, kind):
    """Calls with one argument wrong that answer, or fail with another message than `message(argument, way)`."""
    for argument, value in arguments.items():
        for way, wrong in wrong_values(argument, value, kind):
            case = f"{name} {argument} {way}"
            try:
                call(name, {**arguments, argument: wrong})
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                if not re.search(message(argument, way), str(error)):
                    yield f"{case}: {str(error).splitlines()[0]}"
            else:
                if not any(re.fullmatch(pattern, case) for pattern in ANSWERED):
                    yield f"{case}: answered"


def expected_message(name):
    op = rf"regfast\.({name}|{FORWARD_NAMES.get(name, name)}): "

    def message(argument, way):
        if way == "sparse":
            return "Could not run|" + op
        if way == "none":
            return rf"{op}\w+: expected .*, got n?one|no tensor arguments"
        # Of two tensors that differ, either may be called wrong.
        between = " in " in way or "dimension" in way or argument in ("input", "grad", "output")
        return op + (r"\w+" if between else argument.replace("scale", "(scale|sigma)")) + ": expected .*, got "

    return message


def of_device(name):
    """Whether the kernels at hand have the op."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"regfast::{name}", "CPU")


CASES = [
    (name, kind, reduction)
    for name in NAMES
    for kind in ("classes", "probabilities")
    for reduction in (0, 1)
    if (kind == "classes" or "cross_entropy" in name)
    and (reduction == 1 or not ("forward_backward" in name or name.endswith("unless_")))
]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name, kind, reduction", CASES)
def test_every_wrong_argument_is_refused(name, kind, reduction):
    if not of_device(name):
        pytest.skip("an op of CUDA alone")
    arguments = arguments_of(name, right_arguments(name, kind=kind, reduction=reduction))
    assert list(disagreements(name, arguments, expected_message(name), kind)) == []
    call(name, arguments)


def with_classes(target, wrong):
    """Targets of which the last is no class."""
    target = target.clone()
    target.view(-1)[-1] = wrong
    return target


@pytest.mark.parametrize("wrong", CLASSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_class_out_of_range_is_refused_on_the_cpu(wrong, weighted):
    # Backward too: it may be called with other targets than forward was, or they may have changed in between.
    for name in NAMES:
        if "cross_entropy" not in name:
            continue
        arguments = arguments_of(name, right_arguments(name))
        arguments["target"] = with_classes(arguments["target"], wrong)
        if not weighted:
            arguments["weight"] = None
        with pytest.raises(IndexError, match=rf"regfast\.\w+: target: expected classes from 0 to {V - 1}, got -?\d+$"):
            call(name, arguments)


@pytest.mark.parametrize("wrong", CLASSES)
def test_a_class_that_changed_after_forward_is_refused(wrong):
    x, target = spiky(N, V).requires_grad_(), class_targets((N,), V)
    loss = regfast.cross_entropy(x, target, torch.rand(V), reduction="none").sum()  # its gradient is left to backward
    target.data[-1] = wrong
    with pytest.raises(IndexError, match="expected classes from 0 to"):
        loss.backward()


@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_meta_kernels_refuse_what_the_others_do(kind):
    for name in NAMES:
        if kind == "probabilities" and "cross_entropy" not in name:
            continue
        values = right_arguments(name, kind=kind)
        on_meta = lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v  # noqa: E731
        arguments = {k: on_meta(v) for k, v in arguments_of(name, values).items()}
        faults = disagreements(name, arguments, expected_message(name), kind)
        assert [f for f in faults if not f.endswith(" meta: answered")] == []
        call(name, arguments)


def test_a_tensor_elsewhere_is_refused():
    # Of a CPU tensor and one of another device, the latter's kernels are called.
    for name in NAMES:
        arguments = arguments_of(name, right_arguments(name))
        tensors = [a for a, v in arguments.items() if isinstance(v, torch.Tensor)]
        if len(tensors) < 2:
            continue
        for argument in tensors:
            for others in (False, True):
                mixed = {
                    a: v.to("meta") if isinstance(v, torch.Tensor) and (a == argument) != others else v
                    for a, v in arguments.items()
                }
                with pytest.raises(RuntimeError, match=r"regfast\.\w+: \w+: expected .*, got (meta|cpu)"):
                    call(name, mixed)


# ---- right arguments, called directly -------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dim", [-3, -1, 0, 2])
def test_dimensions_count_from_either_end(dim, dtype):
    x, g = spiky(3, 4, 5, dtype=dtype), spiky(3, 4, 5, dtype=dtype)
    ops = torch.ops.regfast
    for log, public in ((False, regfast.softmax), (True, regfast.log_softmax)):
        leaf = x.clone().requires_grad_()
        y = public(leaf, dim)
        assert_close(ops.softmax_forward(x, dim, log), y, rtol=0, atol=0)
        (dx,) = torch.autograd.grad(y, leaf, g)
        assert_close(ops.softmax_backward(g, y.detach(), dim, log), dx, rtol=0, atol=0)
    leaf = x.clone().requires_grad_()
    for keepdim in (False, True):
        y = regfast.logsumexp(leaf, dim, keepdim)
        lse = ops.logsumexp_forward(x, dim, keepdim)
        assert_close(lse.to(dtype), y, rtol=0, atol=0)
        up = g.sum(dim, keepdim)
        (dx,) = torch.autograd.grad(y, leaf, up)
        assert_close(ops.logsumexp_backward(up, x, lse, dim), dx, rtol=0, atol=0)
    assert ops.logsumexp_forward(x.to("meta"), dim, True).shape == lse.shape


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_layers_and_losses_called_directly_agree_with_the_functions(reduction, dtype):
    ops, mode = torch.ops.regfast, ("none", "mean", "sum")[reduction]
    same = {"rtol": 0, "atol": 0}
    v = right_arguments("linear_forward", dtype)
    leaves = [v[k].clone().requires_grad_() for k in ("input", "weight", "bias")]
    y = regfast.linear(*leaves, activation="gelu")
    direct, saved = ops.linear_forward(v["input"], v["weight"], v["bias"], "gelu", True)
    assert_close(direct, y, **same)
    grads = ops.linear_backward(v["grad"], v["input"], v["weight"], saved, "gelu", [True] * 3)
    assert_close(grads, torch.autograd.grad(y, leaves, v["grad"]), **same)

    v = right_arguments("mse_loss", dtype, reduction=reduction)
    leaves = [v[k].clone().requires_grad_() for k in ("input", "target")]
    y = regfast.mse_loss(*leaves, reduction=mode)
    assert_close(ops.mse_loss_forward(v["input"], v["target"], reduction), y, **same)
    grads = ops.mse_loss_backward(v["grad"], v["input"], v["target"], reduction, [True] * 2)
    assert_close(grads, torch.autograd.grad(y, leaves, v["grad"]), **same)

    for kind in ("classes", "probabilities"):
        v = right_arguments("cross_entropy", dtype, kind, reduction)
        x = v["input"].clone().requires_grad_()
        options = {k: v[k] for k in ("label_smoothing", "z_loss", "softcap", "logit_scale")}
        y = regfast.cross_entropy(x, v["target"], v["weight"], reduction=mode, **options)
        loss, stats, weight_sum = call(
            "cross_entropy_forward", arguments_of("cross_entropy_forward", {**v, "outputs": 1, "loss_dtype": None})
        )
        assert_close(loss, y, **same)
        alone = {**v, "stats": stats, "weight_sum": weight_sum, "output_mask": [True, False]}
        alone |= dict.fromkeys(("grad_lse", "grad_entropy", "grad_logprob")) | {"grad_loss": torch.ones_like(y)}
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert_close(call("cross_entropy_backward", arguments_of("cross_entropy_backward", alone))[0], dx, **same)
        alone |= {"input": v["input"].clone(), "grad_target": False}
        call("cross_entropy_backward_", arguments_of("cross_entropy_backward_", alone))
        assert_close(alone["input"], dx, **same)


@pytest.mark.usefixtures("kernels")
def test_negative_and_zero_tensors_are_answered():
    # Views whose sign or whose very memory is yet to be made: the dispatcher makes them before a kernel is called.
    for name in NAMES:
        if not of_device(name):
            continue
        arguments = arguments_of(name, right_arguments(name))
        for argument, value in arguments.items():
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            plain, negated = ({a: v.clone() if torch.is_tensor(v) else v for a, v in arguments.items()} for _ in "12")
            negated[argument] = torch._neg_view(-value)
            if (name, argument) in WRITTEN_OVER:
                with pytest.raises(
                    RuntimeError, match=f"{name}: {argument}: expected a tensor to write over, got a neg"
                ):
                    call(name, negated)
            else:
                assert_close(call(name, negated), call(name, plain), rtol=0, atol=0, equal_nan=True)
            assert_close(negated[argument], plain[argument], rtol=0, atol=0)


@pytest.mark.usefixtures("kernels")
def test_a_negative_view_is_not_written_over():
    hidden, target = spiky(N, V).requires_grad_(), class_targets((N,), V)
    results = []
    for inplace in (False, True):
        x = torch._neg_view(hidden.neg())
        loss = regfast.cross_entropy(x, target, inplace_backward=inplace)
        results.append(torch.autograd.grad(loss, hidden)[0])
        assert_close(x, hidden, rtol=0, atol=0)
    assert_close(*results, rtol=0, atol=0)
    assert results[0].any()
