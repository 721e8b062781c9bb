"""Starts the processes of an artifact, watches them, and reports. Standard library only: no torch, no pydantic."""

from helixc.launch.driver import launch
from helixc.launch.options import LaunchError, LaunchOptions

__all__ = ["LaunchError", "LaunchOptions", "launch"]
