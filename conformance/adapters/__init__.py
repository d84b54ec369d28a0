"""Thin adapters for bridges that are not ours. Each imports its bridge only inside a rank, so the suite needs none of them installed."""
