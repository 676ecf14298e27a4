"""Linear regression, trained twice from the same seed: with stock PyTorch and with regfast.

First a model of 2 inputs -> 1 output, on y = Xw + b + noise with w = (2, -3.4), b = 4.2; then the diabetes
data that ships with scikit-learn. Prints both trainings side by side and how likely their models make the data, saves
a picture of the curves and exits with an error if the losses after training differ by more than rounding.
"""

from __future__ import annotations

import argparse
import functools
import math
from types import ModuleType

import torch
from common import FIGURES, Run, loader, loss_of, parser, plot, report, train_both
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import TensorDataset

import regfast

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


class LeastSquares(nn.Module):
    """A linear layer that takes its targets too: predictions, loss and gradients from one read of the inputs."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 1)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return regfast.linear_mse_loss(inputs, self.linear.weight, targets, self.linear.bias)


def build(layers: ModuleType, inputs: int) -> tuple[nn.Module, nn.Module | None]:
    return (LeastSquares(inputs), None) if layers is regfast else (nn.Linear(inputs, 1), nn.MSELoss())


def layer_of(model: nn.Module) -> nn.Linear:
    return next(layer for layer in model.modules() if isinstance(layer, nn.Linear))


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
        return {"loss on all data": loss_of(model, loss, x, y).item()}

    return train(data, evaluate, args.epochs, args.lr, args)


def train_diabetes(args: argparse.Namespace) -> dict[str, Run]:
    data, test = diabetes(args.seed)
    x, y = test.tensors

    def evaluate(model, loss):
        test_loss = loss_of(model, loss, x, y).item()
        return {"test loss": test_loss, "test R²": 1 - test_loss / y.var(correction=0).item()}

    return train(data, evaluate, args.diabetes_epochs, args.diabetes_lr, args)


def learn_sigma(x: torch.Tensor, y: torch.Tensor) -> regfast.LinearNLLLoss:
    """Maximum likelihood of weights, bias and the noise's standard deviation together."""
    model = regfast.LinearNLLLoss(x.shape[1], 1, family="gaussian", sigma="learned")
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def negative_log_likelihood() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(x, y)
        value.backward()
        return value

    optimizer.step(negative_log_likelihood)
    return model


@torch.no_grad()
def print_likelihoods(data: TensorDataset, runs: dict[str, Run], noise: float | None) -> None:
    """Of the training data under each model, and the standard deviation that the residuals have.

    Least squares are a Gaussian's maximum likelihood: its sigma^2 is the mean squared residual.
    """
    x, y = data.tensors
    print(f"{'':>23}  log-likelihood   sigma{'' if noise is None else f'  (true: {noise})'}")
    for name, run in runs.items():
        sigma = (layer_of(run.model)(x) - y).square().mean().sqrt().item()
        likelihood = -len(y) * (math.log(sigma) + 0.5 * math.log(2 * math.pi) + 0.5)
        print(f"{name:>23}  {likelihood:14.1f}  {sigma:.5f}")
    with torch.enable_grad():
        fitted = learn_sigma(x, y)
    print(f"{'regfast, sigma learned':>23}  {-len(y) * fitted(x, y).item():14.1f}  {fitted.sigma.item():.5f}\n")


def main() -> None:
    options = parser(__doc__.partition("\n")[0], batch_size=10)
    options.add_argument("--rows", type=int, default=1000, help="of the synthetic data; default: %(default)s")
    options.add_argument("--epochs", type=int, default=3, help="on the synthetic data; default: %(default)s")
    options.add_argument("--lr", type=float, default=0.03, help="learning rate there; default: %(default)s")
    options.add_argument("--diabetes-epochs", type=int, default=30, help="default: %(default)s")
    options.add_argument("--diabetes-lr", type=float, default=0.003, help="default: %(default)s")
    args = options.parse_args()

    trainings, agree = {}, []
    for title, train_on, data, noise in (
        ("y = Xw + b + noise", train_synthetic, synthetic(args.rows, args.seed), NOISE),
        ("diabetes", train_diabetes, diabetes(args.seed)[0], None),
    ):
        trainings[title] = train_on(args)
        agree.append(report(title, trainings[title]))
        print_likelihoods(data, trainings[title], noise)
    print(f"true w, b:  {TRUE_W[0]:.4f} {TRUE_W[1]:.4f}  {TRUE_B:.4f}")
    for name, run in trainings["y = Xw + b + noise"].items():
        (w1, w2), b = layer_of(run.model).weight[0].tolist(), layer_of(run.model).bias.item()
        print(f"{name:>9}:  {w1:.4f} {w2:.4f}  {b:.4f}")
    plot(args.figure or FIGURES / "linear_regression.png", trainings)
    if not all(agree):
        raise SystemExit("the losses of PyTorch and regfast differ by more than rounding")


if __name__ == "__main__":
    main()
