"""Evaluation: perplexity, comparison with the original, benchmarks by lm-eval."""
