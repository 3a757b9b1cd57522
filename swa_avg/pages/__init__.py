"""Primitives of pages and pictures."""
