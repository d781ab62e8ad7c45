"""Says in one line how many conformance vectors wait for their system."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.stats.get("skipped", []):
        if (
            "golden/test_golden.py" in report.nodeid
            and isinstance(report.longrepr, tuple)
            and "parameter set" not in report.longrepr[2]
        ):
            terminalreporter.write_line("golden: " + report.longrepr[2].removeprefix("Skipped: "))
