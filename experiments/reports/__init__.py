"""Pages, tables and figures made from the files of a run.

Nothing here trains or attacks.
"""
