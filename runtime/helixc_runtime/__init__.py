"""The helixc runtime: loads an artifact for one rank and executes exact Helix decode."""
