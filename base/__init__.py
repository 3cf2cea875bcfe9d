"""The ground floor: what every room uses and nothing of which knows what a diffusion model is."""
