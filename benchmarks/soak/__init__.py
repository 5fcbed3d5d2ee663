"""Kills, stops and damages real runs at random moments, and counts outcomes.

  python -m benchmarks.soak                # all of it, some hours
  python -m benchmarks.soak --parts=damage --count=20

Every command is `experiments/main.py` or `table.py` in a process of its own, on
a small setting of the embedded digits. An interrupted command is started again
until it ends. What it then leaves is compared with what an uninterrupted one
left: arrays and metrics bit by bit, without times. The counts go to
docs/results/reliability.json, a part at a time.

  kill      SIGKILL, during training, evaluation, landscape and tables
  stop      SIGTERM and SIGINT, during training and evaluation
  damage    a file of a stopped run is cut off, emptied, removed or changed
  storage   the disk is full, the workdir becomes read-only or is removed
  long run  5,000 steps: memory, files, threads and compilations
"""
