"""Networks whose parameters another network predicts from a condition."""
