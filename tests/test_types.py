"""The types that users see: names are those of the kernels, and tests/typed_use.py uses everything there is.

`make types` has mypy and pyright check the package and that file; here it runs."""

import ast
from pathlib import Path
from typing import get_args

import torch
import typed_use

import regfast
from regfast import _C, _extension, reference, types


def test_names_are_those_of_the_kernels():
    assert get_args(types.Activation) == _C.ACTIVATIONS == tuple(reference.ACTIVATIONS)
    assert get_args(types.Family) == reference.LIKELIHOODS
    assert get_args(types.Reduction) == reference.REDUCTIONS
    assert get_args(types.Output) == reference.OUTPUTS


def test_the_stub_of_the_extension_has_its_names():
    stub = ast.parse((Path(regfast.__file__).parent / "_C.pyi").read_text())
    named = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    named |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert named == {name for name in vars(_C) if not name.startswith("_")}
    fields = next(node for node in stub.body if isinstance(node, ast.ClassDef) and node.name == "BuildInfo").body
    assert [field.target.id for field in fields] == list(_C.build_info())
    assert list(_extension.BuildInfo.__annotations__) == list(regfast.build_info())


def test_the_users_file_uses_everything():
    used = {node.attr for node in ast.walk(ast.parse(Path(typed_use.__file__).read_text())) if hasattr(node, "attr")}
    used |= set(regfast.distributed.__all__) & set(vars(typed_use))
    assert {*regfast.__all__, *regfast.distributed.__all__} - {"distributed"} <= used


def test_right_uses_run():
    typed_use.right_uses()


def test_several_outputs_are_of_the_class_that_annotations_name():
    out = regfast.cross_entropy(torch.randn(2, 3), torch.tensor([0, 2]), outputs=("lse", "loss"))
    assert isinstance(out, regfast.CrossEntropyOutput)
    assert not isinstance((1, 2), regfast.CrossEntropyOutput)
