"""docs/tutorial.ipynb runs, shortened, and is stored without outputs."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / 'docs' / 'tutorial.ipynb').read_text())


def test_notebook_is_stored_without_outputs():
  for cell in NOTEBOOK['cells']:
    assert not cell.get('outputs') and cell.get('execution_count') is None


@pytest.mark.slow
def test_notebook_runs(tmp_path):
  """Its code cells as one script, in a process of its own."""
  script = tmp_path / 'tutorial.py'
  script.write_text('\n\n'.join(
      ''.join(cell['source']) for cell in NOTEBOOK['cells']
      if cell['cell_type'] == 'code'))
  environment = os.environ | {
      'MPLBACKEND': 'Agg', 'PYTHONPATH': str(ROOT), 'TUTORIAL_EPOCHS': '3'}
  done = subprocess.run(
      [sys.executable, str(script)], cwd=tmp_path, env=environment,
      capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  gaps = re.findall(r'^(AT|AT-AWP) +gap -?\d+\.\d points$', done.stdout, re.M)
  attacked = re.findall(
      r'^(AT|AT-AWP) +natural (\d+) %, robust (\d+) %$', done.stdout, re.M)
  assert gaps == [name for name, _, _ in attacked] == ['AT', 'AT-AWP']
  for _, natural, robust in attacked:
    assert 20 < int(natural) > int(robust)
