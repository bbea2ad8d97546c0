"""How good a model is. One module a question; import the module: `from hypenet_jax.evals import niah`.

niah: RULER's NIAH-Single-1/2/3, by generation or by one forward. perplexity: over windows, whole and by position.
recall, choice: two cheap probes for layer selection. report: one self-contained page about a conversion.
"""
