"""Experts on CUDA GPUs: kernels over the packed bytes, and the slots, copies and steps that serve
them.
"""
