"""The modes of `main.py`: train, evaluate, or measure the landscape.

Each mode takes an opened run and writes its results and the report.
"""
