"""Folders of clips, left where they are: frames are decoded when wanted.

VoxCeleb as the first-order model's preprocessing leaves it:

  <raw>/{train,test}/<person>#<video>#<start>#<end>.mp4

where an .mp4 may be a folder of pictures, or any folder of clips:

  <raw>/<clip>.mp4            every clip is a person of its own
  <raw>/<person>/<clip>.mp4   as the folders say

The records hold the times of the frames and where to crop them; the clips must
stay where they are. --crop given (default) is for clips that already show one
face close up; face crops to one square around all places that the head is in,
track to a square that follows it; none takes whole frames. Seeking in a file
decodes from its last key frame on: folders of pictures read faster.
"""

import hashlib
import json
import re

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from hatjax import clips, faces, video

from . import face_video

CROPS = ('given', 'face', 'track', 'none')
PARTS = ('train', 'test')
ENDINGS = ('.mp4', '.mov', '.m4v', '.mkv', '.webm', '.avi')
MARGIN = 0.35  # around a Viola-Jones box, as a part of its side
LABEL = 'any'


class Voxceleb(face_video.FaceVideo, skip_registration=True):
  """Clips of faces in motion, decoded from where they lie."""

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, description=type(self).__doc__, features=features(),
      metadata=tfds.core.MetadataDict(),
    )

  def _generate_examples(self):
    found, options = self.builder_config.scan, self.builder_config.options
    metadata, fingerprint = self.info.metadata, {}
    misses = count = 0
    metadata.update(
      options=options, labels=found.labels, clips={}, raw=str(found.raw),
      raw_digest=self.builder_config.raw_digest,
    )
    for clip in tqdm.tqdm(found.clips, unit='clip', desc=self.name):
      record = make_record(clip, options, found)
      if record is None:
        continue
      fingerprint[clip.id] = record.pop('digest')
      misses, count = misses + record.pop('misses'), count + record.pop('seen')
      metadata['clips'][clip.id] = {
        'label': clip.label, 'subject': clip.subject,
        'num_frames': len(record['times']), 'still': False,
      }
      yield clip.id, record
    if not metadata['clips']:
      raise ValueError(f'No usable clip in {found.raw}. Mend what is listed.')
    content = json.dumps(sorted(fingerprint.items()))
    if count:
      found.notes.append(
        f'no face in {misses} of {count} frames ({100 * misses / count:.1f} '
        '%): the last box was kept'
      )
    metadata['fingerprint'] = hashlib.sha256(content.encode()).hexdigest()
    metadata['splits'] = make_splits(metadata['clips'])
    metadata['report'] = {
      'masks': {}, 'notes': found.notes,
      'skipped': [list(entry) for entry in found.skipped],
    }


def features():
  """The record."""
  return tfds.features.FeaturesDict({
    'path': tfds.features.Text(),  # below the raw folder
    'times': tfds.features.Sequence(np.int64),
    # (x0, y0, x1, y1) of every frame; empty for whole frames.
    'boxes': tfds.features.Sequence(
      tfds.features.Tensor(shape=(4,), dtype=np.int32)
    ),
    'label': tfds.features.ClassLabel(names=[LABEL]),
    'subject': tfds.features.Text(),
    'id': tfds.features.Text(),
    'alpha': tfds.features.Sequence(np.float32),  # empty: unknown
  })


def scan(raw, subjects=None):
  """Finds clips.

  Args:
    raw: folder of them, or of train and test.
    subjects: regular expression searched in a clip's id; its first group, or
      all of the match, is the person.
  """
  found = face_video.Scan(raw, [LABEL])
  parts = [raw / part for part in PARTS if (raw / part).is_dir()]
  for folder in parts or [raw]:
    _scan_folder(folder, found, '' if folder == raw else f'{folder.name}/')
  if not found.clips:
    raise ValueError(
      f'{raw} holds no clips. Pass a folder of {", ".join(ENDINGS)} files or '
      'of folders of pictures.'
    )
  if subjects:
    _name_subjects(found, subjects)
  return found


def _scan_folder(folder, found, prefix, person=None):
  for path in face_video.list_entries(folder):
    images = _images(path)
    if images or path.suffix.lower() in ENDINGS:
      name = path.stem if path.suffix.lower() in ENDINGS else path.name
      who = name.split('#')[0] if '#' in name else person or prefix + name
      found.clips.append(face_video.Clip(
        prefix + name, LABEL, who, images or [path]
      ))
    elif path.is_dir() and person is None:
      _scan_folder(path, found, f'{prefix}{path.name}/', path.name)
    else:
      found.skip(path, 'is neither a video nor a folder of pictures.')


def _images(path):
  if not path.is_dir():
    return []
  try:
    return video.list_images(path)
  except ValueError:
    return []


def _name_subjects(found, pattern):
  for clip in found.clips:
    match = re.search(pattern, clip.id)
    if match:
      clip.subject = match[1] if match.re.groups else match[0]


def make_record(clip, options, found):
  """One record, with `digest`, `seen` and `misses` (faces) beside its fields.

  Returns:
    The record, or None for a clip that cannot be used, which is then listed.
  """
  path = clip.frames[0]
  path = path if len(clip.frames) == 1 and path.suffix in ENDINGS else (
    path.parent
  )
  track = faces.Track(MARGIN)
  searches = options['crop'] in ('face', 'track')
  times, boxes, sha, shape = [], [], hashlib.sha256(), None
  try:
    for time, frame in clips.scan(path):
      shape = shape or frame.shape
      if frame.shape != shape:
        raise ValueError(f'frame {len(times)} has another size than the first.')
      times.append(time)
      sha.update(frame.tobytes())
      if searches:
        boxes.append(track(frame))
  except ValueError as error:
    found.skip(path, str(error).removeprefix(str(path)).lstrip(' :'))
    return None
  if len(times) < 2:
    found.skip(path, f'has {len(times)} frames, a clip needs 2.')
    return None
  if options['crop'] == 'face':
    boxes = [_union(boxes)] * len(times)
  return {
    'path': path.relative_to(found.raw).as_posix(), 'times': times,
    'boxes': [np.array(box, np.int32) for box in boxes],
    'label': clip.label, 'subject': clip.subject, 'id': clip.id, 'alpha': [],
    'digest': sha.hexdigest(), 'seen': track.count, 'misses': track.misses,
  }


def _union(boxes):
  """The square around all of the squares."""
  low, high = np.min(boxes, 0)[:2], np.max(boxes, 0)[2:]
  side = int(max(high - low))
  x, y = ((low + high - side) // 2).tolist()
  return (x, y, x + side, y + side)


def make_splits(found):
  """As `face_video.make_splits`; train and test are the folders' if given."""
  splits = face_video.make_splits(found)
  given = {
    part: [name for name in sorted(found) if name.startswith(f'{part}/')]
    for part in PARTS
  }
  if not all(given.values()):
    return splits
  who = face_video.shuffled({found[name]['subject'] for name in given['train']})
  val = set(who[: max(1, round(face_video.VAL_PART * len(who)))])
  val = val if len(who) > 1 else set()
  for part in ('train', 'val'):
    splits[part] = [
      name for name in given['train']
      if (found[name]['subject'] in val) == (part == 'val')
    ]
  return splits | {'test': given['test']}
