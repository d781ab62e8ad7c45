"""``vistok serve``: an OpenAI-compatible server of vision-language models with fewer visual tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vistok.cli.console import UserError, console
from vistok.cli.options import DENSE, parse_keep, parse_methods

if TYPE_CHECKING:
    from fastapi import FastAPI

    from vistok.serve.access import Access
    from vistok.serve.media import MediaPolicy
    from vistok.serve.service import Settings

KEY_VARIABLE = "VISTOK_API_KEY"

Host = Annotated[str, typer.Option("--host", help="Address to listen on; any but loopback needs an API key.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")]


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Shipped models, folders, or names on the hub (vistok-tiny)."),
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    method: Annotated[str, typer.Option("--method", help="Method of requests that name none; dense for none.")] = DENSE,
    keep: Annotated[
        str | None, typer.Option("--keep", help="Tokens it keeps: a count (64) or a share (0.25, 25%).")
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Methods that a request may name, separated by commas; all.")
    ] = "all",
    max_keep: Annotated[
        float, typer.Option("--max-keep", min=0, max=1, help="Largest share of the tokens that a request may keep.")
    ] = 1.0,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer where the request does not say.")
    ] = 512,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Requests answered together.")] = 8,
    max_wait_ms: Annotated[
        float, typer.Option("--max-wait-ms", min=0, help="How long the first of them waits for others.")
    ] = 5.0,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Requests that may wait; more get status 429.")] = 256,
    deadline: Annotated[float, typer.Option("--deadline", min=0.1, help="Seconds for a request, all in all.")] = 120.0,
    cache_mb: Annotated[
        int, typer.Option("--cache-mb", min=0, help="Memory for visual features of pictures seen, a model; 0: none.")
    ] = 1024,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", help=f"File of keys, one a line; or one key in the variable {KEY_VARIABLE}."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="Host that pictures may be fetched from (name, *.name or *); repeat it."),
    ] = None,
    allow_folder: Annotated[
        list[Path] | None,
        typer.Option("--allow-folder", help="Folder whose pictures file:// URLs may name; repeat it."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option("--cors-origin", help="Web page that may read answers; repeat it.")
    ] = None,
    studio: Annotated[bool, typer.Option("--studio", help="Also the studio, at /studio; on loopback only.")] = False,
    engine: Annotated[
        Literal["local", "ray"], typer.Option("--engine", help="One process, or replicas on Ray Serve.")
    ] = "local",
    replicas: Annotated[
        str, typer.Option("--replicas", help="With --engine ray: how many, or from..to by load (1..4).")
    ] = "1",
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ... (default: the GPU if any).")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, or a torch dtype: bfloat16, float32, ...")] = "auto",
    grace: Annotated[float, typer.Option("--grace", min=0, help="Seconds to finish what runs at the end.")] = 30.0,
) -> None:
    """Serve models over HTTP as the OpenAI API does: POST /v1/chat/completions, and GET /v1/models, /metrics, /readyz.

    A request may say {"vistok": {"method": "holov", "keep": 0.25}}. Ctrl-C finishes what runs, a second one does not.
    """
    access = open_to(host, api_key_file, cors_origin or [])
    if studio and access.api_keys:
        raise UserError("--studio", "a server with an API key", "must be on loopback without one: it asks for no key")
    media = media_from(deadline, queue, allow_host or [], allow_folder or [])
    try:
        from vistok.serve.service import Settings
        from vistok.zoo import DEFAULT, locate

        names = tuple(models or [DEFAULT])
        for name in names:
            locate(name)  # a name that cannot be one is told before anything is loaded
        settings = Settings(
            models=names,
            method=method,
            keep=None if keep is None else parse_keep(keep),
            methods=None if methods.strip() == "all" else tuple(parse_methods(methods)),
            max_keep=max_keep,
            max_new_tokens=max_new_tokens,
            max_batch=max_batch,
            max_wait_ms=max_wait_ms,
            cache_bytes=cache_mb * 2**20,
            device=device,
            dtype=dtype,
            media=media,
        )
    except ValueError as error:
        raise _as_option(error) from error
    if engine == "ray":
        from vistok.serve.replicas import Replicas, run_on_ray

        if studio:
            raise UserError("--studio", "--engine ray", "must be with --engine local")
        try:
            wanted = Replicas.parse(replicas)
        except ValueError as error:
            raise _as_option(error) from error
        run_on_ray(settings, access, host, port, wanted, grace)
        return
    if replicas != "1":
        raise UserError("--replicas", replicas, "must be with --engine ray")
    run(settings, access, host, port, grace, with_studio() if studio else None)


def run(
    settings: Settings,
    access: Access,
    host: str,
    port: int,
    grace: float,
    page: Callable[[FastAPI], FastAPI] | None = None,
    then: Callable[[str], object] | None = None,
) -> None:
    """Serve in this process until it is told to end. ``page`` puts the studio into the application; ``then`` is
    called with the server's address when it listens."""
    from vistok.serve.app import create_app
    from vistok.serve.http import listen, serve_forever

    app = create_app(settings, access, grace_s=grace)
    if page is not None:
        app = page(app)
    listening = listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    where = f"{', '.join(settings.names)} at {address}/v1" + (f", studio at {address}/studio" if page else "")
    console(stderr=True).print(where, soft_wrap=True)
    if then is not None:
        then(address)
    serve_forever(app, listening, settings.limits, grace)


def with_studio(results: Path | None = None, seed: int = 0) -> Callable[[FastAPI], FastAPI]:
    """Puts the studio into a server's application, with the server's models. Raises UserError without Gradio."""
    try:
        from vistok.studio.app import mount
        from vistok.studio.state import ServedModels, Studio
    except ImportError as error:
        raise UserError("studio", "no Gradio", "needs it: pip install 'vistok[studio]'") from error
    return lambda app: mount(app, Studio(ServedModels(app.state.service), results, seed))


def open_to(host: str, api_key_file: Path | None, origins: list[str]) -> Access:
    """Who may speak to a server on ``host``. Raises UserError where strangers could without a key."""
    from vistok.serve.access import LOOPBACK_NAMES, Access, is_loopback

    keys = read_keys(api_key_file)
    if not keys and not is_loopback(host):
        right = f"must be 127.0.0.1 without an API key; --api-key-file or {KEY_VARIABLE} gives one"
        raise UserError("--host", host, right)
    try:
        return Access(keys, () if keys else LOOPBACK_NAMES, tuple(origins))
    except ValueError as error:
        raise _as_option(
            error, origins="--cors-origin", api_keys="--api-key-file" if api_key_file else KEY_VARIABLE
        ) from error


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The keys in ``file``, one a line, or the one in the environment. Raises UserError for a file without any."""
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "")
        return (key,) if key else ()
    keys = tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
    if not keys:
        raise UserError("--api-key-file", file, "must be a file with a key a line")
    return keys


def media_from(deadline: float, queue: int, hosts: list[str], folders: list[Path]) -> MediaPolicy:
    """Where pictures may come from, with the limits of requests. Raises UserError."""
    from vistok.serve.limits import Limits
    from vistok.serve.media import MediaPolicy

    limits = Limits(deadline_seconds=deadline, queue_length=queue)
    try:
        return MediaPolicy(limits, allow_http=bool(hosts), hosts=tuple(hosts), roots=tuple(folders))
    except ValueError as error:
        raise _as_option(error, hosts="--allow-host", roots="--allow-folder") from error


def _as_option(error: ValueError, **names: str) -> UserError:
    """The error of a field ("name: got X, must be Y") as that of the option which gave it."""
    argument, _, reason = str(error).partition(": ")
    got, _, right = reason.removeprefix("got ").partition(", ")
    return UserError(names.get(argument, "--" + argument.replace("_", "-")), got, right)
