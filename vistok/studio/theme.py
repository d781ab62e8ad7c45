"""How the studio looks: the colours of the reports' pages, the fonts of the system. Nothing is fetched."""

from __future__ import annotations

import gradio as gr

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
BLUE = gr.themes.Color(
    c50="#eef3fd", c100="#dde7fb", c200="#bccff7", c300="#93b2f2", c400="#8fb0ff", c500="#4d78de", c600="#2a56bd",
    c700="#22479c", c800="#1d3c83", c900="#1a3166", c950="#131f40", name="blue",
)  # fmt: skip
GREY = gr.themes.Color(
    c50="#fafaf8", c100="#f2f2f0", c200="#d8dae0", c300="#c3c6cd", c400="#aeb2bc", c500="#6c707b", c600="#5a5e68",
    c700="#3a3d46", c800="#1f2127", c900="#17191d", c950="#131417", name="grey",
)  # fmt: skip


def theme() -> gr.themes.Base:
    """Light and dark; text of every size has a contrast of at least 4.5 to 1 with what it stands on."""
    made = gr.themes.Base(
        primary_hue=BLUE, secondary_hue=BLUE, neutral_hue=GREY, font=SANS, font_mono=MONO,
        radius_size=gr.themes.sizes.radius_md,
    )  # fmt: skip
    return made.set(
        body_background_fill="#fafaf8",
        body_background_fill_dark="#131417",
        body_text_color="#1c1d21",
        body_text_color_dark="#ececef",
        body_text_color_subdued="#5a5e68",
        body_text_color_subdued_dark="#aeb2bc",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1f2127",
        block_border_width="1px",
        block_border_color="#d8dae0",
        block_border_color_dark="#3a3d46",
        block_label_text_color="#3a3d46",
        block_label_text_color_dark="#d8dae0",
        block_title_text_color="#3a3d46",
        block_title_text_color_dark="#d8dae0",
        input_background_fill="#ffffff",
        input_background_fill_dark="#17191d",
        input_border_width="1px",
        input_placeholder_color="#6c707b",
        input_placeholder_color_dark="#aeb2bc",
        button_primary_background_fill="#2a56bd",
        button_primary_background_fill_hover="#22479c",
        button_primary_background_fill_dark="#8fb0ff",
        button_primary_background_fill_hover_dark="#bccff7",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#131417",
        button_secondary_border_color="#c3c6cd",
        button_secondary_border_color_dark="#3a3d46",
        button_border_width="1px",
        color_accent="#2a56bd",
        slider_color="#2a56bd",
        slider_color_dark="#8fb0ff",
    )
