"""``python -m vistok``: the same as the ``vistok`` command."""

from vistok.cli.app import main

if __name__ == "__main__":
    main()
