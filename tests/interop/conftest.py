"""The command's fixtures serve here too."""

from tests.cli.conftest import chat_targets, script

__all__ = ["chat_targets", "script"]
