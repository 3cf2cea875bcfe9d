"""Calibration sets: which samples of which trajectories, in memory and on disk."""
