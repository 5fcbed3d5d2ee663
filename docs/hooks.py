"""MkDocs hooks: the tutorial as a page, and links that leave docs/.

https://www.mkdocs.org/user-guide/configuration/#hooks
"""

import json
import pathlib
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

NOTEBOOK = 'tutorial.ipynb'
PAGE = 'tutorial.md'

_LINK = re.compile(r'(!?)\[([^\]]*)\]\((\.\./[^)\s#]*)(#[^)\s]*)?\)')


def notebook_page(notebook: dict[str, Any]) -> str:
  """A notebook's cells as Markdown; code in fences, outputs left out."""
  blocks = []
  for cell in notebook['cells']:
    text = ''.join(cell['source'])
    blocks.append(
        f'```python\n{text}\n```' if cell['cell_type'] == 'code' else text)
  blocks.append(f'[Download this page as a notebook]({NOTEBOOK}).')
  return '\n\n'.join(blocks) + '\n'


def on_files(files: Files, config: Any) -> Files:
  """Adds the page of the notebook, which stays in the site for download."""
  text = (pathlib.Path(config.docs_dir) / NOTEBOOK).read_text()
  files.append(File.generated(
      config, PAGE, content=notebook_page(json.loads(text))))
  return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
  """Points links to files outside docs/ at the repository.

  Without a `source_url` they become text. A link to a file that does not exist
  stays as it is, and the strict build rejects it.
  """
  source_url = config.extra['source_url'].rstrip('/')
  docs = pathlib.Path(config.docs_dir)

  def replace(match: re.Match[str]) -> str:
    image, words, target, anchor = match.groups()
    folder = posixpath.dirname(page.file.src_uri)
    path = posixpath.normpath(posixpath.join(docs.name, folder, target))
    inside = path.startswith(f'{docs.name}/')
    if image or inside or not (docs.parent / path).exists():
      return match.group()
    if not source_url:
      return words
    return f'[{words}]({source_url}/blob/main/{path}{anchor or ""})'

  if page.file.src_uri != PAGE:
    markdown = markdown.replace(f'({NOTEBOOK})', f'({PAGE})').replace(
        f'/{NOTEBOOK})', f'/{PAGE})')
  return _LINK.sub(replace, markdown)
