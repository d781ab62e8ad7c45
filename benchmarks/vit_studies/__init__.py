"""One small training study a file: ``TITLE`` and ``study(trial, quick)``, which yields the rows of one table."""
