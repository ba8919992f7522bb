"""Detectors that can be pre-trained, and the plain ones that come out."""
