"""The command line."""

from fastft.cli.main import command, leave, main

__all__ = ["command", "leave", "main"]
