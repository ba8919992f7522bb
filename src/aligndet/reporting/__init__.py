"""Runs and comparisons as one HTML page."""
