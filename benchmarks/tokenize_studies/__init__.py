"""Studies of visual tokenizers, one file each: docstring, TITLE, study(trial, quick) -> rows of its table."""
