"""Ways out: a hardened network as a file that runs by ONNX Runtime or OpenVINO, without PyTorch."""
