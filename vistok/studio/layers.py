"""The tab Layers: where the attention of the last look's answers went, and which tokens each layer still had."""

from __future__ import annotations

import gradio as gr
from gradio.context import get_render_context

from vistok.studio.drawing import layers_page
from vistok.studio.html import asset
from vistok.studio.state import Studio


def build(studio: Studio) -> None:
    """Fill the tab; its contents come when it is opened."""
    shown = gr.HTML(
        layers_page(None), css_template=asset("tabs.css", "look.css"), apply_default_css=False, elem_id="layers-shown"
    )

    def opened(request: gr.Request) -> str:
        return layers_page(studio.sessions.page(request.session_hash).run)

    tab = get_render_context()
    assert isinstance(tab, gr.Tab)
    tab.select(opened, None, shown, api_visibility="private", show_progress="hidden")
