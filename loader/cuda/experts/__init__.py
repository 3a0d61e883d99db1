"""Experts on GPUs: slots in GPU memory, a tier of page-locked RAM behind them, products by our
kernels.
"""
