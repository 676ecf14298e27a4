"""The examples, run as a user runs them, in a short setting."""

import importlib.util
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)


def train(script: str, figure: Path, *options) -> str:
    """What the script prints, after checking what holds for both: it ends well, draws, and the losses agree."""
    done = run(EXAMPLES / script, "--figure", figure, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert figure.read_bytes().startswith(PNG)
    differences = re.findall(r"relative difference of loss after training: (\S+)", done.stdout)
    assert differences and all(float(difference) < 1e-4 for difference in differences), done.stdout
    return done.stdout


def last_epoch(output: str) -> list[float]:
    """The table's last row: the epoch, then each figure for PyTorch and for regfast."""
    row = re.findall(r"^│ +\d+ │.*│$", output, re.MULTILINE)[-1]
    return [float(cell) for cell in row.strip("│").split("│")]


def test_linear_regression(tmp_path):
    output = train("linear_regression.py", tmp_path / "figure.png", "--diabetes-epochs", 10)
    w1, w2, b = map(float, re.search(r"regfast: +(\S+) +(\S+) +(\S+)", output).groups())
    assert (w1, w2, b) == pytest.approx((2, -3.4, 4.2), abs=0.01)
    # Of each data set: PyTorch's, regfast's and the learned sigma's likelihood and sigma.
    rows = re.findall(r"^ *(PyTorch|regfast|regfast, sigma learned) +(-?[\d.]+) +([\d.]+)$", output, re.MULTILINE)
    assert [name for name, *_ in rows] == ["PyTorch", "regfast", "regfast, sigma learned"] * 2
    for i, noise in ((0, 0.01), (3, None)):
        (stock, s), (ours, o), (most, learned) = (tuple(map(float, row[1:])) for row in rows[i : i + 3])
        assert ours == pytest.approx(stock, rel=1e-3) and o == pytest.approx(s, rel=1e-3)
        assert most >= ours - 0.1 and learned == pytest.approx(o, rel=0.05)
        assert noise is None or learned == pytest.approx(noise, rel=0.1)
    *_, stock_r2, our_r2 = last_epoch(output)
    assert our_r2 == pytest.approx(stock_r2, abs=1e-4) and our_r2 > 0.4


@pytest.mark.parametrize("options", [(), ("--workers", 0, "--resize", 12)], ids=["as it is", "resized, no workers"])
def test_softmax_regression_on_digits(tmp_path, options):
    output = train("softmax_regression.py", tmp_path / "figure.png", "--epochs", 10, *options)
    epoch, *_, stock_accuracy, our_accuracy = last_epoch(output)
    assert epoch == 10
    dense, phm = re.findall(r"^(?:dense|PHM, n = 2) +(\d+) +([\d.]+)$", output, re.MULTILINE)
    assert float(dense[1]) == pytest.approx(our_accuracy, abs=1e-4)
    # Half of the weights, eight numbers of the table, ten of the bias; far better than a guess after ten epochs.
    assert int(phm[0]) == (int(dense[0]) - 10) // 2 + 8 + 10
    assert float(phm[1]) > 0.7
    assert our_accuracy == pytest.approx(stock_accuracy, abs=0.01)  # rounding may turn a tie
    assert our_accuracy > 0.8


def write_idx(path: Path, values: torch.Tensor) -> None:
    """The format of MNIST: zero, zero, 8 for unsigned bytes, the number of dimensions, the sizes, the values."""
    header = struct.pack(f">4B{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    path.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="the Fashion-MNIST path of the example reads its data with torchvision, which is not installed",
)
@pytest.mark.parametrize("options", [(), ("--resize", 14)], ids=["as it is", "resized"])
def test_softmax_regression_on_fashion_mnist(tmp_path, options):
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, rows in (("train", 1000), ("t10k", 200)):
        labels = torch.arange(rows) % 10
        images = torch.randint(0, 100, (rows, 28, 28))
        for label in range(10):  # a class is where its bright stripe lies
            images[labels == label, 2 * label : 2 * label + 3] += 120
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)

    data = ("--data", "fashion-mnist", "--root", tmp_path / "data", "--epochs", 3)
    output = train("softmax_regression.py", tmp_path / "figure.png", *data, *options)
    *_, stock_accuracy, our_accuracy = last_epoch(output)
    assert our_accuracy == pytest.approx(stock_accuracy, abs=0.01)  # rounding may turn a tie
    assert our_accuracy > 0.8


@pytest.mark.parametrize("options", [(), ("--tied",)], ids=["free", "tied"])
def test_next_token(tmp_path, options):
    small = ("--tokens", 20000, "--vocabulary", 1000, "--batch-size", 64, "--steps", 10, "--chunked-steps", 1)
    output = train("next_token.py", tmp_path / "figure.png", *small, *options)
    _, stock, *_, ours = re.findall(r"^│ +10 │.*│$", output, re.MULTILINE)[-1].strip("│").split("│")
    assert float(ours) == pytest.approx(float(stock), rel=1e-4)
    assert float(ours) < math.log(1000), "no better than a guess"
    assert re.search(r"^│ memory of a step.* \d+ │$", output, re.MULTILINE), output


def test_vocab_parallel(tmp_path):
    small = ("--tokens", 20000, "--vocabulary", 1001, "--batch-size", 64, "--steps", 5, "--budget", 100_000)
    output = train("vocab_parallel.py", tmp_path / "figure.png", *small)
    _, one, two = re.findall(r"^│ +5 .*│.*│$", output, re.MULTILINE)[-1].strip("│").split("│")
    assert float(two) == pytest.approx(float(one), rel=1e-4)
    assert float(two) < math.log(1001), "no better than a guess"
    assert re.search(r"^│ one step, median \(s\) .*\d+\.\d+ +│ +\d+\.\d+ +│ +\d+\.\d+ +│$", output, re.MULTILINE), (
        output
    )


def test_unmodified_llama(tmp_path):
    small = ("--tokens", 5000, "--vocabulary", 500, "--length", 32, "--features", 32, "--steps", 3)
    output = train("unmodified_llama.py", tmp_path / "figure.png", *small)
    assert len(re.findall(r"│ +\d+\.\d+ +│ +\d+\.\d+x +│ +\d+ +│ +[\d.]+ +│", output)) == 8


def test_losses_that_differ_are_an_error(tmp_path):
    code = f"""
import runpy, sys, torch, regfast
regfast.linear_mse_loss = lambda x, w, y, b: torch.nn.functional.l1_loss(x @ w.T + b, y)
sys.path.insert(0, {str(EXAMPLES)!r})
sys.argv = ["linear_regression.py", "--diabetes-epochs", "1", "--figure", {str(tmp_path / "figure.png")!r}]
runpy.run_path({str(EXAMPLES / "linear_regression.py")!r}, run_name="__main__")
"""
    done = run("-c", code)
    assert done.returncode != 0
    assert "differ by more than rounding" in done.stderr


def test_the_demo_runs_every_example(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo

    assert set(demo.EXAMPLES) == {path.name for path in EXAMPLES.glob("*.py")} - {"demo.py", "common.py"}
    # Of programs that take the processor and nothing else, it counts what they take as theirs.
    for name, seconds in {"first.py": 0.0, "second.py": 0.3}.items():
        (tmp_path / name).write_text(f"import time\nwhile time.process_time() < {seconds}: pass")
    before = demo.used_by_examples()
    monkeypatch.setattr(demo, "HERE", tmp_path)
    monkeypatch.setattr(demo, "EXAMPLES", {"first.py": (), "second.py": ()})
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    monkeypatch.setattr(demo.psutil, "cpu_percent", lambda interval: 100.0)
    assert demo.main() == 0
    assert f"Other programs use {demo.psutil.cpu_count():.1f} CPUs" in capfd.readouterr().out
    assert demo.used_by_examples() - before > 0.3
    monkeypatch.setattr(demo.psutil, "cpu_percent", lambda interval: 1.0)
    assert demo.main() == 0
    assert "Other programs use " not in capfd.readouterr().out
    (tmp_path / "first.py").write_text("raise SystemExit(3)")
    assert demo.main() == 3
