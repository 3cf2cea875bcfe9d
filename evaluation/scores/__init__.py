"""Scores, one kind a file."""
