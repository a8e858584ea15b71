"""The settings of every experiment. Imports nothing heavy, so that the command line can list defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


class Refusal(ValueError):
    """Options with which nothing can be done; the text is for the user, on one line."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of ``python -m odeblock train``; both networks share them.

    depth: L. dim: q. hidden_dim: m, ``dim`` if None. activation: σ. backward: strategy of the block.
    epochs: passes over the training set. batch_size: rows of a step. lr: learning rate of A and B; V and W
    get L times as much (gradient flow, see ``loop.make_optimizer``). seed: of the initial weights, the order
    of the data and the coefficient that is drawn; not of the train/test split, which is fixed.
    device: "cpu", "cuda" or "cuda:N". timing_rounds: steps timed for each of ours and the eager loop.
    """

    depth: int = 256
    dim: int = 64
    hidden_dim: int | None = None
    epochs: int = 30
    batch_size: int = 64
    lr: float = 0.05
    seed: int = 0
    device: str = "cpu"
    activation: str = "gelu"
    backward: str = "auto"
    timing_rounds: int = 11


QUICK: dict[str, Any] = {"depth": 16, "dim": 16, "epochs": 2, "timing_rounds": 3}
"""What ``--quick`` puts in place of the defaults: seconds instead of a minute."""


@dataclass(frozen=True)
class CifarConfig:
    """Settings of ``python -m odeblock train cifar10``: one convolutional network.

    depth: L. channels: of the maps. norm: "batch", batch normalisation of the stem and of every step, or
    "none", none at all. init: of V and W; by default "tied" with batch normalisation, which is the paper's
    smooth one, else "zero_v". activation: σ. backward: strategy of the block. epochs: passes over the
    training set. batch_size: images of a step, of all processes together. lr: largest learning rate.
    schedule: "cosine" or "onecycle"; by default the former with batch normalisation, else the latter.
    rates: "equal", lr for all parameters, or "flow", L times as much for those of the block (gradient flow);
    by default the former with batch normalisation, as in the authors' script, else the latter.
    weight_decay: of all parameters (of the block 1/L of it if ``rates`` are "flow"). precision: "float32";
    "bfloat16", of products, by autocast; or "float64". images: how many of the training set, None for all.
    seed: of the initial weights, the order of the images and their augmentation. device: "cpu", "cuda" or
    "cuda:N".
    """

    depth: int = 256
    channels: int = 16
    norm: str = "batch"
    init: str | None = None
    activation: str = "gelu"
    backward: str = "auto"
    epochs: int = 180
    batch_size: int = 64
    lr: float = 0.04
    schedule: str | None = None
    rates: str | None = None
    weight_decay: float = 5e-4
    precision: str = "float32"
    images: int | None = None
    seed: int = 0
    device: str = "cpu"

    def resolved(self) -> CifarConfig:
        """With what goes with ``norm`` in the place of None."""
        usual = CIFAR_DEFAULTS[self.norm]
        given = {key: value for key in usual if (value := getattr(self, key)) is not None}
        return replace(self, **{**usual, **given})


CIFAR_DEFAULTS: dict[str, dict[str, Any]] = {
    "batch": {"init": "tied", "schedule": "cosine", "rates": "equal"},
    "none": {"init": "zero_v", "schedule": "onecycle", "rates": "flow"},
}
CIFAR_QUICK: dict[str, Any] = {"depth": 4, "channels": 8, "epochs": 4, "images": 480}
SCHEDULES, RATES, PRECISIONS = ("cosine", "onecycle"), ("equal", "flow"), ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class BenchConfig:
    """Settings of ``python -m odeblock bench``: one block, forward and backward of a batch.

    depth: L. dim: q. hidden_dim: m, ``dim`` if None. batch_size: B. activation: σ. seed: of weights and
    batch. device: "cpu", "cuda" or "cuda:N". rounds: how often everything is timed.
    """

    depth: int = 256
    dim: int = 64
    hidden_dim: int | None = None
    batch_size: int = 64
    activation: str = "gelu"
    seed: int = 0
    device: str = "cpu"
    rounds: int = 11


BENCH_QUICK: dict[str, Any] = {"depth": 32, "dim": 16, "rounds": 3}


# ---- reproduce -------------------------------------------------------------------------------------------

POWERS = tuple(2**i for i in range(1, 11))


@dataclass(frozen=True)
class LipschitzConfig:
    """depths: L. dim: d = q. hidden_dim: m. samples: n. lr: a step of gradient descent is lr · L ∂R/∂Z.

    iterations: training times at which neighbours are compared. fit_from: L from which slopes are fitted.
    timing_rounds: iterations timed for each of ours and the Python loop. seed: of weights and data.
    """

    depths: tuple[int, ...] = POWERS
    dim: int = 16
    hidden_dim: int = 32
    samples: int = 100
    lr: float = 0.01
    iterations: tuple[int, ...] = (10, 50, 150, 500)
    fit_from: int = 16
    timing_rounds: int = 15
    seed: int = 0


@dataclass(frozen=True)
class ConvergenceConfig:
    """As ``LipschitzConfig``; reference: depth of the network that stands for the limit.

    iterations: of gradient descent. every: iterations between two comparisons.
    """

    depths: tuple[int, ...] = POWERS
    reference: int = 2**14
    dim: int = 16
    hidden_dim: int = 32
    samples: int = 100
    lr: float = 0.01
    iterations: int = 300
    every: int = 15
    fit_from: int = 16
    seed: int = 0


@dataclass(frozen=True)
class LongTimeConfig:
    """depth: L. dim: d = q. hidden_dim: m. samples: n. lr: as in ``LipschitzConfig``.

    target: loss at which training ends. iterations: after which it ends in any case. every: iterations
    between two records of loss and PL ratio. seed: of weights and data.
    """

    depth: int = 64
    dim: int = 16
    hidden_dim: int = 64
    samples: int = 50
    lr: float = 0.005
    target: float = 1e-6
    iterations: int = 100_000
    every: int = 50
    seed: int = 0


@dataclass(frozen=True)
class OverParameterisationConfig:
    """depth: L. dim: d, size of x and y. seed: the first of the seeds of weights and data.

    Of the PL constant: constant_samples: n. ratios: m/n. constant_seeds: over which medians are taken.
    floor: of n times the constant; the width that it takes is reported.

    Of training: samples: n. widths: of the block. seeds: networks of a cell, each trained at all ``rates``,
    of gradient descent in the theorem's normalisation. iterations: at most. target: loss, as a fraction of
    that at the start, at which training counts as successful and ends.
    """

    depth: int = 8
    dim: int = 8
    constant_samples: tuple[int, ...] = (8, 16, 32, 64, 128)
    ratios: tuple[float, ...] = (0.5, 1, 1.25, 1.5, 2, 2.5, 3, 4, 8, 16)
    constant_seeds: int = 20
    floor: float = 1e-2
    samples: tuple[int, ...] = (8, 16, 32, 64)
    widths: tuple[int, ...] = (4, 8, 16, 32, 64)
    seeds: int = 10
    rates: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    iterations: int = 1000
    target: float = 1e-2
    seed: int = 0


@dataclass(frozen=True)
class DigitsConfig:
    """Networks and training of ``TrainConfig``, for each activation from smooth and i.i.d. weights."""

    activations: tuple[str, ...] = ("gelu", "relu")
    depth: int = 256
    dim: int = 64
    epochs: int = 30
    batch_size: int = 64
    lr: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class CifarWeightsConfig:
    """networks: activation and initialisation of each. depth, channels, norm, epochs, batch_size, lr,
    precision, images: as ``CifarConfig`` has them. data: where CIFAR-10 lies; None if all networks are
    trained already; "generated" for a few images that are made up. seed: of weights and batches.
    """

    networks: tuple[tuple[str, str], ...] = (("gelu", "smooth"), ("gelu", "iid"), ("relu", "smooth"))
    depth: int = 256
    channels: int = 16
    norm: str = "batch"
    epochs: int = 180
    batch_size: int = 64
    lr: float = 0.04
    precision: str = "float32"
    images: int | None = None
    data: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class RefinementConfig:
    """shallow: L of the first phase. deep: L of the second, and of the network trained deep from the start.

    depths: at which the network trained at ``shallow`` is run. epochs: of all trainings. shallow_epochs: of
    the first phase. seeds: networks that are resampled, counted from ``seed``. dim, batch_size, lr: as
    ``TrainConfig``.
    """

    shallow: int = 32
    deep: int = 256
    depths: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    epochs: int = 30
    shallow_epochs: int = 20
    seeds: int = 3
    dim: int = 64
    batch_size: int = 64
    lr: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class AdjointErrorConfig:
    """depths: L. batch: B. dim: q = m. activation: σ. seeds: of weights and inputs, counted from ``seed``."""

    depths: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    batch: int = 16
    dim: int = 32
    activation: str = "gelu"
    seeds: int = 3
    seed: int = 0


ReproduceConfig = (
    LipschitzConfig
    | ConvergenceConfig
    | LongTimeConfig
    | OverParameterisationConfig
    | DigitsConfig
    | CifarWeightsConfig
    | RefinementConfig
    | AdjointErrorConfig
)


@dataclass(frozen=True)
class Listing:
    """What the command line knows of an experiment: a line about it, and settings, full and ``--quick``.

    small: whether its networks, also with full settings, are too small for a second thread to gain anything.
    """

    text: str
    config: ReproduceConfig
    quick: ReproduceConfig
    small: bool = False


EXPERIMENTS: dict[str, Listing] = {
    "large-depth-lipschitz": Listing(
        "neighbouring layers differ by O(1/L), at every time of training",
        LipschitzConfig(),
        LipschitzConfig(depths=POWERS[:8], iterations=(5, 20), timing_rounds=3),
    ),
    "large-depth-convergence": Listing(
        "weights converge to a function of depth like 1/L, at every time of training",
        ConvergenceConfig(),
        ConvergenceConfig(depths=POWERS[:8], reference=2**11, iterations=50, every=10),
    ),
    "long-time": Listing(
        "gradient descent goes on to a global minimum, with weights that stay smooth in depth",
        LongTimeConfig(),
        LongTimeConfig(iterations=1000, every=10),
        small=True,
    ),
    "over-parameterisation": Listing(
        "PL constant at the start, and success of training, by width and number of samples",
        OverParameterisationConfig(),
        OverParameterisationConfig(
            constant_samples=(8, 32),
            constant_seeds=5,
            samples=(8, 32),
            widths=(4, 16, 32),
            seeds=3,
            rates=(1.0, 4.0),
            iterations=200,
        ),
    ),
    "weights-on-digits": Listing(
        "weights along depth after training on real digits, smooth and i.i.d., GELU and ReLU",
        DigitsConfig(),
        DigitsConfig(depth=32, dim=16, epochs=3),
    ),
    "weights-on-cifar": Listing(
        "the same with convolutions, on CIFAR-10: --data DIR; with full settings for a GPU",
        CifarWeightsConfig(),
        CifarWeightsConfig(depth=16, channels=8, epochs=4, images=480, data="generated"),
    ),
    "depth-refinement": Listing(
        "train shallow, run deep; and train shallow first, then deep, against deep from the start",
        RefinementConfig(),
        RefinementConfig(
            shallow=16, deep=64, depths=(8, 16, 64, 128), epochs=4, shallow_epochs=2, seeds=1, dim=16
        ),
    ),
    "adjoint-error": Listing(
        "error of the gradient against L: our adjoint, that of 2022, and stored states",
        AdjointErrorConfig(),
        AdjointErrorConfig(depths=(16, 64, 256), seeds=1),
    ),
}
