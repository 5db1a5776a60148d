"""Made data in the layout of the real sets: python -m mvae.synthetic digits|fashion|faces DIR."""
