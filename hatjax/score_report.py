"""The scores as a table, a Markdown page and an HTML page with videos.

The folder needs nothing outside: scores.json, report.md, report.html, and
strips/, videos/, curves/ beside them.
"""

import html
import json
import math
import pathlib
import re
import shutil

import numpy as np

from hatjax import scores, video

NEED_NO_MODEL = ('real', 'copy', 'blend')
STRIP_FRAMES = 8
_STYLE = '''
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto;
  padding: 0 1rem; max-width: 1400px; color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93em;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .4rem; text-align: right; border-bottom: 1px solid #ddd;
  white-space: nowrap; vertical-align: middle; }
th { white-space: normal; font-size: .85em; }
th:first-child, td:first-child { text-align: left; }
small { color: #777; display: block; font-size: .7em; }
.best { font-weight: 700; }
.baseline td { color: #777; }
.clip { margin: 1.2rem 0 2rem; } .clip img { height: 96px; }
.clip td { border: 0; padding: .15rem .5rem; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 12px; }
'''


class Gallery:
  """Keeps a few clips to show, one of each label first; writes frames if asked.

  Args:
    folder: of the report.
    shown: how many clips.
    frames: whether to write every frame of every clip as PNG,
      frames/<row>/<clip>/0000.png.
  """

  def __init__(self, folder, shown=6, frames=False):
    self.folder, self.frames = pathlib.Path(folder), frames
    self._shown, self._first, self._others = shown, {}, []
    self._added = []

  def __call__(self, clip, made):
    """Takes a clip and {row: uint8 [T, H, W, 3]}."""
    if self.frames:
      for row, frames in made.items():
        path = self.folder / 'frames' / file_name(row) / file_name(clip['id'])
        video.write_video(f'{path}/', frames)
    if clip['label_name'] not in self._first:
      self._first[clip['label_name']] = (clip, made)
    elif len(self._others) < self._shown:
      self._others.append((clip, made))

  def add(self, clip, made):
    """Shows this as well, behind the others."""
    self._added.append((clip, made))

  @property
  def clips(self):
    """Those to show: list of (clip, {row: video})."""
    kept = [*self._first.values(), *self._others][: self._shown]
    return kept + self._added


def to_json(result):
  """The text of a json file; what is not known (nan) is null there."""
  def clean(x):
    if isinstance(x, dict):
      return {k: clean(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
      return [clean(v) for v in x]
    return None if isinstance(x, float) and math.isnan(x) else x

  return json.dumps(clean(result), indent=1) + '\n'


def file_name(text):
  """Letters, digits, - _ . = of a text, the rest replaced."""
  return re.sub(r'[^\w.=-]+', '_', text)


def columns(rows):
  """Keys of the scores that any row has, in the order of `scores.COLUMNS`."""
  there = {score for row in rows.values() for score in row}
  found = []
  for name in scores.COLUMNS:
    found += [name] if name in there else []
    sized = [s for s in there if s.startswith(f'{name}@')]
    found += sorted(sized, key=lambda s: -int(s.split('@')[1]))
  return found


def cell(row, score, interval=False):
  """A score as text; '' where the row has none."""
  value = row.get(score)
  if value is None or math.isnan(value['mean']):
    return ''
  form = scores.COLUMNS[score.split('@')[0]][0]
  text = format(value['mean'], form)
  if interval and 'low' in value:
    text += f' ({value["low"]:{form}} to {value["high"]:{form}})'
  return text


def table(result):
  """Markdown: one row each; PSNR with its interval; what is missing and why."""
  rows = {k: v for k, v in result['rows'].items() if k != 'alpha'}
  names = columns(rows)
  lines = [
    '| | ' + ' | '.join(names) + ' |', '|---' * (1 + len(names)) + '|'
  ]
  for name, row in rows.items():
    cells = [cell(row, s, interval=s == 'psnr') for s in names]
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  return '\n'.join([*lines, '', *notes(result)])


def notes(result):
  """What must stand under a table: counts, embedder, what is not computed."""
  found, n = [], result['n']
  if 'alpha' in result['rows']:
    orders = result['clips']['alpha']['spearman']
    found.append(
      f'Inferred alpha, Spearman with the true one: mean '
      f'{np.nanmean(orders):.3f}, median {np.nanmedian(orders):.3f}, lowest '
      f'{np.nanmin(orders):.3f}.'
    )
  people = f' of {n["subjects"]} people' if n['subjects'] else ''
  settings = result['settings']
  step = ''
  if 'split' in settings:
    step = f', {settings["split"]}, step {settings["step"]}'
  found.append(
    f'{n["clips"]} clips{people}{step}; {n["skipped"]} skipped. SSIM: '
    f'{settings["ssim"]} window.'
  )
  if settings.get('notes'):
    said = [f'{name} {value}' for name, value in settings['notes'].items()]
    found.append(f'{", ".join(said)}.')
  for use, extractor in settings['extractors'].items():
    checksum = extractor.get('checksum', '')
    found.append(
      f'{use}: {extractor["about"]}'
      + (f' [{checksum[:19]}]' if checksum else '') + '.'
    )
  missed = [
    f'{name} {row["faces_missed"]}/{row["faces_sought"]}'
    for name, row in result['rows'].items() if row.get('faces_missed')
  ]
  if any('faces_sought' in row for row in result['rows'].values()):
    found.append(
      f'Faces not found: {", ".join(missed) or "none"}; such frames are left '
      'out, a clip with more than half of them has no ACD.'
    )
  reasons = {}
  for name, why in result['not_computed'].items():
    reasons.setdefault(why, []).append(name)
  found += [f'{", ".join(names)}: {why}.' for why, names in reasons.items()]
  return [f'{line}\n' for line in found]


def write(result, gallery, folder, curves=()):
  """Writes the whole report.

  Args:
    result: of `evaluate`.
    gallery: Gallery.
    folder: pathlib.Path; created.
    curves: list of (title, PNG file of loss curves).
  """
  folder = pathlib.Path(folder)
  for part in ('strips', 'videos', 'curves'):
    (folder / part).mkdir(parents=True, exist_ok=True)
  shown = [_draw(folder, clip, made) for clip, made in gallery.clips]
  pictures = []
  for title, path in curves:
    if pathlib.Path(path).is_file():
      name = f'curves/{file_name(title)}.png'
      shutil.copyfile(path, folder / name)
      pictures.append((title, name))
  (folder / 'scores.json').write_text(to_json(result))
  (folder / 'report.md').write_text(_markdown(result, shown, pictures))
  (folder / 'report.html').write_text(_html(result, shown, pictures))


def _draw(folder, clip, made):
  """Strips and a video of one clip; dict of what was written."""
  name = file_name(clip['id'])
  rows = [r for r in made if not needs_no_model(r)]
  rows += [r for r in ('blend', 'real') if r in made]
  picture = f'strips/{name}_input.png'
  video.write_image(folder / picture, clip['video'][0])
  strips = {}
  for row in rows:
    strips[row] = f'strips/{name}_{file_name(row)}.png'
    frames = video.strip(made[row], STRIP_FRAMES)
    video.write_image(folder / strips[row], frames)
  movie = f'videos/{name}.mp4'
  # Small clips are enlarged, so that their captions can be read.
  scale = max(1, round(160 / clip['video'].shape[1]))
  large = lambda x: x.repeat(scale, 1).repeat(scale, 2)
  grid = video.grid_with_labels(
    np.stack([large(made[row]) for row in ('copy', *rows)]),
    ['input', *rows], columns=min(6, 1 + len(rows)),
  )
  # Forth, a moment's rest, and from the start.
  grid = np.concatenate([grid, grid[-1:].repeat(6, 0)])
  video.write_video(folder / movie, grid, 12)
  title = clip['id']
  if clip['label_name'] not in title:
    title += f', {clip["label_name"]}'
  return {
    'title': title, 'input': picture, 'strips': strips, 'movie': movie,
  }


def _title(result):
  settings = result['settings']
  return f'Scores of {settings.get("workdir") or settings.get("generated")}'


def _markdown(result, shown, pictures):
  lines = [f'# {_title(result)}', '', table(result), '## Scores', '']
  lines += [
    f'- `{name}`: {scores.COLUMNS[name.split("@")[0]][1]}'
    for name in columns(result['rows'])
  ]
  for clip in shown:
    lines += [
      '', f'## {clip["title"]}', '', f'![input]({clip["input"]})', '',
    ]
    for row, path in clip['strips'].items():
      lines += [f'{row}:', '', f'![{row}]({path})', '']
    lines.append(f'[video]({clip["movie"]})')
  for title, path in pictures:
    lines += ['', f'## Losses of {title}', '', f'![losses]({path})']
  if result['skipped']:
    lines += ['', '## Skipped', '', *(f'- {x}' for x in result['skipped'])]
  settings = json.dumps(result['settings'], indent=1)
  return '\n'.join([*lines, '', '## Settings', '', f'```\n{settings}\n```', ''])


def needs_no_model(row):
  """Whether a row is a baseline: shown in grey, competing with nothing."""
  return row in NEED_NO_MODEL or row.endswith('temporal mean')


def html_table(rows, names):
  """The scores as an HTML table; the best of each column is bold."""
  best = {}
  for score in names:
    sign = scores.COLUMNS[score.split('@')[0]][2]
    known = {
      name: row[score]['mean'] for name, row in rows.items()
      if score in row and not needs_no_model(name)
      and not math.isnan(row[score]['mean'])
    }
    if sign and len(known) > 1:
      best[score] = max(known, key=lambda name: sign * known[name])
  head = ''.join(
    f'<th title="{html.escape(scores.COLUMNS[s.split("@")[0]][1])}">'
    f'{s.replace("_", "_<wbr>")}</th>' for s in names
  )
  lines = [f'<div class="wide"><table><tr><th></th>{head}</tr>']
  for name, row in rows.items():
    cells = []
    for score in names:
      mark = ' class="best"' if best.get(score) == name else ''
      value, form = row.get(score, {}), scores.COLUMNS[score.split('@')[0]][0]
      low = ''
      if 'low' in value and not math.isnan(value['low']):
        low = f'<small>{value["low"]:{form}} – {value["high"]:{form}}</small>'
      cells.append(f'<td{mark}>{cell(row, score)}{low}</td>')
    kind = ' class="baseline"' if needs_no_model(name) else ''
    lines.append(
      f'<tr{kind}><td>{html.escape(name)}</td>{"".join(cells)}</tr>'
    )
  return '\n'.join([*lines, '</table></div>'])


def page(title, parts):
  """A whole HTML page."""
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f'<title>{html.escape(title)}</title><style>{_STYLE}</style>'
    f'<h1>{html.escape(title)}</h1>\n' + '\n'.join(parts) + '\n</html>\n'
  )


def _html(result, shown, pictures):
  rows = {k: v for k, v in result['rows'].items() if k != 'alpha'}
  names = columns(rows)
  parts = [html_table(rows, names)]
  parts.append(
    '<p>Small: 95 % bootstrap interval over clips. Grey rows are baselines.</p>'
  )
  parts += [f'<p>{html.escape(line)}</p>' for line in notes(result)]
  for clip in shown:
    lines = [
      f'<h2>{html.escape(clip["title"])}</h2><div class="clip">'
      f'<video src="{clip["movie"]}" autoplay loop muted controls playsinline>'
      f'</video><div class="wide"><table><tr><td>input</td>'
      f'<td style="text-align:left"><img src="{clip["input"]}"></td></tr>'
    ]
    lines += [
      f'<tr><td>{html.escape(row)}</td><td><img src="{path}"></td></tr>'
      for row, path in clip['strips'].items()
    ]
    parts.append(''.join(lines) + '</table></div></div>')
  for title, path in pictures:
    parts.append(
      f'<h2>Losses of {html.escape(title)}</h2>'
      f'<div class="wide"><img src="{path}"></div>'
    )
  if result['skipped']:
    items = ''.join(f'<li>{html.escape(x)}</li>' for x in result['skipped'])
    parts.append(f'<h2>Skipped</h2><ul>{items}</ul>')
  meanings = ''.join(
    f'<li><code>{s}</code>: {html.escape(scores.COLUMNS[s.split("@")[0]][1])}'
    '</li>' for s in names
  )
  settings = html.escape(json.dumps(result['settings'], indent=1))
  parts.append(
    f'<h2>Scores</h2><ul>{meanings}</ul><h2>Settings</h2><pre>{settings}</pre>'
    '<p>Every clip: <a href="scores.json">scores.json</a></p>'
  )
  return page(_title(result), parts)
