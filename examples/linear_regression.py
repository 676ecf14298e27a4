"""Linear regression, trained twice from the same seed: with stock PyTorch and with regfast.

First the notes' model, 2 inputs -> 1 output, on y = Xw + b + noise with w = (2, -3.4), b = 4.2; then the diabetes
data that ships with scikit-learn. Prints both trainings side by side, saves a picture of the curves and exits with
an error if the losses after training differ by more than rounding.
"""

from __future__ import annotations

import argparse
import functools
from types import ModuleType

import torch
from common import FIGURES, Run, loader, parser, plot, report, train_both
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import TensorDataset

TRUE_W, TRUE_B = (2.0, -3.4), 4.2
NOISE = 0.01


def synthetic(rows: int, seed: int) -> TensorDataset:
    """y = Xw + b + e with X and e normal; e has the standard deviation NOISE."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, len(TRUE_W), generator=random)
    noise = NOISE * torch.randn(rows, 1, generator=random)
    return TensorDataset(x, x @ torch.tensor([TRUE_W]).T + TRUE_B + noise)


def diabetes(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Four fifths of the 442 patients to train on and one to test, standardised by the training part."""
    columns = (torch.as_tensor(data, dtype=torch.float32) for data in load_diabetes(return_X_y=True))
    x, y = (data.reshape(len(data), -1) for data in columns)
    train, test = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split([354, 88])
    x, y = ((data - data[train].mean(0)) / data[train].std(0) for data in (x, y))
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def build(layers: ModuleType, inputs: int) -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(layers.Linear(inputs, 1)), layers.MSELoss()


def train(data: TensorDataset, evaluate, epochs: int, lr: float, args: argparse.Namespace) -> dict[str, Run]:
    return train_both(
        functools.partial(build, inputs=data.tensors[0].shape[1]),
        lambda: loader(data, args.batch_size, seed=args.seed, shuffle=True),
        evaluate,
        epochs=epochs,
        lr=lr,
        seed=args.seed,
    )


def train_synthetic(args: argparse.Namespace) -> dict[str, Run]:
    data = synthetic(args.rows, args.seed)
    x, y = data.tensors

    def evaluate(model, loss):
        return {"loss on all data": loss(model(x), y).item()}

    return train(data, evaluate, args.epochs, args.lr, args)


def train_diabetes(args: argparse.Namespace) -> dict[str, Run]:
    data, test = diabetes(args.seed)
    x, y = test.tensors

    def evaluate(model, loss):
        test_loss = loss(model(x), y).item()
        return {"test loss": test_loss, "test R²": 1 - test_loss / y.var(correction=0).item()}

    return train(data, evaluate, args.diabetes_epochs, args.diabetes_lr, args)


def main() -> None:
    options = parser(__doc__.partition("\n")[0], batch_size=10)
    options.add_argument("--rows", type=int, default=1000, help="of the synthetic data; default: %(default)s")
    options.add_argument("--epochs", type=int, default=3, help="on the synthetic data; default: %(default)s")
    options.add_argument("--lr", type=float, default=0.03, help="learning rate there; default: %(default)s")
    options.add_argument("--diabetes-epochs", type=int, default=30, help="default: %(default)s")
    options.add_argument("--diabetes-lr", type=float, default=0.003, help="default: %(default)s")
    args = options.parse_args()

    trainings = {"y = Xw + b + noise": train_synthetic(args), "diabetes": train_diabetes(args)}
    agree = [report(title, runs) for title, runs in trainings.items()]
    print(f"true w, b:  {TRUE_W[0]:.4f} {TRUE_W[1]:.4f}  {TRUE_B:.4f}")
    for name, run in trainings["y = Xw + b + noise"].items():
        (w1, w2), b = run.model[0].weight[0].tolist(), run.model[0].bias.item()
        print(f"{name:>9}:  {w1:.4f} {w2:.4f}  {b:.4f}")
    plot(args.figure or FIGURES / "linear_regression.png", trainings)
    if not all(agree):
        raise SystemExit("the losses of PyTorch and regfast differ by more than rounding")


if __name__ == "__main__":
    main()
