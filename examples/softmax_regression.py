"""Softmax regression, trained twice from the same seed: with stock PyTorch and with regfast.

By default on the 8x8 handwritten digits that ship with scikit-learn, so that nothing is downloaded; with
`--data fashion-mnist` on Fashion-MNIST, 784 inputs -> 10 classes, through torchvision. Prints both trainings side by
side, saves a picture of the curves and exits with an error if the losses after training differ by more than rounding.
Then trains the same model with a PHMLinear of half the weights, and compares parameters and accuracy.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import torch
from common import FIGURES, Run, loader, parser, plot, report, train_both
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

import regfast

CLASSES = 10
PHM = 2  # divides the classes: a PHMLinear has about half of the dense layer's weights
EPOCHS = {"digits": 30, "fashion-mnist": 10}
LEARNING_RATE = {"digits": 0.5, "fashion-mnist": 0.1}


def digits(resize: int | None) -> tuple[Dataset, Dataset]:
    """1,797 images of 8x8 pixels, scaled to [0, 1]; the last fifth, written by other people, is the test set."""
    pixels, labels = (torch.as_tensor(data) for data in load_digits(return_X_y=True))
    images = pixels.float().reshape(-1, 1, 8, 8) / 16
    if resize:
        images = nn.functional.interpolate(images, (resize, resize), mode="bilinear", antialias=True)
    cut = len(images) * 4 // 5
    return TensorDataset(images[:cut], labels[:cut]), TensorDataset(images[cut:], labels[cut:])


def fashion_mnist(root: Path, resize: int | None) -> tuple[Dataset, Dataset]:
    """60,000 and 10,000 images of 28x28 pixels, scaled to [0, 1]; downloaded unless they are under root."""
    from torchvision import datasets, transforms  # only this data set needs torchvision

    steps = [transforms.Resize((resize, resize))] if resize else []
    steps.append(transforms.ToTensor())
    make = functools.partial(datasets.FashionMNIST, root, transform=transforms.Compose(steps), download=True)
    return make(train=True), make(train=False)


def build(layers: ModuleType, inputs: int) -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(nn.Flatten(), layers.Linear(inputs, CLASSES)), layers.CrossEntropyLoss()


def evaluate(model: nn.Module, loss: nn.Module, batches: DataLoader) -> dict[str, float]:
    """Mean loss and share of right answers over the test set."""
    rows = right = 0
    total = 0.0
    for images, labels in batches:
        logits = model(images)
        total += loss(logits, labels).item() * len(labels)
        right += (logits.argmax(1) == labels).sum().item()
        rows += len(labels)
    return {"test loss": total / rows, "test accuracy": right / rows}


def train_phm(inputs: int, batches: DataLoader, *, epochs: int, lr: float, seed: int) -> Run:
    """The model with a PHMLinear for its layer: on the same batches, by the same optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), regfast.PHMLinear(inputs, CLASSES, PHM))
    run = Run("PHM", model, regfast.CrossEntropyLoss(), batches, torch.optim.SGD(model.parameters(), lr))
    with tqdm(total=epochs * len(batches), desc=run.name, unit="batch", disable=None) as progress:
        for _ in range(epochs):
            run.epoch(progress)
    return run


def by_data(defaults: dict[str, float]) -> str:
    return ", ".join(f"{value} for {data}" for data, value in defaults.items())


def main() -> None:
    options = parser(__doc__.partition("\n")[0], batch_size=256)
    options.add_argument("--data", choices=tuple(EPOCHS), default="digits", help="default: %(default)s")
    options.add_argument("--epochs", type=int, help=f"default: {by_data(EPOCHS)}")
    options.add_argument("--lr", type=float, help=f"learning rate of SGD; default: {by_data(LEARNING_RATE)}")
    options.add_argument("--resize", type=int, metavar="PIXELS", help="side of the images; as they are if not given")
    options.add_argument(
        "--root", type=Path, default=Path("data"), help="folder of Fashion-MNIST; default: %(default)s"
    )
    options.add_argument(
        "--workers", type=int, default=2, help="processes that load batches; 0: none but this one; default: %(default)s"
    )
    args = options.parse_args()

    train, test = digits(args.resize) if args.data == "digits" else fashion_mnist(args.root, args.resize)
    test_batches = loader(test, args.batch_size, workers=args.workers)
    inputs = train[0][0].numel()
    batches = functools.partial(loader, train, args.batch_size, seed=args.seed, shuffle=True, workers=args.workers)
    options = {
        "epochs": args.epochs or EPOCHS[args.data],
        "lr": args.lr or LEARNING_RATE[args.data],
        "seed": args.seed,
    }
    runs = train_both(
        functools.partial(build, inputs=inputs), batches, functools.partial(evaluate, batches=test_batches), **options
    )
    agree = report(args.data, runs)
    print("layer          parameters  test accuracy")
    for name, run in (("dense", runs["regfast"]), (f"PHM, n = {PHM}", train_phm(inputs, batches(), **options))):
        with torch.no_grad():
            accuracy = evaluate(run.model, run.loss, test_batches)["test accuracy"]
        print(f"{name:<13}  {sum(p.numel() for p in run.model.parameters()):10}  {accuracy:13.4f}")
    plot(args.figure or FIGURES / f"softmax_regression_{args.data}.png", {args.data: runs})
    if not agree:
        raise SystemExit("the losses of PyTorch and regfast differ by more than rounding")


if __name__ == "__main__":
    main()
