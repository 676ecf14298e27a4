"""PHMLinear: its parameters, their initialisation, and what flattens, saves, shards or replaces them."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_phm_linear import composed, weight
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters
from torch.testing import assert_close
from util import fresh_process, spiky

import regfast


def test_parameters():
    layer = regfast.PHMLinear(24, 20, 4)
    assert sum(p.numel() for p in layer.parameters()) == 24 * 20 // 4 + 4**3 + 20
    assert sum(p.numel() for p in regfast.PHMLinear(24, 20, 4, bias=False).parameters()) == 24 * 20 // 4 + 4**3
    assert list(layer.state_dict()) == ["a", "s", "bias"]
    assert repr(layer) == "PHMLinear(in_features=24, out_features=20, n=4, bias=True)"
    assert "n=4, bias=False, activation=gelu" in repr(regfast.PHMLinear(24, 20, 4, False, activation="gelu"))
    assert regfast.PHMLinear(24, 20, 4, dtype=torch.bfloat16).s.dtype == torch.bfloat16
    assert regfast.PHMLinear(24, 20, 4, device="meta")(torch.empty(3, 24, device="meta")).shape == (3, 20)


@pytest.mark.parametrize("sizes", [(7, 8, 4), (8, 7, 4), (8, 8, 0), (8, 8, -2)], ids=str)
def test_sizes_that_n_does_not_divide(sizes):
    with pytest.raises(ValueError, match=rf"regfast\.PHMLinear: n: expected .* divides .*, got {sizes[2]}"):
        regfast.PHMLinear(*sizes)
    with pytest.raises(ValueError, match=r"regfast\.PHMLinear: activation: expected .*relu.*, got 'mish'"):
        regfast.PHMLinear(8, 8, 4, activation="mish")


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_outputs_start_with_the_variance_of_the_dense_layers(n):
    inputs, outputs = 512, 1024
    x = torch.randn(256, inputs)
    dense = torch.stack([nn.Linear(inputs, outputs)(x).var() for _ in range(4)]).mean()
    layers = [regfast.PHMLinear(inputs, outputs, n) for _ in range(8)]
    ours = [layer(x).view(256, n, -1).var((0, 2)) for layer in layers]  # of each of the n parts by itself
    # The variance of a sample of 128 outputs' weights strays by a few percent from part to part.
    assert_close(torch.cat(ours).mean(), dense, rtol=0.03, atol=0)
    assert_close(torch.cat(ours), dense.expand(8 * n), rtol=0.15, atol=0)
    for layer in layers:
        bound = inputs**-0.5
        assert layer.bias.abs().max() <= bound and layer.s.abs().max() <= bound and layer.bias.std() > 0.5 * bound


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_merge(activation, bias, dtype):
    layer = regfast.PHMLinear(24, 20, 4, bias, activation=activation, dtype=dtype).eval()
    dense = layer.merge()
    assert (
        isinstance(dense, nn.Linear) == (activation == "none")
        and not dense.training
        and not any(p.requires_grad for p in dense.parameters())
    )
    exact = weight(layer.a.detach().double(), layer.matrices.detach().double())
    assert (dense.weight.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert (dense.bias is None) == (not bias) and (not bias or torch.equal(dense.bias, layer.bias))
    x = spiky(5, 24, dtype=dtype)
    assert_close(dense(x), layer(x), rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


def test_parameters_are_contiguous():
    layer = regfast.PHMLinear(24, 20, 4)
    assert layer.s.shape == (5, 4, 6) and all(p.is_contiguous() for p in layer.parameters())
    assert layer.matrices.shape == (4, 5, 6) and layer.matrices.data_ptr() == layer.s.data_ptr()
    x = spiky(5, 24)
    assert torch.equal(layer(x), regfast.phm_linear(x, layer.a, layer.matrices, layer.bias))
    layer(x).sum().backward()
    assert layer.s.grad.shape == layer.s.shape and layer.s.grad.is_contiguous()


def test_a_call_copies_no_parameter():
    # s takes 16 MiB, and everything else that a call allocates less than 1.
    layer, x = regfast.PHMLinear(4096, 4096, 4), torch.randn(2, 4096)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        layer(x)
    assert max(event.cpu_memory_usage for event in profile.events()) < 2**20


def test_copies():
    layer = regfast.PHMLinear(24, 20, 4, activation="relu")
    x = spiky(5, 24)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    loaded, assigned = (regfast.PHMLinear(24, 20, 4, activation="relu") for _ in range(2))
    loaded.load_state_dict(layer.state_dict())
    assigned.load_state_dict(layer.state_dict(), assign=True)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stream, weights_only=False),
        loaded,
        assigned,
        copy.deepcopy(layer).double().float(),
    ):
        assert type(twin) is type(layer) and repr(twin) == repr(layer) and twin.s.is_contiguous()
        assert torch.equal(twin(x), layer(x))
    assert layer.to_empty(device="cpu").s.is_contiguous()


def optimisers():
    """What steps over parameters one by one, all together, and as one vector."""
    sgd, adam, lbfgs = torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS
    yield from (pytest.param(partial(f, lr=0.01), id=f.__name__) for f in (sgd, adam))
    yield from (pytest.param(partial(f, lr=0.01, foreach=True), id=f"{f.__name__} foreach") for f in (sgd, adam))
    yield pytest.param(partial(adam, lr=0.01, fused=True), id="AdamW fused")
    yield pytest.param(partial(lbfgs, lr=0.1, max_iter=2), id="LBFGS")


@pytest.mark.parametrize("optimiser", list(optimisers()))
def test_trains_as_the_dense_layer_that_it_stands_for(optimiser):
    layer = regfast.PHMLinear(24, 16, 4, activation="tanh")
    a, s, b = (p.detach().contiguous().clone().requires_grad_() for p in (layer.a, layer.matrices, layer.bias))
    x, target = spiky(64, 24, size=1), spiky(64, 16, size=1)
    losses = []
    for parameters, call in (
        (list(layer.parameters()), layer),
        ([a, s, b], lambda x: composed("tanh")(x, a, s, b)),
    ):
        step = optimiser(parameters)

        def closure(step=step, call=call):
            step.zero_grad()
            value = F.mse_loss(call(x), target)
            value.backward()
            return value.detach()

        losses.append(torch.stack([step.step(closure) for _ in range(20)]))
    assert_close(*losses, rtol=1e-3, atol=0)
    assert losses[0][-1] < losses[0][0]


# What handles the parameters of any module


def test_parameters_as_a_vector():
    layer, x = regfast.PHMLinear(24, 20, 4), spiky(5, 24)
    vector = parameters_to_vector(layer.parameters())
    assert vector.shape == (24 * 20 // 4 + 4**3 + 20,)
    twin = regfast.PHMLinear(24, 20, 4)
    vector_to_parameters(vector, twin.parameters())
    assert torch.equal(twin(x), layer(x))


def test_safetensors():
    safetensors = pytest.importorskip("safetensors.torch")
    layer, twin, x = regfast.PHMLinear(24, 20, 4), regfast.PHMLinear(24, 20, 4), spiky(5, 24)
    twin.load_state_dict(safetensors.load(safetensors.save(layer.state_dict())))
    assert torch.equal(twin(x), layer(x))


def test_pruned():
    layer, x = prune.l1_unstructured(regfast.PHMLinear(24, 20, 4), "s", 0.5), spiky(5, 24)
    kept = layer.s_orig * layer.s_mask
    assert (kept == 0).sum() == kept.numel() // 2
    assert_close(layer(x), composed()(x, layer.a, kept.transpose(0, 1), layer.bias), rtol=1e-4, atol=1e-4)


def test_parametrized():
    layer, x = parametrizations.weight_norm(regfast.PHMLinear(24, 20, 4), "s", dim=1), spiky(5, 24)
    before = layer(x).detach()
    layer.parametrizations.s.original0.data *= 2  # the norm of each of the n matrices
    assert_close(layer(x) - layer.bias, 2 * (before - layer.bias), rtol=1e-4, atol=1e-4)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_fully_shard():
    fresh_process("""
        import torch, torch.distributed as dist
        from torch import nn
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        import regfast
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        layer, x = regfast.PHMLinear(24, 20, 4), torch.randn(5, 24)
        true = layer(x)
        true.square().sum().backward()
        grads = {name: p.grad for name, p in layer.named_parameters()}
        layer.zero_grad()
        model = fully_shard(nn.Sequential(layer), mesh=init_device_mesh("cpu", (1,)))
        y = model(x)
        y.square().sum().backward()
        assert torch.equal(y, true)
        for name, p in layer.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), grads[name])
        dist.destroy_process_group()
    """)
