"""torch.export, its decompositions, and the ONNX exporters."""

import io

import pytest
import torch
from cases import CASES, bound
from torch import nn
from torch.testing import assert_close
from util import class_targets, spiky

import regfast


def operators(program):
    """The namespaces of the operators in a program's graph."""
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = regfast.Linear(20, 16, activation="gelu"), regfast.Linear(16, 7)
        self.phm = regfast.PHMLinear(16, 8, 4, activation="silu")
        self.loss = regfast.CrossEntropyLoss(label_smoothing=0.1)
        self.head = regfast.LinearCrossEntropyLoss(16, 7, bias=True, label_smoothing=0.1)
        self.fit = regfast.LinearNLLLoss(16, 7, family="poisson", full=True)

    def forward(self, x, target):
        hidden = self.hidden(x)
        z = self.out(hidden)
        return (
            self.head(hidden, target),
            self.fit(hidden, z.square()),
            self.phm(hidden),
            self.loss(z, target),
            regfast.softmax(z, -1),
            regfast.log_softmax(z),
            regfast.logsumexp(z, 1),
            regfast.mse_loss(z, z * 2),
        )


def test_export():
    model = Model()
    x, target = spiky(12, 20), class_targets((12,), 7, 0.2)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(model, (x, target), dynamic_shapes=({0: rows}, {0: rows}))
    for n in (12, 5):
        x, target = spiky(n, 20), class_targets((n,), 7, 0.2)
        assert_close(program.module()(x, target), model(x, target))


def test_exported_programs_can_be_saved(tmp_path):
    model, x, target = Model(), spiky(12, 20), class_targets((12,), 7, 0.2)
    torch.export.save(torch.export.export(model, (x, target)), tmp_path / "model.pt2")
    assert_close(torch.export.load(tmp_path / "model.pt2").module()(x, target), model(x, target))


# In PyTorch's own operators


class Call(nn.Module):
    """A function as a module, whose parameters are its arguments."""

    def __init__(self, function, arguments):
        super().__init__()
        self.function, self.arguments = function, nn.ParameterList(arguments)

    def forward(self):
        return self.function(*self.arguments)


@pytest.mark.parametrize("name", CASES)
def test_decompositions(name):
    model = Call(*bound(name))
    program = torch.export.export(model, ())
    assert operators(program) >= {"regfast"} or name == "mse_loss weighted"
    program = program.run_decompositions()
    assert operators(program) == {"aten"}
    assert_close(program.module()(), model())


def test_an_op_can_be_kept_from_decomposing():
    program = torch.export.export(nn.Sequential(regfast.Linear(8, 4), nn.ReLU()), (spiky(2, 8),))
    table = torch.export.default_decompositions()
    del table[torch.ops.regfast.linear.default]
    assert "regfast" in operators(program.run_decompositions(table))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_compiled_code_keeps_the_ops(mode):
    seen = []

    def backend(module, inputs):
        def look(graph, inputs):
            seen.append(graph)
            return graph.forward

        return torch._dynamo.backends.common.aot_autograd(fw_compiler=look)(module, inputs)

    torch._dynamo.reset()
    layer, x = regfast.Linear(8, 4), spiky(2, 8)
    with mode():
        assert_close(torch.compile(layer, backend=backend)(x), layer(x))
    assert [operators(graph) for graph in seen] == [{"regfast"}]


def test_onnx():
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model, arguments = Model().eval(), (spiky(12, 20), class_targets((12,), 7, 0.2))
    exported = torch.onnx.export(model, arguments, dynamo=True, verbose=False).model_proto
    assert {function.domain for function in exported.functions} <= {"pkg.onnxscript.torch_lib.common"}
    names = [value.name for value in exported.graph.input]
    values = reference.ReferenceEvaluator(exported).run(
        None, {name: value.numpy() for name, value in zip(names, arguments, strict=True)}
    )
    for value, true in zip(values, model(*arguments), strict=True):
        assert_close(torch.as_tensor(value), true, rtol=1e-4, atol=1e-5)


class Layers(torch.nn.Module):
    """What the exporter that traces knows of ours."""

    def __init__(self, activation):
        super().__init__()
        self.layer = regfast.Linear(20, 7, activation=activation)

    def forward(self, x):
        z = self.layer(x)
        functions = regfast.softmax(z), regfast.log_softmax(z, 0), regfast.logsumexp(z, 1, True)
        return z, *functions, regfast.linear(z, self.layer.weight.t(), activation="silu")


@pytest.mark.parametrize("activation", regfast.reference.ACTIVATIONS)
@pytest.mark.filterwarnings("ignore")
def test_onnx_by_tracing(activation):
    reference = pytest.importorskip("onnx.reference")
    model, x, file = Layers(activation).eval(), spiky(12, 20), io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, verbose=False)
    exported = pytest.importorskip("onnx").load_model_from_string(file.getvalue())
    assert {node.domain for node in exported.graph.node} == {""}
    values = reference.ReferenceEvaluator(exported).run(None, {exported.graph.input[0].name: x.numpy()})
    for value, true in zip(values, model(x), strict=True):
        assert_close(torch.as_tensor(value), true, rtol=1e-4, atol=1e-5)
