"""Weights along depth after training on real digits, from smooth and from i.i.d. weights, for GELU and ReLU.

The counterpart, on the digits of scikit-learn, of what the paper does on CIFAR-10. The training is that of
``python -m odeblock train``.
"""

from __future__ import annotations

from functools import partial

from matplotlib.figure import Figure

from .config import DigitsConfig, TrainConfig
from .digits import load_digits
from .loop import Training
from .networks import along_depth, build_network, random_coefficients
from .plots import coefficient_figure
from .reproduce import Part, Results, Run, Summary
from .style import TITLES

NAMES = {"gelu": "GELU", "relu": "ReLU"}


def parts(config: DigitsConfig) -> list[Part]:
    return [
        Part(f"{activation}-{init}", config.epochs, partial(train, config, activation, init))
        for activation in config.activations
        for init in TITLES
    ]


def train(config: DigitsConfig, activation: str, init: str, run: Run) -> Results:
    """history: as ``loop.Training`` has it, after each epoch; coefficients: as ``plots`` wants them."""
    settings = TrainConfig(
        depth=config.depth,
        dim=config.dim,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        seed=config.seed,
        activation=activation,
    )
    training = Training(build_network(settings, init), load_digits(), settings)
    indices = random_coefficients(config.dim, config.dim, config.seed)
    initial = along_depth(training.network.block, indices)
    for _ in range(config.epochs):
        training.epoch(lambda loss: None)
        training.record()
        run.advance(1)
    trained = along_depth(training.network.block, indices)
    coefficients = {
        name: {"index": index, "initial": initial[name], "trained": trained[name]}
        for name, index in indices.items()
    }
    return {"history": training.history, "coefficients": coefficients}


def summarise(config: DigitsConfig, results: dict[str, Results]) -> Summary:
    rows, findings = [], {}
    for activation in config.activations:
        for init, title in TITLES.items():
            history = results[f"{activation}-{init}"]["history"]
            rows += [
                {
                    "activation": activation,
                    "init": init,
                    **{key: entry[key] for key in ("epoch", "train_loss", "train_accuracy", "test_accuracy")},
                    **{f"{name}_{key}": entry[name][key] for name in ("V", "W") for key in entry[name]},
                }
                for entry in history
            ]
            last, first = history[-1], history[0]
            what = f"{NAMES.get(activation, activation)}, {title}"
            findings[f"train, test accuracy, %: {what}"] = " ".join(
                f"{100 * last[f'{part}_accuracy']:.1f}" for part in ("train", "test")
            )
            findings[f"L max|ΔV|, L max|ΔW|, a typical coefficient, start -> trained: {what}"] = ", ".join(
                f"{first[name]['max']:.3g} -> {last[name]['max']:.3g}" for name in ("V", "W")
            )
    return Summary({"weights-on-digits": _figure(config, results)}, rows, findings)


def _figure(config: DigitsConfig, results: dict[str, Results]) -> Figure:
    return coefficient_figure(
        {
            NAMES.get(activation, activation): {
                init: results[f"{activation}-{init}"]["coefficients"] for init in TITLES
            }
            for activation in config.activations
        }
    )
