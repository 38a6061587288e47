"""Several processes against what PyTorch's own distributed modules do with the same model."""
