"""Several outputs: a named tuple that travels between processes and files, and through torch's own tools."""

import copy
import io
import pickle
from itertools import permutations

import pytest
import torch
from torch.utils import _pytree
from util import class_targets, fresh_process, spiky

import regfast
from regfast import outputs

NAMES = ("loss", "lse", "entropy", "logprob", "argmax")
SEVERAL = [names for count in range(2, 6) for names in permutations(NAMES, count)]
X, W, T = spiky(6, 5), spiky(7, 5), class_targets((6,), 5, 0.2)


def same(got, true):
    assert type(got) is type(true) and got._fields == true._fields
    assert all(torch.equal(a, b) for a, b in zip(got, true, strict=True))


def test_each_choice_in_each_order_is_a_type_that_pickles():
    for names in SEVERAL:
        cls = outputs.select_outputs("cross_entropy", names)[1]
        value = cls(*range(len(names)))
        assert type(pickle.loads(pickle.dumps(value))) is cls and copy.copy(value) == value
        assert cls._fields == names and cls.__name__ == "CrossEntropyOutput"
        assert [getattr(value, name) for name in names] == list(range(len(names)))
    assert len({outputs.select_outputs("cross_entropy", names)[1] for names in SEVERAL}) == len(SEVERAL) == 320


def test_it_is_a_named_tuple():
    value = regfast.cross_entropy(X, T, outputs=("argmax", "loss"))
    loss, argmax = value.loss, value.argmax
    assert value[0] is argmax and value[1] is loss and value == (argmax, loss) and len(value) == 2
    assert repr(value) == f"CrossEntropyOutput(argmax={argmax!r}, loss={loss!r})"
    assert value._asdict() == {"argmax": argmax, "loss": loss}
    assert value._replace(loss=1) == (argmax, 1) and type(value)._make([1, 2]) == type(value)(1, loss=2) == (1, 2)
    assert type(value)([1, 2]) == (1, 2)  # from one iterable, as torch's own named results
    for wrong in ((1, 2, 3), (), (3,)):
        with pytest.raises(TypeError):
            type(value)(*wrong)
    for wrong in ({"lse": 1}, {"argmax": 1}, {"loss": 1, "lse": 2}):
        with pytest.raises(TypeError, match=r"regfast\.CrossEntropyOutput: values: expected argmax, loss, got"):
            type(value)(**wrong)
    match value:
        case type(argmax=first):
            assert first is argmax


def test_files():
    for value in (
        regfast.cross_entropy(X, T, outputs=("lse", "loss")),
        regfast.linear_cross_entropy(X, W, T, outputs=NAMES),
    ):
        file = io.BytesIO()
        torch.save({"out": value}, file)
        for weights_only in (True, False):
            file.seek(0)
            same(torch.load(file, weights_only=weights_only)["out"], value)
        same(copy.deepcopy(value), value)
        same(pickle.loads(pickle.dumps(value)), value)


def test_other_processes(tmp_path):
    # Neither process has asked for these names when the tuple comes; it is read with torch's defaults.
    fresh_process(
        f"""
        import torch, regfast, torch.multiprocessing as mp

        def work(queue):
            torch.set_num_threads(1)
            x = torch.arange(12.0).view(3, 4)
            queue.put(regfast.cross_entropy(x, torch.tensor([0, 1, 2]), outputs=("entropy", "loss", "argmax")))
            queue.get()

        if __name__ == "__main__":
            context = mp.get_context("fork")
            there = context.Queue()
            process = context.Process(target=work, args=(there,))
            process.start()
            value = there.get(timeout=60)
            assert type(value)._fields == ("entropy", "loss", "argmax") and value.argmax.tolist() == [3, 3, 3]
            torch.save(value, {str(tmp_path / "value.pt")!r})
            there.put(None)
            process.join()
        """
    )
    fresh_process(
        f"""
        import torch, regfast
        value = torch.load({str(tmp_path / "value.pt")!r})
        assert value._fields == ("entropy", "loss", "argmax") and value.argmax.tolist() == [3, 3, 3]
        """
    )


def test_export_to_a_file(tmp_path):
    loss = regfast.CrossEntropyLoss(outputs=("loss", "argmax"))
    program = torch.export.export(loss, (X, T))
    torch.export.save(program, tmp_path / "loss.pt2")
    same(torch.export.load(tmp_path / "loss.pt2").module()(X, T), loss(X, T))
    names = fresh_process(
        f"""
        import torch, regfast
        out = torch.export.load({str(tmp_path / "loss.pt2")!r}).module()(torch.randn(6, 5), torch.arange(6) % 5)
        print(type(out).__name__, out._fields)
        """
    )
    assert "CrossEntropyOutput ('loss', 'argmax')" in names


def test_compile():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        value = regfast.cross_entropy(x * 2, T, outputs=("lse", "loss", "argmax"))
        return value, value.loss + value[0].sum(), value._replace(loss=value.loss * 2)

    value, total, twice = step(X)
    true = regfast.cross_entropy(X * 2, T, outputs=("lse", "loss", "argmax"))
    same(value, true)
    same(twice, true._replace(loss=true.loss * 2))
    torch.testing.assert_close(total, true.loss + true.lse.sum())


def test_trees():
    value = regfast.cross_entropy(X, T, outputs=("loss", "lse"))
    leaves, spec = _pytree.tree_flatten(value)
    same(_pytree.tree_unflatten(leaves, spec), value)
    assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec
    same(_pytree.tree_map(lambda t: t * 2, value), type(value)(value.loss * 2, value.lse * 2))
    paths = [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(value)[0]]
    assert paths == [".loss", ".lse"]
