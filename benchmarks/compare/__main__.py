"""Runs the comparison: `python -m benchmarks.compare`."""

from benchmarks.compare import main

if __name__ == '__main__':
  main.main()
