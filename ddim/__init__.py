"""Schedules, samplers and the pixel-space networks."""
