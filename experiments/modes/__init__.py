"""What `main.py --mode=...` does: train, evaluate, or measure the landscape.

Each mode takes an opened run and ends with its report.
"""
