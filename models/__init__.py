"""What a pretrained diffusion model is: networks by name, weights, data, training."""
