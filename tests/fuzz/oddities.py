"""Differences that are PyTorch's own oddities, or documented ones: each a narrow predicate, with its reason.

A predicate is given the case and the problem as check.py words it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable

from regfast import _C

from .compare import EPSILONS

Case = dict
INFINITE_SLOPES = ("gelu", "gelu_tanh", "silu")


def _unbounded(case: Case, *names: str) -> bool:
    """Whether one of these tensors (or any) may hold numbers that are not finite, or whose products are not."""
    return any(
        spec["values"] == "huge" or any(not abs(value) < 1e9 for _, value, _ in spec.get("hostile", []))
        for name, spec in case["tensors"].items()
        if not names or name in names
    )


def _pattern(problem: str) -> bool:
    """Whether finite numbers, infinities or NaN stand at different places."""
    return ": at " in problem and ("nan" in problem or "inf" in problem)


def _byte_targets(case: Case, problem: str) -> bool:
    target = case["tensors"].get("target", {})
    return (
        "cross_entropy" in case["op"]
        and target.get("dtype") == "uint8"
        and ("Byte" in problem or "gather()" in problem)
    )


def _int_targets(case: Case, problem: str) -> bool:
    target = case["tensors"].get("target", {})
    refused = problem.startswith("only PyTorch") or "PyTorch RuntimeError: expected target dtype" in problem
    return "cross_entropy" in case["op"] and target.get("dtype") == "int32" and refused


def _bias_after_the_product(case: Case, problem: str) -> bool:
    """Where input has one dimension, or more than two, and its strides do not let them be one."""
    sizes = case["sizes"]
    if case["op"] == "linear":
        found = case.get("mismatch") in (["bias", "dtype"], ["weight", "flatter"]) and len(sizes["n"]) != 1
    else:
        found = case.get("mismatch") == ["linear_bias", "dtype"] and bool(sizes.get("single"))
    return found and problem.startswith("only regfast raised")


def _one_class_for_one_row(case: Case, problem: str) -> bool:
    mismatched = case.get("mismatch") in (["target", "deeper"], ["input", "flatter"])
    shapes = "size mismatch" in problem or "output with shape [] doesn't match" in problem
    return "cross_entropy" in case["op"] and mismatched and shapes and "PyTorch raised" in problem


def _batches(case: Case, problem: str) -> bool:
    return (
        case["op"] == "linear_cross_entropy" and "PyTorch RuntimeError: expected input with dimensionality" in problem
    )


def _only_ours_is_nan(problem: str) -> bool:
    """Whether PyTorch's and the true value are both finite."""
    found = re.search(r": at \d+: nan, PyTorch (\S+), in float64 (\S+)", problem)
    return found is not None and all(abs(float(x)) < float("inf") for x in found.groups())


def _leaves_the_range(case: Case, problem: str) -> bool:
    multiplies = case["op"] in ("linear", "phm_linear", "linear_cross_entropy", "linear_nll")
    if _only_ours_is_nan(problem) and not multiplies:
        return False
    huge = any(
        spec["values"] == "huge" or any(1e30 <= abs(value) < float("inf") for _, value, _ in spec.get("hostile", []))
        for spec in case["tensors"].values()
    )
    return (huge or any(kind == "huge" for kind, _ in case["upstream"])) and _pattern(problem)


def _empty_beside_another_type(case: Case, problem: str) -> bool:
    sizes = [n for size in case["sizes"].values() for n in (size if isinstance(size, list) else [size])]
    return 0 in sizes and case.get("mismatch", ("", ""))[1] == "dtype" and problem.startswith("only regfast raised")


def _infinite_terms_of_two_outputs(case: Case, problem: str) -> bool:
    several = len(case["options"].get("outputs", [])) > 1
    return several and problem.startswith("gradient of target") and "PyTorch nan" in problem and _unbounded(case)


def _weights_of_other_dimensions(case: Case, problem: str) -> bool:
    other = case.get("mismatch") in (["weight", "deeper"], ["weight", "flatter"])
    return other and "cross_entropy: weight: expected one number" in problem


def _equal_terms(case: Case, problem: str) -> bool:
    """kGemmChain additions of one term err by half as many epsilons at most, where PyTorch may err by none; a library's
    products have chains of any length."""
    found = re.search(r": error (\S+), allowed (\S+) or twice", problem)
    equal = any(
        spec["values"] in ("ones", "equal") or "expanded" in spec["layout"] for spec in case["tensors"].values()
    )
    equal = equal or any(kind in ("one", "broadcast") for kind, _ in case["upstream"])
    chain = 256
    if os.environ.get("REGFAST_GEMM") == "aten":
        sizes = case["sizes"].values()
        chain = max(chain, *(n for size in sizes for n in (size if isinstance(size, list) else [size])))
    return equal and found is not None and float(found[1]) <= chain / 2 / EPSILONS * float(found[2])


def _scale_beyond_the_range(case: Case, problem: str) -> bool:
    return case["op"] == "linear_nll" and _unbounded(case, "sigma", "pos_weight", "sample_weight")


def _negative_smoothing(case: Case, problem: str) -> bool:
    refused = problem.startswith("only regfast raised") or "label_smoothing: expected" in problem
    return case["options"].get("label_smoothing", 0) < 0 and refused


def _all_of_logsumexp(case: Case, problem: str) -> bool:
    return case["op"] == "logsumexp" and case["options"]["dim"] == [] and problem.startswith("only PyTorch raised")


def _subnormal_pairs(case: Case, problem: str) -> bool:
    products = case["op"] in ("linear", "phm_linear", "linear_cross_entropy", "linear_nll")
    small = any(spec["values"] == "denormal" for spec in case["tensors"].values())
    pairs = case["dtype"] == "bfloat16" and _C.multiplies_pairs()
    return products and pairs and small and "raised" not in problem


def _one_class_for_no_rows(case: Case, problem: str) -> bool:
    flat = case.get("mismatch") == ["target", "flatter"] and case["sizes"].get("n") == 0
    return flat and "target: expected batch size 0" in problem and "PyTorch IndexError" in problem


def _slope_at_infinity(case: Case, problem: str) -> bool:
    return (
        case["options"].get("activation") in INFINITE_SLOPES
        and problem.startswith("gradient")
        and _pattern(problem)
        and _unbounded(case)
    )


def _other_order(case: Case, problem: str) -> bool:
    mixed = ("input", "a")  # rows of which, or of gradients for which, are stored
    return case["op"] == "phm_linear" and _unbounded(case) and (_pattern(problem) or _unbounded(case, *mixed))


def _ignored_rows(case: Case, problem: str) -> bool:
    """Only gradients, and only PyTorch's is NaN."""
    target = case["tensors"].get("target", {})
    return (
        "cross_entropy" in case["op"]
        and target.get("values") == "classes"
        and (target["ignored"] > 0 or "ignore_index" in case["options"])
        and problem.startswith("gradient")
        and "PyTorch nan" in problem
        and _unbounded(case)
    )


def _subnormal_weights(case: Case, problem: str) -> bool:
    """Of a mean; PyTorch's gradients are infinite or NaN then, as ours are."""
    weight = case["tensors"].get("sample_weight" if case["op"] == "linear_nll" else "weight", {})
    return (
        ("cross_entropy" in case["op"] or case["op"] == "linear_nll")
        and case["options"].get("reduction", "mean") == "mean"
        and any(0 < abs(value) < 1e-37 for _, value, _ in weight.get("hostile", []))
        and _pattern(problem)
    )


def _rounded_to_zero(case: Case, problem: str) -> bool:
    """phm_linear, whose composite applies it before it rounds."""
    half = case["dtype"] in ("bfloat16", "float16")
    zero = problem.startswith("gradient") and ": 0.0, PyTorch" in problem
    tiny = any(spec["values"] in ("denormal", "wide") for spec in case["tensors"].values())
    return case["op"] == "phm_linear" and case["options"]["activation"] == "relu" and half and zero and tiny


def _weighted_squares(case: Case, problem: str) -> bool:
    half = case["dtype"] in ("bfloat16", "float16")
    return case["op"] == "mse_loss" and "weight" in case["tensors"] and half and "PyTorch nan" in problem


def _infinite_weights(case: Case, problem: str) -> bool:
    return "cross_entropy" in case["op"] and _pattern(problem) and _unbounded(case, "weight")


def _beyond_the_family(case: Case, problem: str) -> bool:
    return case["op"] == "linear_nll" and _pattern(problem) and _unbounded(case, "target")


def _infinite_predictions(case: Case, problem: str) -> bool:
    return case.get("family") == "bernoulli" and "PyTorch nan" in problem and _unbounded(case)


def _divided_by_zero(case: Case, problem: str) -> bool:
    """And by what is zero in its dtype, or whose reciprocal is beyond the gradients'."""
    number = case["options"].get("normalizer", 1)
    number = abs(number[0] if isinstance(number, list) else number)
    found = re.search(r": at \d+: (\S+), PyTorch (\S+), in float64 (\S+)", problem)
    infinite = found is not None and not any(math.isfinite(float(x)) for x in found.groups())
    return number < 1e-4 and problem.startswith("gradient") and infinite


def _bits_of_torch(case: Case, problem: str) -> bool:
    return " threads: " in problem and problem.endswith("of what ATen has computed")


ODDITIES: dict[str, Callable[[Case, str], bool]] = {
    "torch takes uint8 classes for rows of logits, and refuses them beside further dimensions": _byte_targets,
    "int32 classes are taken, which torch refuses": _int_targets,
    "where torch adds the bias after the product, it may have another type, and weight one dimension": (
        _bias_after_the_product
    ),
    "a class in one dimension for a single row: torch takes it, and fails in backward or beside label smoothing": (
        _one_class_for_one_row
    ),
    "batches of more dimensions are taken, which torch refuses": _batches,
    "where terms leave the range, the order of operations decides what comes of them": _leaves_the_range,
    "torch does not look at the types of what is empty": _empty_beside_another_type,
    "squares of a sigma, and products with weights, beyond the range have no meaning": _scale_beyond_the_range,
    "factors of loss and logprob meet before an infinite log-probability, in torch after it": (
        _infinite_terms_of_two_outputs
    ),
    "torch takes class weights of more dimensions where there are positions, and of none in places": (
        _weights_of_other_dimensions
    ),
    "sums of equal terms round in one direction, for as long as a chain of additions is": _equal_terms,
    "torch ignores a negative label_smoothing, which is refused": _negative_smoothing,
    "torch's logsumexp over no dimension means all, but fails beside keepdim=False": _all_of_logsumexp,
    "pairs of bfloat16 are multiplied as if subnormal numbers were zero, by torch's library too": _subnormal_pairs,
    "a class without dimensions beside no rows: torch looks for its first dimension": _one_class_for_no_rows,
    "the slope of gelu or silu at infinity is its limit; torch multiplies infinity by zero": _slope_at_infinity,
    "phm_linear multiplies by a before s: infinities meet other numbers than in a stored weight": _other_order,
    "rows that are ignored take no part; torch multiplies their zero gradient by what is infinite there": _ignored_rows,
    "a mean over weights whose sum is subnormal is multiplied by its reciprocal, which is infinite": (
        _subnormal_weights
    ),
    "relu passes no gradient where a half type's result is zero, be it because it was rounded": _rounded_to_zero,
    "torch squares weighted errors in a half type, and leaves its range": _weighted_squares,
    "class weights that are no finite numbers multiply sums of all classes, in torch each class by itself": (
        _infinite_weights
    ),
    "at an infinite prediction bernoulli's loss is infinite; torch subtracts infinities": _infinite_predictions,
    "which infinity or NaN a gradient is of a loss that was divided by zero, the order of operations decides": (
        _divided_by_zero
    ),
    "bits of torch's operators, of which composites and ATen's products consist, depend on the number of threads": (
        _bits_of_torch
    ),
    "targets beyond the family's range, infinite ones, have no likelihood": _beyond_the_family,
}


def oddity(case: Case, problem: str) -> str | None:
    """The reason why a difference is no fault of ours, or None."""
    return next((reason for reason, holds in ODDITIES.items() if holds(case, problem)), None)
