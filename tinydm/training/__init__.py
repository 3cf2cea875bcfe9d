"""Training of the models that ship, and of quantized ones."""
