"""How the shipped models were trained: one file a model, its ``RECIPE`` found by the name of the file."""
