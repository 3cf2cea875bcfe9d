"""Reconstruction of one unit: what flows into it, what is learned, and by which loss."""
