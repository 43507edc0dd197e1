"""Folders of frames in AffineGAN's layout, one folder per expression.

  <raw>/<expression>/train/img/<video>/<frame>.jpg    neutral face first
  <raw>/<expression>/train/patch/<video>/<frame>.jpg  lip masks, optional
  <raw>/<expression>/test/img/<video>/<frame>.jpg     a face to animate
  <raw>/subjects.csv                                  optional: id,subject

Expressions may have any names; they become the labels. Frames are taken in
natural order (2 < 10), from any number on, with or without gaps, and their
type is read from their content. A mask has the name of its frame (another
ending will do). Entries of `img` with a dot in their name are not videos.
Of a folder below `test/img` the first frame counts.

The layout names no persons. The id of a clip, `<expression>/<video>`, is its
subject, unless subjects.csv or a pattern says who it shows.
"""

import csv
import re

from . import face_video

CURE = (
  'Expected <raw>/<expression>/train/img/<video>/<frame>.jpg: pass the folder '
  'that holds the expression folders.'
)


class FrameFolders(face_video.FaceVideo, skip_registration=True):
  """Clips of faces going from neutral to an expression, and single faces."""


def scan(raw, subjects=None):
  """Finds clips and stills.

  Args:
    raw: the folder of the expression folders.
    subjects: regular expression searched in a clip's id; its first group, or
      all of the match, is the subject.
  """
  folders = [path for path in face_video.list_entries(raw) if path.is_dir()]
  labels = [p.name for p in folders if (p / 'train' / 'img').is_dir()]
  if not labels:
    raise ValueError(_say_what_is_wrong(raw, folders))
  found = face_video.Scan(raw, sorted(labels))
  for folder in folders:
    if folder.name in labels:
      _scan_videos(folder / 'train', folder.name, found)
      _scan_videos(folder / 'test', folder.name, found)
    elif (folder / 'test' / 'img').is_dir():
      found.skip(folder, 'has test/img but no train/img. Add train/img.')
  _name_subjects(found, subjects)
  return found


def _scan_videos(part, label, found):
  still = part.name == 'test'
  if not (part / 'img').is_dir():
    return
  for folder in face_video.list_entries(part / 'img'):
    if not folder.is_dir() or '.' in folder.name:
      reason = 'is not a video folder (no dots in its name). Move it away.'
      found.skip(folder, reason)
      continue
    name = f'{label}/test/{folder.name}' if still else f'{label}/{folder.name}'
    frames = face_video.list_frames(folder, found)
    if not frames:
      found.skip(folder, 'holds no frames. Add them or remove the folder.')
      continue
    if still and len(frames) > 1:
      found.notes.append(f'{name}: of its {len(frames)} frames one is used')
      frames = frames[:1]
    masks = _find_masks(part / 'patch', folder.name, frames, found)
    found.clips.append(
      face_video.Clip(name, label, name, frames, masks, still=still)
    )


def _find_masks(patch, video, frames, found):
  """A mask or None for every frame; None where there is no folder of masks."""
  folder = patch / video
  if not folder.is_dir():
    if patch.is_dir():
      found.skip(
        folder,
        'is missing: this clip has no masks, a box around its mouth is used. '
        'Add the folder.',
      )
    return None
  entries = face_video.list_entries(folder)
  named = {path.name: path for path in entries}
  stems = {path.stem: path for path in entries}
  return [named.get(f.name) or stems.get(f.stem) for f in frames]


def _name_subjects(found, pattern):
  """Sets `subject` of every clip, from subjects.csv or a pattern, if any."""
  table = found.raw / 'subjects.csv'
  if pattern is not None:
    who = _subjects_by_pattern(pattern, found)
  elif table.is_file():
    who = _subjects_by_table(table)
  else:
    found.notes.append(
      'the layout names no persons: every clip counts as a subject of its own, '
      'so one person can be in train and in test. Say who is who with '
      '--subjects REGEX, or subjects.csv (id,subject) in the raw folder.'
    )
    return
  lost = [clip.id for clip in found.clips if clip.id not in who]
  if lost:
    found.notes.append(
      f'no subject for {len(lost)} clips ({", ".join(lost[:3])}, ...): each '
      'counts as a subject of its own'
    )
  for clip in found.clips:
    clip.subject = who.get(clip.id, clip.id)


def _subjects_by_pattern(pattern, found):
  try:
    pattern = re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f'--subjects {pattern!r} is not a regular expression ({error}). '
      r"Example: '/(person\d+)_'"
    ) from None
  matches = {clip.id: pattern.search(clip.id) for clip in found.clips}
  if not any(matches.values()):
    raise ValueError(
      f'--subjects {pattern.pattern!r} matches no clip. Ids look like this: '
      f'{found.clips[0].id if found.clips else "<expression>/<video>"}'
    )
  return {
    name: match[1] if pattern.groups else match[0]
    for name, match in matches.items() if match
  }


def _subjects_by_table(path):
  with open(path, newline='', encoding='utf-8-sig') as file:
    rows = [row for row in csv.reader(file) if any(row)]
  if any(len(row) != 2 for row in rows):
    raise ValueError(f'{path} must hold lines "id,subject": anger/vid_1,anna')
  return {name.strip(): subject.strip() for name, subject in rows}


def _say_what_is_wrong(raw, folders):
  if (raw / 'train' / 'img').is_dir():
    return f'{raw} is one expression. Pass the folder above it: {raw.parent}'
  for folder in folders:
    if any(folder.glob('*/train/img')):
      return f'{raw} holds the data one level deeper. Pass {folder}'
  return f'{raw} holds no <expression>/train/img folder. {CURE}'
