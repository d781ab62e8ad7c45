"""The command line: ``vistok ask | compare | systems | show | try | world | train``. See vistok.cli.app."""
