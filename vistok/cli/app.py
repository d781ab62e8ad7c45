"""The ``vistok`` command: which commands there are, and the one place where they are invoked.

A command's module is imported only when the command runs, so that ``vistok systems`` does not wait for torch. To add
a command, write a function with typer annotations and name it in ``COMMANDS``.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer
import typer.core
import typer.main

from vistok.cli import console


@dataclass(frozen=True)
class Command:
    """Where a command's function is, as "module:function", and its line in ``vistok --help``."""

    target: str
    help: str

    def load(self) -> Any:
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(module), function)


@dataclass(frozen=True)
class Group:
    """Commands under a common name: ``vistok world sample``."""

    help: str
    commands: Mapping[str, Command]


COMMANDS: Mapping[str, Command | Group] = {
    "ask": Command("vistok.cli.ask:ask", "Ask a picture a question, with and without a method."),
    "compare": Command("vistok.cli.compare:compare", "Compare methods on one picture, or on many of the world."),
    "horizon": Command("vistok.cli.horizon:horizon", "Measure how deep in a model its visual tokens matter."),
    "diffusion": Command("vistok.cli.diffusion:diffusion", "Measure when a masked-diffusion model can lose tokens."),
    "auto": Command("vistok.cli.auto:auto", "Find the cheapest method and count that is good enough."),
    "search": Command("vistok.cli.search:search", "Tune a method's hyper-parameters on a model."),
    "tokenize": Command("vistok.cli.tokenize:tokenize", "Turn a corpus of pictures into ids, each picture once."),
    "detokenize": Command("vistok.cli.tokenize:detokenize", "Turn ids that were stored back into pictures."),
    "systems": Command("vistok.cli.catalogue:systems", "List the systems that are implemented."),
    "show": Command("vistok.cli.catalogue:show", "Show a system's card: source, hyper-parameters, claim."),
    "try": Command("vistok.cli.trial:trial", "Measure a system's claim on this machine."),
    "world": Group(
        "Pictures with exact truth.",
        {"sample": Command("vistok.cli.world:sample", "Write pictures of the world with their questions.")},
    ),
    "bench": Group(
        "Sweeps: many methods, counts and tasks from one file, with tables and curves.",
        {
            "run": Command("vistok.cli.bench:run", "Measure the cells of a sweep that are not measured yet."),
            "ablate": Command("vistok.cli.bench:ablate", "Swap one step of a recipe, hold the rest, and measure."),
            "compact": Command("vistok.cli.bench:compact", "Pack the rows of finished cells into few files."),
            "report": Command("vistok.cli.bench:report", "Write a sweep's page, tables and curves."),
            "rank": Command("vistok.cli.bench:rank", "Rank methods by all that was measured, however sparse."),
            "diff": Command("vistok.cli.bench:diff", "Say what changed between two sweeps, beyond noise."),
        },
    ),
    "serve": Command("vistok.cli.serve:serve", "Serve models over HTTP, as the OpenAI API does."),
    "studio": Command("vistok.cli.studio:studio", "Look at visual tokens in a browser."),
    "gna-sim": Command("vistok.cli.gna_sim:gna_sim", "Count what neighbourhood attention can gain on tiles."),
    "train": Command("vistok.cli.train:train", "Train a small model of the zoo."),
}


class LazyGroup(typer.core.TyperGroup):
    """A group that lists its commands from ``table`` and imports the one that is invoked."""

    table: ClassVar[Mapping[str, Command | Group]] = COMMANDS

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command as the help lists it: its name and its line, nothing imported."""
        if cmd_name not in self.table:
            return None
        return typer.core.TyperCommand(name=cmd_name, help=self.table[cmd_name].help)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in self.table and not name.startswith("-"):
            ctx.fail(f"unknown command {name!r}, must be one of {', '.join(self.table)}")
        entry = self.table.get(name)
        if entry is None:  # an option in a command's place: the base class explains it
            return super().resolve_command(ctx, args)
        return name, _group(name, entry) if isinstance(entry, Group) else _command(name, entry), args[1:]

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and exit. ``--debug`` may stand anywhere before a "--"."""
        args, debug = _take_debug(sys.argv[1:] if args is None else list(args))
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            if not standalone_mode:
                raise
            code = console.report(error, debug=debug)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def _take_debug(args: list[str]) -> tuple[list[str], bool]:
    """``args`` with ``--debug`` moved to the front, where the group's option is, and whether it was there."""
    end = args.index("--") if "--" in args else len(args)
    if "--debug" not in args[:end]:
        return args, False
    return ["--debug", *(a for a in args[:end] if a != "--debug"), *args[end:]], True


def _command(name: str, command: Command) -> Any:
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(command.load())
    return typer.main.get_command(single)


def _group(name: str, group: Group) -> Any:
    cls = type(f"{name.title()}Group", (LazyGroup,), {"table": group.commands})
    nested = typer.Typer(name=name, cls=cls, help=group.help, add_completion=False, rich_markup_mode=None)
    nested.callback(invoke_without_command=True)(_help_if_alone)
    return typer.main.get_command(nested)


def _help_if_alone(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


app = typer.Typer(cls=LazyGroup, add_completion=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback; any command takes it.")] = False,
) -> None:
    """Visual tokens of vision models: see what a method keeps, what it costs, and what it answers."""
    if version:
        import vistok

        print(f"vistok {vistok.__version__}")
    else:
        _help_if_alone(context)


def main() -> None:
    """Entry point of the ``vistok`` command."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torch on torchao's enums, where it is installed
    typer.main.get_command(app)(prog_name="vistok")
