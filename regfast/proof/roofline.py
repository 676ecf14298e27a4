"""What each CUDA kernel is predicted to reach of the device's measured ceilings; prove prints it beside what it does.

KERNELS.md's ledger is made of this: python -m regfast.proof.roofline KERNELS.md writes it there.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

# Rates of the data sheets (SXM boards), by which the least times of the ledger are computed.
SHEETS = {
    "A100": {"copy": 2.0e12, "bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12, "fp64": 9.7e12},
    "H100": {"copy": 3.35e12, "bf16": 989e12, "tf32": 495e12, "fp32": 67e12, "fp64": 34e12},
}
ARCHITECTURES = {80: "A100", 90: "H100"}
BOUNDS = {"copy": "memory", "bf16": "tensor cores", "tf32": "tensor cores", "fp32": "FMA", "fp64": "FMA"}
BEGIN, END = "<!-- roofline:begin -->", "<!-- roofline:end -->"

# Of a pass over memory with nothing in its way: what the issue "CUDA kernels" asks for, 90% of a copy.
_PASS = {80: 0.9, 90: 0.9}
_LOGITS = 1 << 29  # bytes of logits, the ledger's for the softmax family


@dataclass(frozen=True)
class Prediction:
    """Of one kernel, or of one op with all of its kernels: the work of the ledger's example and the share reached."""

    kernel: str
    section: str  # of KERNELS.md
    example: str
    work: str  # the formula
    amount: float  # bytes or FLOPs of the example
    rate: str  # which ceiling binds
    share: dict[int, float]  # of the ceiling as measured, by architecture


_FAMILY, _ELEMENTS, _NLL = "the-softmax-family", "elementwise-kernels", "linear_nll-on-cuda"
_4096, _SQUARE = 2 * 4096.0**3, 8192.0**2
_NLL_SHAPE, _NLL_FLOPS = "65536 x 1024 -> 1024 bf16, gradients of weight and bias", 4.0 * 65536 * 1024 * 1024

# mma.sync reaches 62% of wgmma on Hopper. The panel and dW cost linear_cross_entropy 4.2 ms beside 27 on an H100, 6.9
# beside 85 on an A100; slopes and float32 predictions cost linear_nll 0.28 beside 0.28 and 0.47 beside 0.88. A tile's
# sums leave while gemm_sm90's tensor cores idle: 1 / (1 + K / 200) of the time.
PREDICTIONS = (
    Prediction("gemm_sm80 bf16", "gemm_sm80", "4096^3, fp16 too", "2MNK FLOPs", _4096, "bf16", {80: 0.9, 90: 0.62}),
    Prediction("gemm_sm80 tf32", "gemm_sm80", "4096^3", "2MNK FLOPs", _4096, "tf32", {80: 0.9, 90: 0.62}),
    Prediction("gemm_sm90 bf16", "gemm_sm90", "4096^3, fp16 too", "2MNK FLOPs", _4096, "bf16", {90: 0.95}),
    Prediction("gemm_simt fp32", "gemm_simt", "4096^3", "2MNK FLOPs", _4096, "fp32", _PASS),
    Prediction("gemm_simt fp64", "gemm_simt", "4096^3", "2MNK FLOPs", _4096, "fp64", _PASS),
    Prediction("cross_entropy fwd", _FAMILY, "0.5 GiB of logits", "NVs bytes", _LOGITS, "copy", _PASS),
    Prediction("cross_entropy fwd_bwd", _FAMILY, "0.5 GiB of logits", "2NVs bytes", 2 * _LOGITS, "copy", _PASS),
    Prediction("softmax fwd", _FAMILY, "0.5 GiB of input", "2NVs bytes", 2 * _LOGITS, "copy", _PASS),
    Prediction("softmax fwd_bwd", _FAMILY, "0.5 GiB of input", "5NVs bytes", 5 * _LOGITS, "copy", _PASS),
    Prediction("logsumexp fwd", _FAMILY, "0.5 GiB of input", "NVs bytes", _LOGITS, "copy", _PASS),
    Prediction("logsumexp fwd_bwd", _FAMILY, "0.5 GiB of input", "3NVs bytes", 3 * _LOGITS, "copy", _PASS),
    Prediction("activation_forward", _ELEMENTS, "8192 x 8192 bf16", "2NVs bytes", 4 * _SQUARE, "copy", _PASS),
    Prediction("activation_backward", _ELEMENTS, "8192 x 8192 bf16, sums", "3NVs bytes", 6 * _SQUARE, "copy", _PASS),
    Prediction("mse_loss fwd_bwd", _ELEMENTS, "2^27 bf16", "6ns bytes", 6.0 * 2**28, "copy", _PASS),
    Prediction("likelihood", _NLL, "65536 x 1024 bf16", "NV (4 + 2s) bytes", 8.0 * 65536 * 1024, "copy", _PASS),
    Prediction("linear_nll fwd_bwd", _NLL, _NLL_SHAPE, "4NDV FLOPs", _NLL_FLOPS, "bf16", {80: 0.65, 90: 0.5}),
    Prediction(
        "linear_cross_entropy fwd_bwd",
        "linear_cross_entropy-on-cuda",
        "8192 x 4096 x 131072 bf16",
        "6NVD FLOPs",
        6.0 * 8192 * 4096 * 131072,
        "bf16",
        {80: 0.92, 90: 0.86},
    ),
)
BY_KERNEL = {prediction.kernel: prediction for prediction in PREDICTIONS}


def predicted(kernel: str, architecture: int) -> float | None:
    """The share of the ceiling; of a GPU that the ledger has not, what it has for the next older one."""
    shares = BY_KERNEL[kernel].share if kernel in BY_KERNEL else {}
    older = [known for known in shares if known <= architecture]
    return shares[max(older)] if older else None


def least_time(prediction: Prediction, board: str) -> str:
    seconds = prediction.amount / SHEETS[board][prediction.rate]
    return f"{seconds * 1e3:.2g} ms"


def table() -> str:
    boards = [f"{board} (sm_{arch})" for arch, board in ARCHITECTURES.items()]
    head = ["kernel or op", "example", "least work", "bound", *(f"least time, {board}" for board in boards)]
    head += [f"predicted share, {board}" for board in boards]
    rows = [head, ["---"] * len(head)]
    for p in PREDICTIONS:
        times = [least_time(p, board) if arch in p.share else "" for arch, board in ARCHITECTURES.items()]
        shares = [f"{p.share[arch]:.0%}" if arch in p.share else "" for arch in ARCHITECTURES]
        rows.append([f"[`{p.kernel}`](#{p.section})", p.example, p.work, BOUNDS[p.rate], *times, *shares])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def put_into(path: Path) -> None:
    """Replaces what stands between the marks of a Markdown file."""
    text = path.read_text()
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{path}: expected the marks {BEGIN} and {END}, found none")
    path.write_text(pattern.sub(lambda _: f"{BEGIN}\n{table()}\n{END}", text))


if __name__ == "__main__":
    put_into(Path(sys.argv[1]))
