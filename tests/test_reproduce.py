"""The experiments of ``reproduce``, and ``bench``: files, laws, determinism, interruption, refusals."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from odeblock.__main__ import main
from odeblock.experiments.config import (
    BENCH_QUICK,
    EXPERIMENTS,
    AdjointErrorConfig,
    BenchConfig,
    CifarWeightsConfig,
    ConvergenceConfig,
    DigitsConfig,
    LipschitzConfig,
    LongTimeConfig,
    OverParameterisationConfig,
    RefinementConfig,
    Refusal,
    ReproduceConfig,
    TrainConfig,
)

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import matplotlib.image

import odeblock
from odeblock.experiments import (
    adjoint_error,
    bench,
    over_parameterisation,
    reproduce,
    speed,
    style,
    synthetic,
)
from odeblock.experiments import outputs as outputs_module
from odeblock.experiments.digits import load_digits
from odeblock.experiments.loop import Training
from odeblock.experiments.networks import build_network

SMALL: dict[str, ReproduceConfig] = {
    "large-depth-lipschitz": LipschitzConfig(
        depths=(16, 32, 64), iterations=(3, 12), samples=20, timing_rounds=1
    ),
    "large-depth-convergence": ConvergenceConfig(
        depths=(16, 32, 64), reference=1024, samples=20, iterations=12, every=6
    ),
    "long-time": LongTimeConfig(
        depth=8, dim=4, hidden_dim=16, samples=3, lr=0.05, iterations=2000, target=1e-2, every=1
    ),
    "over-parameterisation": OverParameterisationConfig(
        depth=4,
        constant_samples=(6, 12),
        ratios=(0.5, 1, 4),
        constant_seeds=3,
        samples=(6, 12),
        widths=(4, 16),
        seeds=2,
        rates=(1.0, 4.0),
        iterations=100,
    ),
    "weights-on-digits": DigitsConfig(depth=8, dim=8, epochs=1),
    "weights-on-cifar": CifarWeightsConfig(depth=4, channels=4, epochs=1, images=160, data="generated"),
    "depth-refinement": RefinementConfig(
        shallow=8, deep=16, depths=(4, 8, 32), epochs=2, shallow_epochs=1, seeds=1, dim=8
    ),
    "adjoint-error": AdjointErrorConfig(depths=(64, 256), seeds=1, batch=4, dim=8),
}
FIGURES = {
    "large-depth-convergence": {"large-depth-convergence", "large-depth-convergence-rate"},
    "long-time": {"long-time", "long-time-weights"},
    "depth-refinement": {"depth-refinement", "depth-resampling"},
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small run of an experiment, made when it is first asked for."""
    folders: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            assert reproduce.reproduce(name, SMALL[name], folder) == 0
            folders[name] = folder
        return folders[name]

    return run


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


# ---- every experiment ------------------------------------------------------------------------------------


def test_every_experiment_is_tested() -> None:
    assert list(SMALL) == list(EXPERIMENTS)
    for name, listing in EXPERIMENTS.items():
        assert type(listing.config) is type(listing.quick) is type(SMALL[name])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_files(name: str, outputs: Callable[[str], Path]) -> None:
    folder = outputs(name)
    figures = FIGURES.get(name, {name})
    pictures = {f"{figure}.{ending}" for figure in figures for ending in ("pdf", "png")}
    runs = {"runs"} if name == "weights-on-cifar" else set()
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.json",
        f"{name}.csv",
        "parts",
        *pictures,
        *runs,
    }
    for figure in figures:
        assert (folder / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        image = matplotlib.image.imread(folder / f"{figure}.png")[..., :3]
        assert image.shape[1] > 1500
        colourful = image.max(2) - image.min(2) > 0.3
        assert colourful.sum() > 1000
    found = read(folder, name)
    assert found["experiment"] == name
    assert found["config"] == json.loads(json.dumps(asdict(SMALL[name])))
    assert found["versions"]["torch"] == torch.__version__
    assert found["findings"]
    stored = {path.name.rpartition("-")[0] for path in (folder / "parts").iterdir()}
    assert stored == set(found["parts"])
    with (folder / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(None not in row for row in rows)


def column(folder: Path, name: str, key: str, **where: str) -> list[float]:
    with (folder / f"{name}.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if all(row[k] == v for k, v in where.items())]
    return [float(row[key]) for row in rows]


def test_neighbours_differ_like_one_over_the_depth(outputs: Callable[[str], Path]) -> None:
    name = "large-depth-lipschitz"
    for stack in ("V", "W"):
        smooth, iid = (
            column(outputs(name), name, stack, init=init, iteration="12") for init in ("smooth", "iid")
        )
        assert style.slope((16, 32, 64), smooth, 16) == pytest.approx(-1, abs=0.08)
        assert style.slope((16, 32, 64), iid, 16) == pytest.approx(0, abs=0.1)


def test_weights_converge_like_one_over_the_depth(outputs: Callable[[str], Path]) -> None:
    name = "large-depth-convergence"
    for stack in ("V", "W"):
        smooth, iid = (
            column(outputs(name), name, stack, init=init, iteration="12") for init in ("smooth", "iid")
        )
        assert style.slope((16, 32, 64), smooth, 16) == pytest.approx(-1, abs=0.08)
        assert style.slope((16, 32, 64), iid, 16) == pytest.approx(0, abs=0.1)


def test_long_training_ends_at_the_target(outputs: Callable[[str], Path]) -> None:
    folder = outputs("long-time")
    for init in ("smooth", "iid"):
        losses = column(folder, "long-time", "loss", init=init)
        assert losses[-1] < 1e-2 < losses[-2]
        assert min(column(folder, "long-time", "pl_ratio", init=init)) > 0
        snapshots = read(folder, "long-time")["parts"][init]["snapshots"]
        assert [s["iteration"] for s in snapshots] == [0, len(losses) - 1]
        assert len(snapshots[-1]["V"]) == 8


def test_streams_have_nothing_in_common() -> None:
    """Data, frozen matrices and weights of one seed, and of the next, at every shift."""
    drawn = {}
    for seed in (0, 1):
        drawn["data", seed] = torch.cat(over_parameterisation.draw_data(64, 8, seed))
        drawn["W", seed] = over_parameterisation.draw_block(1, 8, 128, seed).W * 8**0.5
        for purpose in ("A", "B"):
            generator = over_parameterisation.stream(seed, purpose, 128)
            drawn[purpose, seed] = torch.randn(8, 128, generator=generator)
    rows = [values.detach().flatten().double().numpy() for values in drawn.values()]
    for i, row in enumerate(rows):
        assert row.shape == (1024,)
        assert row.std() == pytest.approx(1, abs=0.1)
        for other in rows[:i]:
            assert abs(np.correlate(row, other, "full")).max() / 1024 < 0.25


def test_the_pl_constant_is_that_of_the_gradient() -> None:
    """λ_min(K)/n is the least of ‖∇R‖²/2R over y at V = 0."""
    constant = over_parameterisation.smallest(over_parameterisation.kernel(6, 3, 40, 0)) / 6
    assert constant > 1e-6
    x, _ = over_parameterisation.draw_data(6, 3, 0)
    block = over_parameterisation.draw_block(5, 3, 40, 0).double()
    x = x.double()
    features = torch.nn.functional.gelu(x @ block.W[0].detach().T)
    worst = torch.linalg.eigh(features @ features.T).eigenvectors[:, :1].expand(-1, 3)
    risk = 0.5 * (block(x) - (x + worst)).square().sum(1).mean()
    (gradient,) = torch.autograd.grad(risk, block.V)
    square = 5 / 40 * gradient.square().sum()  # the flow of √m V, whose rate for V is L/m
    assert (square / (2 * risk)).item() == pytest.approx(constant, rel=1e-4)


def test_the_pl_constant_by_width(outputs: Callable[[str], Path]) -> None:
    """0 for fewer hidden units than samples; a wide block comes close to the limit, row by row of K."""
    for panel in over_parameterisation.CONSTANTS:
        where = {"panel": panel, "samples": "12"}
        assert (
            max(
                column(outputs("over-parameterisation"), "over-parameterisation", "value", **where, width="6")
            )
            < 1e-12
        )
    x, _ = over_parameterisation.draw_data(6, 3, 0)
    wide, limit = over_parameterisation.kernel(6, 3, 100_000, 0), over_parameterisation.infinite_kernel(x)
    torch.testing.assert_close(wide, limit, rtol=0, atol=0.02)
    ratios = (1.0, 2.0, 8.0)
    assert over_parameterisation.least_ratio(ratios, (1e-4, 1e-3, 1e-1), 1e-2) == pytest.approx(4)
    assert over_parameterisation.least_ratio(ratios, (1e-4, 1e-3, 5e-3), 1e-2) is None
    assert over_parameterisation.least_ratio(ratios, (0.0, 2e-2, 5e-2), 1e-2) == 2


@pytest.mark.parametrize("panel", ["hidden", "both"])
def test_networks_trained_together_are_blocks(panel: str) -> None:
    """The same loss as of a block of the library that is trained alone; only rates that go astray stop."""
    config = OverParameterisationConfig(depth=5, dim=3, seeds=2, rates=(0.5, 1e4), iterations=30, target=0)
    iterations, ratios = over_parameterisation.train(config, panel, 6, 7)
    assert iterations == [[None, None]] * 2
    assert not (ratios[:, 1] <= 1).any()
    x, y = over_parameterisation.draw_data(6, 3, 1)
    dim, A, B = 3, torch.eye(3), torch.eye(3)
    if panel == "both":
        dim = 7
        A = torch.randn(3, 7, generator=over_parameterisation.stream(1, "A", 7)) / 3**0.5
        B = torch.randn(7, 3, generator=over_parameterisation.stream(1, "B", 7)) / 7**0.5
    block = over_parameterisation.draw_block(5, dim, 7, 1)
    rates = {block.V: 0.5 * 5 / 7, block.W: 0.5 * 5 / dim}
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in rates.items()])
    losses = []
    for _ in range(31):
        optimizer.zero_grad()
        loss = 0.5 * (block(x @ A) @ B - y).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] / losses[0] == pytest.approx(ratios[1, 0].item(), rel=1e-4)
    assert ratios[1, 0] < 0.9
    target = losses[10] / losses[0] * (1 + 1e-5)
    iterations, _ = over_parameterisation.train(replace(config, target=target), panel, 6, 7)
    assert iterations[1] == [10, None]


def test_refinement_goes_on_with_the_same_function(outputs: Callable[[str], Path]) -> None:
    found = read(outputs("depth-refinement"), "depth-refinement")["parts"]
    resampled = found["resample-smooth-0"]
    assert resampled["test_accuracy"][1] == resampled["trained_accuracy"]  # at its own depth
    times = found["refine"]["deep"]["time"]
    assert times[0] == 0
    assert times[-1] == pytest.approx(1)
    assert times == sorted(times)
    config = TrainConfig(depth=8, dim=8, epochs=3)
    training = Training(build_network(config, "smooth"), load_digits(), config)
    training.epoch(lambda loss: None)
    rate = training.optimizer.param_groups[0]["lr"]
    training.record()
    training.change_depth(64)
    assert training.network.block.depth == 64
    groups = {id(p): g["lr"] for g in training.optimizer.param_groups for p in g["params"]}
    assert groups[id(training.network.A.weight)] == pytest.approx(rate)  # the schedule goes on
    assert groups[id(training.network.block.V)] == pytest.approx(64 * rate)
    before = training.history[-1]["train_loss"]
    training.epoch(lambda loss: None)
    training.epoch(lambda loss: None)
    training.record()
    assert training.history[-1]["train_loss"] < before
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_errors_of_adjoints(outputs: Callable[[str], Path]) -> None:
    name = "adjoint-error"
    old, new = (column(outputs(name), name, key, weights="smooth") for key in ("adjoint_2022", "adjoint"))
    assert style.slope((64, 256), old, 64) == pytest.approx(-1, abs=0.2)
    assert max(new) < 1e-5 < min(old)
    assert set(adjoint_error.METHODS) == set(adjoint_error.LABELS) == set(adjoint_error.STYLES)


@pytest.mark.parametrize("init", ["smooth", "iid"])
def test_the_python_loop_is_the_same_descent(init: str) -> None:
    x, y = synthetic.make_data(9, 3, 0)
    ours, loop = (
        kind(synthetic.make_block(synthetic.initial_W(init, 6, 5, 3, 0)), x, y, 0.1)
        for kind in (synthetic.Descent, synthetic.LoopDescent)
    )
    for _ in range(20):
        assert ours.step() == pytest.approx(loop.step(), rel=1e-5)
    torch.testing.assert_close(ours.block.V, loop.block.V)
    torch.testing.assert_close(ours.block.W, loop.block.W)
    assert not torch.equal(ours.block.V[0], ours.block.V[1])


def test_slope() -> None:
    assert style.slope((2, 4, 8, 16), (9.0, 3 / 4, 3 / 8, 3 / 16), 4) == pytest.approx(-1)


def test_peers_take_turns() -> None:
    calls: list[str] = []
    seconds = speed.median_seconds([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert calls == ["a", "b"] * 4
    assert len(seconds) == 2
    assert min(seconds) >= 0


# ---- harness ---------------------------------------------------------------------------------------------


def test_same_seed_same_numbers_and_files(tmp_path: Path, outputs: Callable[[str], Path]) -> None:
    name, config = "adjoint-error", SMALL["adjoint-error"]
    assert reproduce.reproduce(name, config, tmp_path) == 0
    for path in outputs(name).iterdir():
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    other = tmp_path / "other"
    assert reproduce.reproduce(name, replace(config, seed=1), other) == 0
    assert (other / f"{name}.csv").read_text() != (tmp_path / f"{name}.csv").read_text()


class Invented:
    """An experiment of two parts: names of those that ``ran``; a part in ``stop`` is interrupted."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.stop: set[str] = set()
        self.loaded: list[dict[str, Any] | None] = []

    def compute(self, name: str, run: reproduce.Run) -> reproduce.Results:
        self.ran.append(name)
        self.loaded.append(run.load())
        run.save({"calls": len(self.ran)})
        if name in self.stop:
            raise KeyboardInterrupt
        run.advance(1)
        return {"number": len(self.ran)}

    def parts(self, config: ReproduceConfig) -> list[reproduce.Part]:
        return [reproduce.Part(name, 1, partial(self.compute, name)) for name in ("first", "second")]

    def summarise(self, config: ReproduceConfig, results: dict[str, reproduce.Results]) -> reproduce.Summary:
        return reproduce.Summary({}, [{name: part["number"] for name, part in results.items()}], {})

    def run(self, output: Path, seed: int = 0) -> tuple[int, list[str]]:
        """The exit code of a call, and which parts it computed."""
        before = len(self.ran)
        code = reproduce.reproduce("invented", replace(SMALL["adjoint-error"], seed=seed), output)
        return code, self.ran[before:]


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> Invented:
    experiment = Invented()
    monkeypatch.setitem(sys.modules, "odeblock.experiments.invented", experiment)
    return experiment


def test_an_interrupted_run_goes_on(
    tmp_path: Path, invented: Invented, capsys: pytest.CaptureFixture[str]
) -> None:
    invented.stop = {"second"}
    assert invented.run(tmp_path) == (130, ["first", "second"])
    assert "goes on from here" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]
    first, second = sorted((tmp_path / "parts").iterdir())
    assert (first.suffix, second.suffix) == (".json", ".pt")
    invented.stop.clear()
    assert invented.run(tmp_path) == (0, ["second"])
    assert (tmp_path / "invented.csv").read_text() == "first,second\n1,3\n"
    part = second.with_suffix(".json")
    changed = part.read_text().replace('"number": 3', '"number": 2')
    for damaged in ("{", "[]", changed):  # half of it, not ours, or another number
        part.write_text(damaged)
        assert invented.run(tmp_path) == (0, ["second"])
    part.unlink()
    part.mkdir()  # where the results could not be written
    with pytest.raises(Refusal, match=r"second-.*json: expected a file, found a folder"):
        invented.run(tmp_path)


def test_other_settings_lie_beside(tmp_path: Path, invented: Invented) -> None:
    invented.stop = {"second"}
    assert invented.run(tmp_path) == (130, ["first", "second"])
    invented.stop.clear()
    assert invented.run(tmp_path, seed=1) == (0, ["first", "second"])  # nothing of it is used
    assert invented.loaded[-1] is None
    assert (tmp_path / "invented.csv").read_text() == "first,second\n3,4\n"
    assert invented.run(tmp_path) == (0, ["second"])  # nor lost
    assert invented.loaded[-1] == {"calls": 2}
    assert (tmp_path / "invented.csv").read_text() == "first,second\n1,5\n"
    assert invented.run(tmp_path, seed=1) == (0, [])


def test_what_other_code_computed_is_computed_again(
    tmp_path: Path, invented: Invented, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    (package / "experiments").mkdir(parents=True)
    monkeypatch.setattr(reproduce, "PACKAGE", package)
    for path in ("block.py", "experiments/helper.py", "_core.so"):
        (package / path).write_text("before")
    invented.stop = {"second"}
    invented.run(tmp_path / "out")
    invented.stop.clear()
    for path in ("block.py", "experiments/helper.py", "_core.so"):
        (package / path).write_text("after")
        assert invented.run(tmp_path / "out") == (0, ["first", "second"])
        assert invented.loaded[-1] is None
        assert invented.run(tmp_path / "out") == (0, [])
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert invented.run(tmp_path / "out") == (0, ["first", "second"])


def test_the_code_is_that_of_the_package() -> None:
    assert Path(odeblock.__file__).resolve().parent == reproduce.PACKAGE


@pytest.mark.parametrize("keep", [0, 1, 100, -20])
def test_a_damaged_state_is_none(keep: int, tmp_path: Path, invented: Invented) -> None:
    invented.stop = {"first"}
    invented.run(tmp_path)
    (state,) = (tmp_path / "parts").glob("*.pt")
    whole = state.read_bytes()
    invented.run(tmp_path)
    assert invented.loaded[-1] == {"calls": 1}
    state.write_bytes(whole[:keep])
    invented.stop.clear()
    assert invented.run(tmp_path) == (0, ["first", "second"])
    assert invented.loaded == [None, {"calls": 1}, None, None]


def test_versions_of_absent_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs_module, "PACKAGES", ("torch", "a-package-that-is-not"))
    versions = outputs_module.provenance()["versions"]
    assert versions["a-package-that-is-not"] is None
    assert versions["torch"] == version("torch")


@pytest.mark.parametrize(
    ("name", "interrupted_at", "saved_at"),
    [("large-depth-convergence", 40, 4 * 6), ("long-time", 50, 40)],  # gradients of its four networks, or one
)
def test_an_interrupted_part_goes_on(
    name: str,
    interrupted_at: int,
    saved_at: int,
    tmp_path: Path,
    outputs: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = outputs(name)  # a run of its own, perhaps the first: before gradients are counted
    monkeypatch.setattr("odeblock.experiments.long_time.SAVED_EVERY", 20)
    made, gradient = 0, synthetic.Descent.gradient

    def counted(descent: synthetic.Descent) -> float:
        nonlocal made
        made += 1
        if made == interrupted_at:
            raise KeyboardInterrupt
        return gradient(descent)

    monkeypatch.setattr(synthetic.Descent, "gradient", counted)
    assert reproduce.reproduce(name, SMALL[name], tmp_path) == 130
    assert len(list((tmp_path / "parts").glob("*.pt"))) == 1
    assert reproduce.reproduce(name, SMALL[name], tmp_path) == 0
    steps = 2 * 4 * 12 if name == "large-depth-convergence" else len(column(whole, name, "loss"))
    assert made == interrupted_at + steps - saved_at
    assert not list((tmp_path / "parts").glob("*.pt"))
    assert read(tmp_path, name)["parts"] == read(whole, name)["parts"]


def test_a_loss_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(SMALL["long-time"], lr=1e20)
    assert reproduce.reproduce("long-time", config, tmp_path) == 1
    assert "stopped: smooth: the loss is" in capsys.readouterr().out


# ---- command line ----------------------------------------------------------------------------------------


def test_reproduce_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(reproduce, "reproduce", lambda *arguments: seen.append(arguments) or 0)
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "long-time"]) == 0
    assert main(["reproduce", "long-time", "--quick"]) == 0
    assert main(["reproduce", "adjoint-error", "--quick", "--seed", "7", "--output", "here"]) == 0
    quick = replace(EXPERIMENTS["adjoint-error"].quick, seed=7)
    assert seen == [
        ("long-time", EXPERIMENTS["long-time"].config, Path("outputs/long-time")),
        ("long-time", EXPERIMENTS["long-time"].quick, Path("outputs/long-time-quick")),
        ("adjoint-error", quick, Path("here")),
    ]
    assert (tmp_path / "outputs" / "long-time").is_dir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "parts").touch()
    for options, expected in (
        (["reproduce", "everything"], ["NAME", "everything", "long-time"]),
        (["reproduce", "long-time", "--seed", "x"], ["--seed", ">= 0"]),
        (["reproduce"], ["NAME"]),
        (["reproduce", "long-time", "--output", "taken"], ["--output", "taken/parts", "File exists"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(options)
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        for part in expected:
            assert part in message


def test_small_networks_run_on_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(reproduce, "reproduce", lambda *arguments: seen.append(torch.get_num_threads()) or 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(2)
    for options in (["adjoint-error"], ["adjoint-error", "--quick"], ["long-time"]):
        main(["reproduce", *options])
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    main(["reproduce", "long-time"])
    assert seen == [2, 1, 1, 2]
    assert torch.get_num_threads() == 2


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for options, expected in (
        (["--help"], ["info", "train", "reproduce long-time", "bench", "exit codes"]),
        (["reproduce", "--help"], [*EXPERIMENTS, "reference=16384", "outputs/NAME"]),
        (["train", "--help"], ["outputs/train", "default: 256; quick: 16"]),
        (["bench", "--help"], ["outputs/bench", "default: 256; quick: 32"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(options)
        assert stop.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for part in expected:
            assert part in text


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("matplotlib", ["reproduce", "long-time"]),
        ("rich", ["bench"]),
        ("rich", ["reproduce", "adjoint-error"]),
        ("sklearn", ["reproduce", "depth-refinement"]),
        ("sklearn", ["reproduce", "weights-on-digits"]),
        ("sklearn", ["train"]),
    ],
)
def test_missing_extra(package: str, command: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules[sys.argv[1]] = None; from odeblock.__main__ import main; main(sys.argv[2:])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, package, *command, "--output", str(tmp_path / "new")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert f"{package} is not installed, please run: pip install 'odeblock[experiments]'" in process.stderr
    assert not (tmp_path / "new").exists()


def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "step_memory", lambda network, batch, device, eager: 2**20 * network["depth"])
    assert main(["bench", "--quick", "--dim", "8", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["config"] == asdict(BenchConfig(**{**BENCH_QUICK, "dim": 8}))
    strategies = ["auto", "adjoint", "checkpoint", "store"]
    assert list(found["speedup"]) == [*strategies, "forward"]
    assert min(found["speedup"].values()) > 0
    assert found["memory_bytes"] == dict.fromkeys(["eager loop", *strategies], 32 * 2**20)
    out = capsys.readouterr().out
    assert "B = 64, q = 8, m = 8, L = 32" in out
    assert "32.00" in out
