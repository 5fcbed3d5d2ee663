"""Pages, tables and figures made from the files of a run.

Everything is read from the run's folder; only the gallery and the weight
perturbation by layer are computed, by `experiments.evaluation.probe`.
"""
