"""Latent-space models: autoencoders, conditioning, U-Net."""
