"""The quantization library: tensors and modules; it knows no data set and no script."""
