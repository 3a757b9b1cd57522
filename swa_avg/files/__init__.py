"""Bytes at a place, on this machine or at a URL; outputs all or nothing; JSON that may be hostile."""
