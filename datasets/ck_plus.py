"""CK+, the Extended Cohn-Kanade database, as its four archives unpack.

  <raw>/cohn-kanade-images/S005/001/S005_001_00000011.png
  <raw>/Emotion/S005/001/S005_001_00000011_emotion.txt      last frame only
  <raw>/Landmarks/S005/001/S005_001_00000011_landmarks.txt  optional
  <raw>/FACS/S005/001/S005_001_00000011_facs.txt            optional

The four folders may each lie one level deeper, as when every archive was
unpacked into a folder of its own. Sequences go from neutral to apex. Of the
593 only 327 have an Emotion file, that is a label; the others are skipped. Lip
masks are drawn from the landmarks 48-59.
"""

from . import face_video

EMOTIONS = (
  'neutral', 'anger', 'contempt', 'disgust', 'fear', 'happy', 'sadness',
  'surprise',
)
LABELS = list(EMOTIONS[1:])
CURE = (
  'Pass the folder into which the CK+ archives were unpacked: it holds '
  'cohn-kanade-images, Emotion and, if wanted, Landmarks and FACS.'
)


class CkPlus(face_video.FaceVideo, skip_registration=True):
  """CK+: sequences from neutral to the apex of seven expressions."""


def scan(raw, subjects=None):
  """Finds the labelled sequences."""
  if subjects is not None:
    raise ValueError('CK+ names its subjects itself: leave out --subjects.')
  images, emotion = _find(raw, 'cohn-kanade-images'), _find(raw, 'Emotion')
  if images is None:
    raise ValueError(f'{raw} holds no folder cohn-kanade-images. {CURE}')
  if emotion is None:
    raise ValueError(
      f'{raw} holds no folder Emotion, so nothing has a label. Unpack '
      'Emotion_labels.zip beside cohn-kanade-images.'
    )
  found = face_video.Scan(raw, LABELS)
  extra = {name: _find(raw, name) for name in ('Landmarks', 'FACS')}
  missing = [name for name, folder in extra.items() if folder is None]
  if missing:
    found.notes.append(f'without the optional {" and ".join(missing)}')
  for subject in face_video.list_entries(images):
    if not subject.is_dir():
      found.skip(subject, 'is not a subject folder. Move it away.')
      continue
    for folder in face_video.list_entries(subject):
      _scan_sequence(folder, emotion, extra, found)
  return found


def _scan_sequence(folder, emotion, extra, found):
  place = f'{folder.parent.name}/{folder.name}'
  if not folder.is_dir():
    found.skip(folder, 'is not a sequence folder. Move it away.')
    return
  frames = face_video.list_frames(folder, found)
  if not frames:
    found.skip(folder, 'holds no frames. Unpack its archive again.')
    return
  try:
    label = _read_label(emotion / place)
  except ValueError as error:
    found.skip(folder, str(error))
    return
  landmarks = None
  if extra['Landmarks'] and (extra['Landmarks'] / place).is_dir():
    landmarks = _find_landmarks(extra['Landmarks'] / place, frames, found)
  found.clips.append(
    face_video.Clip(
      id=place.replace('/', '_'),
      label=label,
      subject=folder.parent.name,
      frames=frames,
      landmarks=landmarks,
      facs=_read_facs(extra['FACS'] and extra['FACS'] / place, found),
    )
  )


def _find(raw, name):
  """A folder of that name in `raw` or one level below."""
  places = [raw / name]
  places += [p / name for p in face_video.list_entries(raw) if p.is_dir()]
  return next((p for p in places if p.is_dir()), None)


def _texts(folder, ending):
  if not folder or not folder.is_dir():
    return []
  entries = face_video.list_entries(folder)
  return [path for path in entries if path.name.endswith(ending)]


def _read_label(folder):
  files = _texts(folder, '_emotion.txt')
  if not files:
    raise ValueError('no Emotion file, so no label (CK+ labels 327 of 593).')
  text = files[-1].read_text(errors='replace').strip()
  try:
    code = float(text)
  except ValueError:
    code = -1
  if code not in range(1, len(EMOTIONS)):
    raise ValueError(
      f'{files[-1].name} says {text[:20]!r}, expected a number from 1 to 7. '
      'Unpack Emotion_labels.zip again.'
    )
  return EMOTIONS[int(code)]


def _find_landmarks(folder, frames, found):
  """The file of every frame, or None."""
  files = [folder / f'{path.stem}_landmarks.txt' for path in frames]
  for file in files:
    if not file.is_file():
      reason = 'is missing: the frame gets an empty mask. Unpack Landmarks.zip.'
      found.skip(file, reason)
  return [file if file.is_file() else None for file in files]


def _read_facs(folder, found):
  """'AU:intensity AU:intensity'; intensity 0 is present, strength not given."""
  units = []
  for file in _texts(folder, '_facs.txt')[-1:]:
    for line in file.read_text(errors='replace').split('\n'):
      try:
        numbers = [float(word) for word in line.split()]
        if numbers:
          unit, intensity = numbers
          units.append(f'{unit:g}:{intensity:g}')
      except ValueError:
        reason = f'{line[:20]!r} is not "AU intensity". Unpack it again.'
        found.skip(file, reason)
  return ' '.join(units)
