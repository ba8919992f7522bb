"""Boxes for images without labels."""
