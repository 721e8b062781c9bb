"""The plan: lower a spec, place every rank, verify the result."""
