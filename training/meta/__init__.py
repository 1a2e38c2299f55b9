"""Meta-learning: objectives that learn from episodes, in the one training loop (docs/fewshot.md)."""
