"""What rewrites or wraps nn.Linear meets layers that fuse more than its product: it works, or is refused in words."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_linear import ACTIVATIONS
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import fuse_linear_bn_eval, parametrizations, prune, weight_norm
from torch.testing import assert_close
from torch.utils import mkldnn
from util import class_targets, spiky

import regfast

X, T = spiky(12, 8), class_targets((12,), 5, 0.2)
Y = torch.rand(12, 5)


class Lora(nn.Module):
    """Adapters of low rank beside a layer, as peft wraps and merges them."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features))
        self.up = nn.Parameter(torch.randn(layer.out_features, rank))

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, input):
        return self.base_layer(input) + input @ self.down.T @ self.up.T

    @torch.no_grad()
    def merge(self):
        self.base_layer.weight += self.up @ self.down
        return self.base_layer


def replace_linear(module, make):
    """Replaces each nn.Linear of a model, as tools that look for them do."""
    for name, child in list(module.named_children()):
        module.set_submodule(name, make(child)) if isinstance(child, nn.Linear) else replace_linear(child, make)
    return module


def activated(**options):
    return regfast.Linear(8, 5, activation="relu", **options)


class Nested(nn.Module):
    """A model's own code, which replace() rewrites."""

    def __init__(self, **options):
        super().__init__()
        self.linear, self.activation = nn.Linear(8, 5, **options), nn.ReLU()

    def forward(self, input):
        return self.activation(self.linear(input))


class Statements(Nested):
    def forward(self, input):
        input = self.linear(input)
        input = self.activation(input)
        return input


class Function(Nested):
    def forward(self, input):
        return F.relu(self.linear(input))


def replaced(kind):
    def make(**options):
        module = kind(**options)
        regfast.replace(module)
        assert type(module) is not kind
        module.linear.__class__ = nn.Linear  # which torch.ao.quantization looks for
        return module

    return make


# Modules that hold a linear layer, with the arguments of a call, and the same by the layer's output.
HOLDERS = {
    "Linear": (activated, (X,), F.relu),
    **{f"replaced {kind.__name__}": (replaced(kind), (X,), F.relu) for kind in (Nested, Statements, Function)},
    "LinearCrossEntropyLoss": (
        lambda **options: regfast.LinearCrossEntropyLoss(8, 5, bias=True, label_smoothing=0.1, **options),
        (X, T),
        lambda eta: F.cross_entropy(eta, T, label_smoothing=0.1),
    ),
    "LinearCrossEntropyLoss of options": (
        lambda **options: regfast.LinearCrossEntropyLoss(
            8, 5, weight=torch.arange(1.0, 6), ignore_index=1, reduction="none", memory_budget=1, **options
        ),
        (X, T.clamp(min=1)),
        lambda eta: F.cross_entropy(eta, T.clamp(min=1), torch.arange(1.0, 6), ignore_index=1, reduction="none"),
    ),
    "LinearCrossEntropyLoss of positions": (
        lambda **options: regfast.LinearCrossEntropyLoss(8, 5, out_features=(3,), reduction="sum", **options),
        (X, T[:, None].expand(12, 3)),
        lambda eta: F.cross_entropy(eta.unflatten(-1, (5, 3)), T[:, None].expand(12, 3), reduction="sum"),
    ),
    "LinearNLLLoss gaussian": (
        lambda **options: regfast.LinearNLLLoss(8, 5, family="gaussian", sigma=0.5, **options),
        (X, Y),
        lambda eta: F.gaussian_nll_loss(eta, Y, torch.full((12, 5), 0.25), full=True),
    ),
    "LinearNLLLoss bernoulli": (
        lambda **options: regfast.LinearNLLLoss(8, 5, family="bernoulli", reduction="none", **options),
        (X, Y),
        lambda eta: F.binary_cross_entropy_with_logits(eta, Y, reduction="none"),
    ),
    "LinearNLLLoss poisson": (
        lambda **options: regfast.LinearNLLLoss(8, 5, family="poisson", full=True, reduction="sum", **options),
        (X, Y * 4),
        lambda eta: F.poisson_nll_loss(eta, Y * 4, full=True, reduction="sum"),
    ),
    "LinearNLLLoss categorical": (
        lambda **options: regfast.LinearNLLLoss(8, 5, family="categorical", **options),
        (X, T),
        lambda eta: F.cross_entropy(eta, T),
    ),
}
holders = pytest.mark.parametrize("make, arguments, after", HOLDERS.values(), ids=HOLDERS.keys())


def same(value, true):
    assert_close(value, true, rtol=1e-4, atol=1e-4)


@holders
def test_adapters(make, arguments, after):
    module = make()
    plain = module(*arguments)
    same(plain, after(module.linear(X)))
    base, lora = module.linear, replace_linear(module, Lora).linear
    value = module(*arguments)
    assert not torch.allclose(value, plain)
    same(value, after(F.linear(X, base.weight + lora.up @ lora.down, base.bias)))
    value.sum().backward()
    assert lora.up.grad.abs().max() > 0 and lora.down.grad.abs().max() > 0
    module.linear = lora.merge()
    same(module(*arguments), value)
    assert repr(module)


@holders
def test_hooks_of_the_layer_are_called(make, arguments, after):
    calls = []
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        module = make()
        handle = getattr(module.linear, register)(lambda *_: calls.append(1))
        value = module(*arguments)
        same(value, after(module.linear(X)))
        value.sum().backward()
        assert calls
        handle.remove()
        calls.clear()
        module(*arguments).sum().backward()
        assert not calls
    module = make()
    module.linear.register_forward_hook(lambda layer, inputs, output: output * 2)
    same(module(*arguments), after(F.linear(X, module.linear.weight, module.linear.bias) * 2))


@holders
def test_weights_that_are_computed(make, arguments, after):
    for change in (
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        weight_norm,
    ):
        module = make()
        change(module.linear)
        with torch.no_grad():
            next(module.linear.parameters()).mul_(2)
        value = module(*arguments)
        same(value, after(module.linear(X)))
        value.sum().backward()
        assert all(p.grad is not None for p in module.linear.parameters())


@holders
def test_subclasses_and_methods_of_their_own_are_called(make, arguments, after):
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    module = make()
    module.linear.__class__ = Doubled
    same(module(*arguments), after(2 * F.linear(X, module.linear.weight, module.linear.bias)))
    module = make()
    module.linear.forward = lambda input: 3 * F.linear(input, module.linear.weight, module.linear.bias)
    same(module(*arguments), after(3 * F.linear(X, module.linear.weight, module.linear.bias)))


@holders
def test_one_graph_when_compiled(make, arguments, after):
    torch._dynamo.reset()
    module = make()
    same(torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments), module(*arguments))
    replace_linear(module, Lora)
    torch._dynamo.reset()
    same(torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments), module(*arguments))
    torch._dynamo.reset()


@holders
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN")
def test_mkldnn(make, arguments, after):
    module = make().eval()
    with torch.no_grad():
        true = module(*arguments)
        same(mkldnn.to_mkldnn(copy.deepcopy(module))(*arguments), true)


@holders
@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation(make, arguments, after):
    module = torch.ao.quantization.quantize_dynamic(make().eval(), {nn.Linear}, dtype=torch.qint8)
    assert type(module.linear) is torch.ao.nn.quantized.dynamic.Linear
    same(module(*arguments), after(module.linear(X)))
    assert repr(module)


def test_quantisation_that_passes_over_a_layer_says_so():
    for layers in ({nn.Linear}, {nn.LSTM}, {regfast.Linear}):
        with pytest.warns(
            UserWarning, match=r"regfast\.Linear: quantisation: expected torch\.nn\.Linear.*, got regfast"
        ):
            module = torch.ao.quantization.quantize_dynamic(nn.Sequential(regfast.Linear(8, 5)), layers)
        assert type(module[0]) is regfast.Linear
    layer = regfast.Linear(8, 5)
    layer.__class__ = nn.Linear
    module = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})
    assert type(module[0]) is torch.ao.nn.quantized.dynamic.Linear


@holders
@pytest.mark.filterwarnings("ignore")
def test_weight_only_quantisation(make, arguments, after):
    quantization = pytest.importorskip("torchao.quantization")
    module = make().eval()
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
    assert type(module.linear.weight) is not nn.Parameter
    with torch.no_grad():
        same(module(*arguments), after(F.linear(X, module.linear.weight, module.linear.bias)))


@holders
def test_peft(make, arguments, after):
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make()

        def forward(self, *arguments):
            return self.body(*arguments)

    # As large as any: peft's are zero at first.
    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["linear"], r=2, init_lora_weights=False))
    value = model(*arguments)
    value.sum().backward()
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 and all(p.grad.abs().max() > 0 for p in adapters.values())
    with torch.no_grad():
        same(model.merge_and_unload()(*arguments), value)


# Linear with an activation is no nn.Linear


def test_a_norm_is_fused_into_a_layer_without_activation_alone():
    norm = nn.BatchNorm1d(5)
    norm.running_mean, norm.running_var = spiky(5), torch.rand(5) + 0.5
    norm.eval()
    plain, layer = regfast.Linear(8, 5).eval(), activated().eval()
    fused = fuse_linear_bn_eval(plain, norm)
    assert type(fused) is regfast.Linear
    same(fused(X), norm(plain(X)))
    with pytest.raises(TypeError, match=r"regfast\.LinearActivation: weight: expected .*, got"):
        fuse_linear_bn_eval(layer, norm)
    with pytest.raises(AssertionError, match="LinearActivation"):
        torch.ao.quantization.fuse_modules(nn.Sequential(layer, norm), ["0", "1"])
    model = nn.Sequential(layer, norm).eval()
    same(fuse(model)(X), norm(layer(X)))


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
def test_the_class(activation):
    torch.manual_seed(3)
    layer = regfast.Linear(8, 5, activation=activation)
    torch.manual_seed(3)
    twin = nn.Linear(8, 5)
    assert type(layer) is regfast.LinearActivation and not isinstance(layer, nn.Linear)
    assert torch.equal(layer.weight, twin.weight) and torch.equal(layer.bias, twin.bias)
    assert (layer.in_features, layer.out_features) == (8, 5) and activation in repr(layer)
    assert list(layer.state_dict()) == ["linear.weight", "linear.bias"]
    true = layer(X)
    same(true, ACTIVATIONS[activation](twin(X)))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)):
        assert type(copied) is type(layer) and repr(copied) == repr(layer) and torch.equal(copied(X), true)


def test_state_of_a_linear_layer_loads():
    model, plain = nn.Sequential(regfast.Linear(8, 5, activation="relu")), nn.Sequential(nn.Linear(8, 5), nn.ReLU())
    for state in (plain.state_dict(), {"0.linear." + k: v * 2 for k, v in plain[0].state_dict().items()}):
        model.load_state_dict(state)
        weight, bias = state.values()
        same(model(X), F.relu(F.linear(X, weight, bias)))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**plain.state_dict(), "0.other": torch.ones(1)})


def test_errors():
    with pytest.raises(TypeError, match=r"regfast\.LinearActivation: weight: expected .* linear, .* shape \(5, 8\)"):
        activated().weight = nn.Parameter(torch.ones(5, 8))

    class Subclass(regfast.Linear):
        pass

    assert type(Subclass(8, 5)) is Subclass
    with pytest.raises(TypeError, match=r"regfast\.Linear: activation: expected none in a subclass, got 'relu'"):
        Subclass(8, 5, activation="relu")
    layer = activated()
    layer.linear = Lora(layer.linear)
    with pytest.raises(NotImplementedError, match=r"regfast\.LinearActivation: torch\.jit\.script: expected .*Lora"):
        torch.jit.script(layer)


def test_a_class_can_be_given_to_a_layer_that_exists():
    layer, x = nn.Linear(8, 5), spiky(3, 8)
    true = layer(x)
    layer.__class__ = regfast.Linear
    same(layer(x), true)
    assert repr(layer) == repr(nn.Linear(8, 5)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
