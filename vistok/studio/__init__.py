"""The studio: a web page where people look at visual tokens. Gradio, all of it local; needs the extra ``studio``."""
