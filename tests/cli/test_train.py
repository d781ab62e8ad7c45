"""``vistok train``: recipes by name, early stops, Ctrl-C, going on."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
from safetensors import safe_open

from vistok.cli import train as command
from vistok.cli.train import Stopped, stop_at_checkpoint
from vistok.zoo import evaluation
from vistok.zoo.recipes import vistok_tiny
from vistok.zoo.training import Stage


@pytest.fixture(autouse=True)
def short_recipe(monkeypatch):
    """vistok-tiny in six small steps, with a checkpoint after every second."""
    stage = Stage("patches", steps=6, batch_size=2, peak_lr=1e-3, language=False, tasks=(("scenes", 1.0),))
    monkeypatch.setattr(vistok_tiny, "RECIPE", replace(vistok_tiny.RECIPE, stages=(stage,)))
    monkeypatch.setattr(command, "CHECKPOINT_EVERY", 2)


def steps_saved(folder) -> int:
    with safe_open(folder / "checkpoint" / "state.safetensors", "pt") as file:
        return int(file.metadata()["step"])


def test_stop_early_and_go_on_to_the_card(run, tmp_path, monkeypatch):
    result = run("train", "vistok-tiny", "--out", "model", "--steps", "2", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert steps_saved(tmp_path / "model") == 2
    assert "2 of 6 steps are done. Go on with: vistok train vistok-tiny --out model" in result.stderr
    assert not (tmp_path / "model" / "README.md").exists()

    measured = []

    def card(recipe, model, processor, folder):
        measured.append((recipe.name, type(model).__name__))
        return folder / "README.md"

    monkeypatch.setattr(evaluation, "write_model_card", card)
    result = run("train", "vistok_tiny", "--out", "model", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert steps_saved(tmp_path / "model") == 6
    assert measured == [("vistok-tiny", "LlavaForConditionalGeneration")]
    assert "README.md" in result.stdout

    result = run("train", "vistok-tiny", "--out", "model", "--device", "cpu", "--restart", "--steps", "1")
    assert result.exit_code == 0
    assert steps_saved(tmp_path / "model") == 1


def test_ctrl_c_leaves_a_checkpoint(run, tmp_path, monkeypatch):
    inner = stop_at_checkpoint

    def press_in_step_four():
        """The terminal's Ctrl-C, in the middle of step 4."""
        from contextlib import contextmanager

        @contextmanager
        def wrapped():
            with inner() as on_step:

                def told(record):
                    if record["step"] == 4:
                        os.kill(os.getpid(), signal.SIGINT)
                    on_step(record)

                yield told

        return wrapped()

    monkeypatch.setattr(command, "stop_at_checkpoint", press_in_step_four)
    before = signal.getsignal(signal.SIGINT)
    result = run("train", "vistok-tiny", "--out", "model", "--device", "cpu", "--seed", "7")
    assert result.exit_code == 130
    assert steps_saved(tmp_path / "model") == 4
    assert "4 of 6 steps are saved. Go on with: vistok train vistok-tiny --out model --seed 7" in result.stderr
    assert "Traceback" not in result.stderr
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), stop_at_checkpoint() as on_step:
        signal.raise_signal(signal.SIGINT)
        on_step({"step": 2})  # one step is saved, which is no checkpoint
        signal.raise_signal(signal.SIGINT)


def test_nothing_is_lost_at_the_first_step():
    with stop_at_checkpoint() as on_step:
        signal.raise_signal(signal.SIGINT)
        on_step({"step": 1})
        with pytest.raises(Stopped):
            on_step({"step": 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("vistok-huge",),
            "NAME: got vistok-huge, must be a recipe: ",
        ),
        (("../training",), "NAME: got ../training"),
        (("vistok-tiny", "--device", "abacus"), "--device: got abacus"),
        (("vistok-tiny", "--steps", "0"), "--steps"),
        (("vistok-tiny", "--out", "file/below"), "--out: got file/below"),
        ((), "Missing argument"),
    ],
)
def test_mistakes(run, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    result = run("train", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
