"""What a pretrained diffusion model is: networks by name, weights, conditions, data, sampling."""
