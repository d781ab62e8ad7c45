"""``vistok studio``: a page where people look at visual tokens, on this machine."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from vistok.cli.console import Seed, UserError
from vistok.cli.serve import Host, Port, open_to, run, with_studio

MODELS = ("vistok-tiny", "vistok-tiny-qwen")


def studio(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Shipped models, folders, or names on the hub (the shipped ones)."),
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--results", help="Folder of a sweep (`vistok bench run`), for the tab Compare.")
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8600,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
    seed: Seed = 0,
) -> None:
    """Look at what methods keep of a picture, layer by layer, compare sweeps, and try what papers claim."""
    access = open_to(host, None, [])
    if access.api_keys:
        raise UserError("--host", host, "must be a loopback address without an API key: the studio asks for no key")
    if results is not None and not results.is_dir():
        raise UserError("--results", results, "must be a folder that `vistok bench run` wrote")
    page = with_studio(results, seed)
    from vistok.serve.service import Settings

    settings = Settings(models=tuple(models or MODELS))
    then = (lambda address: webbrowser.open(f"{address}/studio")) if open_page else None
    run(settings, access, host, port, grace=5.0, page=page, then=then)
