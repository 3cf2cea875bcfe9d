"""Scores of image folders; knows no bits and no run folder."""
