"""Oulu-CASIA NIR&VIS, as its archives unpack: either of two trees.

  <raw>/.../OriginalImg/VL/Strong/P001/Anger/000.jpeg           320x240
  <raw>/.../PreProcess Img/VL_Acropped/Strong/P001/Anger/000.jpeg  face crops

VL is the visible camera, NI the infrared one; the light is Strong, Weak or
Dark. One `condition` is read, vl_strong unless told otherwise (the usual 480
sequences); any other is part of the records' name: oulu_casia/face-256-ni_weak.
Folders above are found whatever they are called. Where both trees are there the
original frames are read; for the crops, which are small already, pass their
own folder and --crop none. Sequences go from neutral to apex. Six expressions
of 80 subjects; ids are P001_anger.
"""

import re

from . import face_video

LABELS = ['anger', 'disgust', 'fear', 'happiness', 'sadness', 'surprise']
CONDITIONS = tuple(
  f'{camera}_{light}' for camera in ('vl', 'ni')
  for light in ('strong', 'weak', 'dark')
)  # the first is the default
SUBJECTS = 80
DEPTH = 5  # folders between <raw> and those of the subjects


class OuluCasia(face_video.FaceVideo, skip_registration=True):
  """Oulu-CASIA: six expressions of 80 subjects, from neutral to apex."""


def scan(raw, subjects=None, condition=CONDITIONS[0]):
  """Finds the sequences of one camera and light."""
  if subjects is not None:
    raise ValueError(
      'Oulu-CASIA names its subjects itself: leave out --subjects.'
    )
  found = face_video.Scan(raw, LABELS)
  root = _find_root(raw, condition, found)
  for folder in face_video.list_entries(root):
    if folder.is_dir() and _is_subject(folder):
      _scan_subject(folder, found)
    else:
      found.skip(folder, 'is not a subject folder (P001). Move it away.')
  subjects = {clip.subject for clip in found.clips}
  expected = SUBJECTS * len(LABELS)
  if len(found.clips) != expected:
    found.notes.append(
      f'{len(found.clips)} sequences of {len(subjects)} subjects, the whole '
      f'database has {expected} of {SUBJECTS}: is it unpacked completely?'
    )
  return found


def _find_root(raw, condition, found):
  """The folder of the subjects: <camera...>/<light>, the original frames."""
  camera, light = condition.split('_')
  roots, seen = [], set()
  folders = [raw]
  for _ in range(DEPTH + 1):
    for folder in folders:
      if not any(_is_subject(path) for path in _folders(folder)):
        continue
      here = _condition(folder)
      seen.add(here)
      if here == (camera, light):
        roots.append(folder)
    folders = [p for f in folders for p in _folders(f) if not _is_subject(p)]
  if not roots:
    known = sorted('_'.join(here) for here in seen if all(here))
    raise ValueError(
      f'{raw} holds no subjects (P001) in a folder {light.title()} below one '
      f'named {camera.upper()}. '
      + (f'Here are: {", ".join(known)}. Pass --condition.' if known else
         'Pass the folder into which Oulu-CASIA was unpacked.')
    )
  original = [r for r in roots if 'crop' not in r.parent.name.lower()]
  if len(roots) > 1 and len(original) != 1:
    raise ValueError(
      f'{raw} holds {condition} more than once. Pass one of: '
      f'{", ".join(str(root) for root in roots[:3])}'
    )
  if len(roots) > 1:
    found.notes.append('face crops are there as well; the frames are read')
  return (original or roots)[0]


def _folders(folder):
  return [path for path in face_video.list_entries(folder) if path.is_dir()]


def _is_subject(folder):
  return re.fullmatch('[Pp][0-9]{3}', folder.name) is not None


def _condition(folder):
  """(camera, light) that a folder's path says; None for what it does not."""
  light, camera = folder.name.lower(), folder.parent.name.lower()[:2]
  return (
    camera if camera in ('vl', 'ni') else None,
    light if light in ('strong', 'weak', 'dark') else None,
  )


def _scan_subject(folder, found):
  for path in face_video.list_entries(folder):
    label = path.name.lower()
    if label not in LABELS or not path.is_dir():
      names = ', '.join(name.title() for name in LABELS)
      found.skip(path, f'is no expression. Name it one of: {names}.')
      continue
    frames = face_video.list_frames(path, found)
    if not frames:
      found.skip(path, 'holds no frames. Unpack its archive again.')
      continue
    subject = folder.name.upper()
    found.clips.append(
      face_video.Clip(f'{subject}_{label}', label, subject, frames)
    )
