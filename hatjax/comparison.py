"""Several runs in one table, beside what papers printed."""

import html
import json
import pathlib
from importlib import resources

from hatjax import score_report

BASELINES = ('real', 'copy', 'blend')


def published():
  """The papers' tables: dict of published.json.

  about: what holds for all; tables: list of source, dataset, columns, rows
  {name: [numbers or None]} and notes, the contradictions in them.
  """
  text = resources.files('hatjax').joinpath('published.json').read_text()
  return json.loads(text)


def merge(results):
  """One table of several results.

  Args:
    results: {name: result of `evaluate`}.

  Returns:
    (rows {name: {score: ...}}, list of lines that warn where the results were
    not made under the same conditions).
  """
  rows, warnings = {}, []
  first_name, first = next(iter(results.items()))
  for name in BASELINES:
    if name in first['rows']:
      rows[name] = first['rows'][name]
  for run, result in results.items():
    for name, row in result['rows'].items():
      if name not in (*BASELINES, 'alpha'):
        rows[f'{run}: {name}'] = row
    for key in (
      'records', 'fingerprint', 'split', 'image_size', 'ssim', 'extractors',
      'num_clips',
    ):
      ours, theirs = (r['settings'].get(key) for r in (first, result))
      if ours != theirs:
        warnings.append(
          f'{run} has {key} {_brief(theirs)}, {first_name} {_brief(ours)}: not '
          'comparable'
        )
  return rows, warnings


def _brief(value):
  text = json.dumps(value)
  return text if len(text) < 60 else f'{text[:57]}...'


def write(results, folder, title='Comparison'):
  """Writes comparison.json, .md and .html.

  Args:
    results: {name: result of `evaluate`}.
    folder: created.
    title: of the pages.

  Returns:
    The Markdown table.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  rows, warnings = merge(results)
  names = score_report.columns(rows)
  lines = [
    '| | ' + ' | '.join(names) + ' |', '|---' * (1 + len(names)) + '|'
  ]
  for name, row in rows.items():
    cells = [score_report.cell(row, s, s == 'psnr') for s in names]
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  under = [line.strip() for line in score_report.notes(
    next(iter(results.values()))
  )] + warnings
  table = '\n'.join([*lines, '', *(f'{line}\n' for line in under)])
  (folder / 'comparison.json').write_text(
    score_report.to_json({'results': results, 'warnings': warnings})
  )
  (folder / 'comparison.md').write_text(
    f'# {title}\n\n{table}\n{_published_markdown()}'
  )
  parts = [score_report.html_table(rows, names)]
  parts += [f'<p>{html.escape(line)}</p>' for line in under]
  (folder / 'comparison.html').write_text(
    score_report.page(title, [*parts, *_published_html()])
  )
  return table


def _cells(values):
  return ['' if v is None else f'{v:g}' for v in values]


def _published_markdown():
  known = published()
  lines = ['## Published', '', known['about'], '']
  for table in known['tables']:
    names = table['columns']
    lines += [
      f'### {table["source"]}', '', table['dataset'], '',
      '| | ' + ' | '.join(names) + ' |', '|---' * (1 + len(names)) + '|',
    ]
    for name, values in table['rows'].items():
      lines.append(f'| {name} | ' + ' | '.join(_cells(values)) + ' |')
    lines += ['', *(f'- {note}' for note in table['notes']), '']
  return '\n'.join(lines)


def _published_html():
  known = published()
  yield f'<h2>Published</h2><p>{html.escape(known["about"])}</p>'
  for table in known['tables']:
    head = ''.join(f'<th>{name}</th>' for name in table['columns'])
    rows = ''.join(
      f'<tr><td>{html.escape(name)}</td>'
      + ''.join(f'<td>{x}</td>' for x in _cells(values)) + '</tr>'
      for name, values in table['rows'].items()
    )
    notes = ''.join(f'<li>{html.escape(x)}</li>' for x in table['notes'])
    yield (
      f'<h3>{html.escape(table["source"])}: {html.escape(table["dataset"])}'
      f'</h3><table><tr><th></th>{head}</tr>{rows}</table><ul>{notes}</ul>'
    )
