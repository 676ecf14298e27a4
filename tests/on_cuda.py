"""What the tests of ops that loop over chunks share of CUDA: where tensors lie, and what a call does below autograd."""

import time

import torch

# Of these ops a GPU's would wait for it.
WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}
PRODUCTS = {"aten::mm", "aten::addmm"}


def on(device, *tensors):
    return [t if t is None else t.detach().to(device).requires_grad_(t.requires_grad) for t in tensors]


def placed(device, *tensors):
    """on(), but with the layouts of CPU tensors kept, for the emulator."""
    return tensors if device == "cpu" else on(device, *tensors)


def seen(fn):
    """The names of all ops below fn(), those of kernels too, with how often each was called."""
    # On a busy machine the profiler can lose what lies near the ends of its time: two other ops stand guard there.
    for wait in (0, 0.01, 0.1, 1):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            time.sleep(wait)
            torch.zeros(1).erfinv()
            fn()
            torch.zeros(1).lgamma()
            time.sleep(wait)
        counts = {event.key: event.count for event in profile.key_averages()}
        if {"aten::erfinv", "aten::lgamma"} <= counts.keys():
            return counts
    raise RuntimeError("the profiler saw nothing")
