"""The page: its tabs in one ``gr.Blocks``, and how it gets into a FastAPI application."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

from vistok.studio.html import asset
from vistok.studio.state import Studio

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
import gradio as gr  # it reads the line above

if TYPE_CHECKING:
    from fastapi import FastAPI

TABS = {"Look": "look", "Layers": "layers", "Compare": "compare", "Catalogue": "catalogue"}
"""Label of each tab, and the module of ``vistok.studio`` whose ``build(studio)`` fills it."""
HEAD = (
    "<header class='studio-head'><h1>vistok studio</h1>"
    "<p>Look at what a model sees with fewer visual tokens.</p></header>"
)


def build(studio: Studio) -> gr.Blocks:
    """The page, not yet served."""
    with gr.Blocks(title="vistok studio", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        gr.HTML(HEAD, apply_default_css=False)
        with gr.Tabs():
            for label, module in TABS.items():
                with gr.Tab(label, id=module):
                    import_module(f"vistok.studio.{module}").build(studio)

        def closed(request: gr.Request) -> None:
            studio.sessions.close(request.session_hash)

        page.unload(closed)
    return page.queue(api_open=False, max_size=64)


def mount(app: FastAPI, studio: Studio, path: str = "/studio") -> FastAPI:
    """``app`` with the studio at ``path``. Nothing that the page needs comes from elsewhere; no telemetry, no API page.

    Pictures that people drop are kept in Gradio's cache for at most two hours.
    """
    from vistok.studio.theme import theme

    return gr.mount_gradio_app(
        app,
        build(studio),
        path=path,
        theme=theme(),
        css=asset("studio.css"),
        head=f"<script>{asset('studio.js')}</script>",
        footer_links=[],
        run_history=False,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        max_file_size="20mb",
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=False,
    )
