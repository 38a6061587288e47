"""Seconds and memory of saving and loading a model with its optimizer, beside torch.save, DCP and safetensors."""
