"""``vistok train``: make a small model of the zoo again."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from vistok.cli.console import UserError, console
from vistok.cli.options import check_folder

if TYPE_CHECKING:
    from vistok.zoo.training import Recipe
    from vistok.zoo.visual_tokenizers import TokenizerRecipe
    from vistok.zoo.vit_training import ViTRecipe

AnyRecipe: TypeAlias = "Recipe | ViTRecipe | TokenizerRecipe"
RECIPES = Path(__file__).parents[1] / "zoo" / "recipes"
CHECKPOINT_EVERY = 25
INTERRUPTED = 130


class Stopped(Exception):
    """The user pressed Ctrl-C, and there is a checkpoint of ``step`` steps."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


def train(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe of the zoo, e.g. vistok-tiny.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the model and its checkpoint (default: runs/NAME).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on from the checkpoint in the folder, or throw it away.")
    ] = True,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ... (default: the GPU if any).")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Stop with a checkpoint after this many steps of the recipe.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of everything (default: the recipe's).")
    ] = None,
) -> None:
    """Train a small model of the zoo; Ctrl-C leaves a checkpoint to go on from."""
    recipe = find_recipe(name) if seed is None else replace(find_recipe(name), seed=seed)
    place = check_device(device)
    folder = check_folder(Path("runs") / recipe.name if out is None else out)
    if not resume:
        (folder / "checkpoint" / "state.safetensors").unlink(missing_ok=True)
    run = _trainer(recipe)
    again = f"vistok train {recipe.name} --out {folder}" + ("" if seed is None else f" --seed {seed}")
    try:
        with stop_at_checkpoint() as on_step:
            run(recipe, folder, device=place, checkpoint_every=CHECKPOINT_EVERY, stop_at=steps, on_step=on_step)
    except Stopped as stopped:
        _say(f"stopped; {stopped.step} of {recipe.steps} steps are saved. Go on with: {again}")
        raise typer.Exit(INTERRUPTED) from None
    except KeyboardInterrupt:  # the second Ctrl-C, or one outside of the steps
        _say(f"stopped at once. Go on from the last checkpoint with: {again}")
        raise typer.Exit(INTERRUPTED) from None
    if steps is not None and steps < recipe.steps:
        _say(f"{steps} of {recipe.steps} steps are done. Go on with: {again}")
        return
    _write_card(recipe, folder)


def find_recipe(name: str) -> AnyRecipe:
    """The RECIPE of the file of that name in ``vistok/zoo/recipes``. Raises UserError."""
    stem = name.strip().lower().replace("-", "_")
    stems = sorted(path.stem for path in RECIPES.glob("[!_]*.py"))
    if stem not in stems:
        known = ", ".join(stem.replace("_", "-") for stem in stems)
        raise UserError("NAME", name, f"must be a recipe: {known}")
    return importlib.import_module(f"vistok.zoo.recipes.{stem}").RECIPE


def check_device(device: str | None) -> str:
    """Where to train. Raises UserError for a device that torch does not know or that is not there."""
    import torch

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError("--device", place, "must be a device that torch can use here, such as cpu") from error
    return place


@contextmanager
def stop_at_checkpoint() -> Iterator[Any]:
    """Yields an ``on_step`` that, once Ctrl-C was pressed, raises Stopped as soon as a checkpoint is whole.

    A step is never torn apart, and no more than one is lost; a second Ctrl-C stops at once.
    """
    pressed, process = False, os.getpid()

    def press(number: int, frame: Any) -> None:
        nonlocal pressed
        if os.getpid() != process:  # the terminal signals the process that draws the pictures as well: it goes on
            return
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        _say(f"stopping at the next checkpoint, in {CHECKPOINT_EVERY} steps at most (Ctrl-C again: at once)")

    def on_step(told: dict[str, Any]) -> None:
        done = told["step"] - 1  # training saves after it has told of a step
        if pressed and done > 0 and done % CHECKPOINT_EVERY == 0:
            raise Stopped(done)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield on_step
    finally:
        signal.signal(signal.SIGINT, before)


def _trainer(recipe: AnyRecipe) -> Any:
    """The function that trains it."""
    from vistok.zoo.training import train as train_vlm
    from vistok.zoo.visual_tokenizers import TokenizerRecipe, train_tokenizer
    from vistok.zoo.vit_training import ViTRecipe, train_vit

    if isinstance(recipe, TokenizerRecipe):
        return train_tokenizer
    return train_vit if isinstance(recipe, ViTRecipe) else train_vlm


def _write_card(recipe: AnyRecipe, folder: Path) -> None:
    """Measure the model that was saved and write its model card."""
    from vistok.zoo import load, load_processor
    from vistok.zoo.evaluation import write_model_card
    from vistok.zoo.visual_tokenizers import TokenizerRecipe, write_tokenizer_card
    from vistok.zoo.vit_evaluation import write_vit_card
    from vistok.zoo.vit_training import ViTRecipe

    _say("measuring it on held-out pictures")
    if isinstance(recipe, TokenizerRecipe):
        card = write_tokenizer_card(recipe, load(folder, device="cpu"), folder)
    elif isinstance(recipe, ViTRecipe):
        card = write_vit_card(recipe, load(folder), folder)
    else:
        card = write_model_card(recipe, load(folder), load_processor(folder), folder)
    console().print(f"{folder}\n{card}", markup=False, soft_wrap=True)


def _say(text: str) -> None:
    console(stderr=True).print(text, markup=False, soft_wrap=True)
