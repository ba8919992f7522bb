"""Figures and pictures of detectors."""
