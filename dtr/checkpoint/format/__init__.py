"""What one rank's part is made of: a typed tree and tensors, laid out as a safetensors file."""
