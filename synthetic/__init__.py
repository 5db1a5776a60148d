"""Synthetic data sets in the layout of the real ones: python -m synthetic digits|fashion|faces DIR."""
