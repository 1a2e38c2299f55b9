"""Fewer bits for weights, activations and gradients: number formats, scales, training with them, and what is stored."""
