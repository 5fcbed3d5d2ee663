"""What attacks measure besides one robust accuracy.

`curve` measures robust accuracy over epsilon, `minimal` the smallest
perturbations, `targeted` how often inputs can be moved to a given class.
"""
