"""Evaluation of models: perplexity, comparison with the original, benchmarks by lm-eval.

- *Window*: BOS and the tokens that follow it in a text; windows do not overlap. All tokens but the
  first are scored (`perplexity.py`).
- *Perplexity*: exp of the mean negative log-likelihood of the scored tokens (`perplexity.py`).
- *KL*: mean KL divergence from the original's predictions, in nats per token (`comparison.py`).
- *Agreement*: share of tokens for which two models have the same first choice (`comparison.py`).
- *Task*: a benchmark of lm-eval (`lm_eval_tasks.py`).

Invariant: all measures are computed from float32 logits.
"""
