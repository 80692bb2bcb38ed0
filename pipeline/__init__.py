"""Selective multi-token prediction: pretraining with MTP heads (arXiv 2404.19737) under Rho-1's selection
(arXiv 2404.07965).

Imports point one way: train -> {evaluate, model, weighting, data, runtime} -> config.
"""
