"""Measuring: methods side by side on pictures and questions, and the claims of the catalogue."""
