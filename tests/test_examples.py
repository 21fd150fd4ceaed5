"""The examples, in short."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import landscape, train_digits
from examples.train_digits import RECIPES, SCHEDULES, Settings
from tests.helpers import assert_same_bits, assert_same_state


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the example has it: a second one only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def splits() -> Any:
    return train_digits.load_splits()


def test_splits_share_no_image(splits: Any) -> None:
    assert [len(split.labels) for split in splits] == [1077, 360, 360]
    images = {image.numpy().tobytes() for split in splits for image in split.images}
    assert len(images) == 1797
    for split in splits:  # every digit in proportion
        assert (split.labels.bincount() / len(split.labels) - 0.1).abs().max() < 0.01


@pytest.mark.parametrize("name", RECIPES)
def test_every_optimizer_learns_the_digits(name: str, splits: Any, tmp_path: Path) -> None:
    """From its documented starting values, in fewer epochs than the template has."""
    settings = Settings(epochs=10)
    run = train_digits.start(name, settings, splits[0])
    assert train_digits.train(run, settings, splits, tmp_path / "best.pt") >= 0.95
    assert run.seconds_in_step > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    schedule: str, splits: Any, tmp_path: Path
) -> None:
    whole, half = Settings(epochs=4, schedule=schedule), Settings(epochs=2, schedule=schedule)
    expected = train_digits.start("AdamW", whole, splits[0])
    accuracy = train_digits.train(expected, whole, splits, tmp_path / "expected.pt")

    best = tmp_path / "best.pt"
    interrupted = train_digits.start("AdamW", whole, splits[0])
    train_digits.train(interrupted, half, splits, best)
    resumed = train_digits.start("AdamW", whole, splits[0])
    resumed.load(best)
    assert resumed.epoch == 2
    assert train_digits.train(resumed, whole, splits, best) == accuracy
    assert resumed.training_losses == expected.training_losses
    assert resumed.validation_losses == expected.validation_losses
    assert_same_state(resumed.optimizer, expected.optimizer, assert_same_bits)


def test_training_stops_when_the_validation_loss_does_not_fall(
    splits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.0, 2.1, 1.0])
    monkeypatch.setattr(train_digits, "evaluate", lambda *_: (next(losses, 9.0), 0.5))
    settings = Settings(epochs=20, patience=3)
    run = train_digits.start("SGD", settings, splits[0])
    train_digits.train(run, settings, splits, tmp_path / "best.pt")
    assert (run.epoch, run.best_epoch, run.best_loss) == (5, 2, 2.0)


def test_biases_and_norms_are_not_decayed() -> None:
    decayed, rest = train_digits.parameter_groups(train_digits.make_model())
    assert [tuple(p.shape) for p in decayed["params"]] == [
        (16, 1, 3, 3),
        (32, 16, 3, 3),
        (64, 512),
        (10, 64),
    ]
    assert all(p.ndim == 1 for p in rest["params"])
    assert rest["weight_decay"] == 0


def test_train_digits_as_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--all", "--epochs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_digits.py", *arguments])
    train_digits.main()
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if "%" in line} == {n.split()[0] for n in RECIPES}
    assert (tmp_path / "losses.png").stat().st_size > 10_000


@pytest.mark.parametrize("land", landscape.LANDSCAPES, ids=lambda land: land.name)
def test_every_path_goes_down(land: landscape.Landscape) -> None:
    row = landscape.LANDSCAPES.index(land)
    for panel in landscape.PANELS:
        for name, walker in panel.items():
            points = landscape.path(walker.make, walker.rates[row], land, steps=500)
            assert points[0].tolist() == list(land.start)
            assert land.height(*points[-1]) < land.height(*land.start) / 2, name
    assert land.height(*land.minimum) == 0


def test_the_landscape_is_drawn(tmp_path: Path) -> None:
    landscape.draw(steps=3, out=tmp_path / "landscape.png")
    assert (tmp_path / "landscape.png").stat().st_size > 10_000
