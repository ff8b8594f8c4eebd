"""Installed as optimum/commands/register/register_swquant.py: optimum-cli loads every file there and takes its
REGISTER_COMMANDS."""

from swquant.cli.optimum_command import REGISTER_COMMANDS

__all__ = ["REGISTER_COMMANDS"]
