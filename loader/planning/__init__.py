"""Memory and speed before anything is loaded: budgets, plans, and the trial run that checks them.

- *Budget*: bytes that experts may use (`budget.py`).
- *Plan*: what fits within a budget, and the tokens per second to expect (`memory_plan.py`,
  `gpu_plan.py`).
- *Trial run*: a few tokens, to compare with a plan (`trial_run.py`).
"""
