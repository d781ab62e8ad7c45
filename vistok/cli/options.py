"""What several commands read alike: how much to keep, which methods, which model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok import catalogue
from vistok.cli.console import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

DENSE = "dense"

Model = Annotated[
    str, typer.Option("--model", help="A shipped model, a folder, or a name on the Hugging Face hub (owner/name).")
]
"""Type of a command's ``model`` parameter: ``model: Model = "vistok-tiny"``."""
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A shipped model, a folder, or a name on the Hugging Face hub.")
]


def parse_keep(text: str, argument: str = "--keep") -> int | float:
    """``64`` is a count of tokens; ``0.25`` and ``25%`` are a share of each picture's tokens. Raises UserError.

    >>> parse_keep("64"), parse_keep("0.25"), parse_keep("25%"), parse_keep("1"), parse_keep("1.0")
    (64, 0.25, 0.25, 1, 1.0)
    """
    given = text.strip()
    text = text or "nothing"
    right = "must be a count of tokens such as 64, or a share in (0, 1] such as 0.25 or 25%"
    if re.fullmatch("[0-9]{1,9}", given):
        if int(given) == 0:
            raise UserError(argument, text, right)
        return int(given)
    try:
        share = float(given[:-1]) / 100 if given.endswith("%") else float(given)
    except ValueError as error:
        raise UserError(argument, text, right) from error
    if not 0 < share <= 1 or not re.search("[.%eE]", given):  # the first is also false for nan
        raise UserError(argument, text, right)
    return share


def parse_keeps(text: str, argument: str = "--keep") -> list[int | float]:
    """Several of them, separated by commas, each once. Raises UserError."""
    return list(dict.fromkeys(parse_keep(part, argument) for part in text.split(",")))


def parse_methods(text: str, argument: str = "--methods") -> list[str]:
    """Names of methods, separated by commas, each once; ``a+b`` composes; ``all`` is every reducer, controls first.

    Raises UserError for a name that is no reducer.
    """
    if text.strip() == "all":
        cards = catalogue.methods("reduce")
        return [DENSE, *(c.slug for c in sorted(cards, key=lambda c: (c.kind != "control", c.slug == "pool", c.slug)))]
    found = [[_known(part, argument) for part in name.split("+")] for name in text.split(",")]
    for parts in found:
        if len(parts) > 1 and DENSE in parts:
            raise UserError(argument, "+".join(parts), f"must compose systems, {DENSE} is the model without any")
    return list(dict.fromkeys("+".join(parts) for parts in found))


def _known(name: str, argument: str) -> str:
    name = name.strip()
    if name.lower() == DENSE:
        return DENSE
    if not name:
        raise UserError(argument, "nothing", "must be a system that `vistok systems` lists")
    try:
        card = catalogue.card(name)
    except catalogue.UnknownSystem as error:
        raise UserError(argument, name, f"must be a system: {str(error).partition(': ')[2]}") from error
    if card.family != "reduce":
        raise UserError(argument, name, f"must be a reducer, it is of the family {card.family}")
    if card.kind == "measurement":
        raise UserError(argument, name, "must be a reducer, it is a study with a command of its own")
    return card.slug


def create(name: str, seed: int) -> Any:
    """The method ``name`` of ``parse_methods`` with its paper's hyper-parameters, or None for dense.

    Where a method is random, ``seed`` seeds it.
    """
    if name == DENSE:
        return None
    parts = [catalogue.create_seeded(slug, seed) for slug in name.split("+")]
    return parts[0] if len(parts) == 1 else parts


def load_model(name: str, argument: str = "--model") -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model and its processor. Raises UserError for whatever cannot be loaded."""
    import transformers

    from vistok.zoo import ModelNotFound, load, load_processor

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return load(name), load_processor(name)
    except ModelNotFound as error:
        reason = str(error).removeprefix(f"model: {name} ")
        raise UserError(argument, name, reason) from error
    except Exception as error:  # somebody else's folder can be wrong in any way
        reason = f"cannot be loaded ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        raise UserError(argument, name, reason) from error


def command_line(context: typer.Context) -> str:
    """The command that is running, as it can be typed again."""
    words = context.command_path.split()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        value = context.params.get(parameter.name or "")
        if source is None or source.name != "COMMANDLINE" or value is None or value is False:
            continue
        if parameter.param_type_name == "option":
            words.append(parameter.opts[0])
        if value is not True:
            words.append(str(value))
    return shlex.join(words)


def check_folder(folder: Path, argument: str = "--out") -> Path:
    """Make ``folder`` now, so that a wrong one is told before the work and not after it. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(argument, folder, f"must be a folder that can be written ({error.strerror})") from error
    return folder
