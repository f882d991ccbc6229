"""Matrix products of FP8 operands."""
