"""MUG, the Multimedia Understanding Group's facial expressions, as unpacked.

  <raw>/001/happiness/take000/img_0000.jpg             896x896, from 0000 on
  <raw>/002/session0/happiness/take000/img_0000.jpg    subjects 002 and 049

<raw> is the folder of the subjects, named by three digits, or one or two
levels above it (MUG/, subjects3/). Takes bear suffixes (take003nsg,
take000end). Both sessions of a subject are read; they are one subject. Ids are
001_happiness_take000 and 049_session1_happiness_take000.

A take goes neutral -> apex -> neutral. `half` says what is kept of it:

  first      its first half, the middle frame included (FEV-GAN's; default)
  farthest   up to the frame that differs most from the neutral one
  none       all of it, as ImaGINator and LFDM use it

Anything but `first` is part of the records' name: mug/face-256-farthest. Takes
of fewer than 36 frames are dropped, as in ImaGINator's lists. Takes of the
expression `neutral`, most of them shorter, are kept, and kept whole.

Splits besides those of every data set (see `name_splits`):

  train, val, test                    ImaGINator's 42 subjects less 4, these 4,
                                      its 10 test subjects; only train holds
                                      takes of `neutral`
  imaginator_train, imaginator_test   its 42 and 10 subjects, six expressions
  lfdm_train, lfdm_test               LFDM's 26 and 26 subjects, all takes
  subjects_80, subjects_20            80/20 by subject, six expressions
  by_video_train, by_video_test       as HAT-cGAN-DIFF: 10 takes to test on, of
                                      six expressions, and all the others to
                                      train on; subjects are in both

Published lists hold what of them is there. Where ImaGINator's leave train or
test empty, train, val and test follow the rule of the other data sets.

With TensorFlow installed this is a builder like any other, too:
`tfds build datasets/mug.py --manual_dir=<raw>` makes mug/face-256, and with
`--config=none-128-farthest` what `prepare` makes with these options. (The tfds
command itself wants apache-beam and mlcroissant to be installed.)
"""

import concurrent.futures
import pathlib
import re

import cv2
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging

from hatjax import faces, video

if __package__:
  from . import face_video
else:  # `tfds build` imports this file alone, its folder being on the path.
  import face_video

LABELS = [
  'anger', 'disgust', 'fear', 'happiness', 'neutral', 'sadness', 'surprise',
]
SPELLINGS = {
  'angry': 'anger', 'disgusted': 'disgust', 'afraid': 'fear',
  'happy': 'happiness', 'joy': 'happiness', 'sad': 'sadness',
  'surprised': 'surprise', 'suprise': 'surprise',
}
HALVES = ('first', 'farthest', 'none')  # the first is the default
MIN_FRAMES = 36  # of a take
MIN_CUT = 8  # of what is kept of it
SIDE = 32  # of the crops that are compared
SUBJECTS = frozenset(
  '001 002 006 007 008 010 013 014 017 020 021 027 028 030 031 032 033 034 036 '
  '037 038 039 040 042 043 044 045 046 048 049 052 055 060 061 062 063 064 065 '
  '066 070 071 072 073 074 075 076 077 078 079 082 083 084'.split()
)
IMAGINATOR_TEST = frozenset('017 034 045 055 060 064 065 073 078 083'.split())
LFDM_TRAIN = frozenset(
  '008 017 021 028 030 031 034 036 037 038 039 042 043 044 045 055 060 061 062 '
  '063 071 075 076 077 083 084'.split()
)
CURE = (
  'Pass the folder of the subjects, named by three digits: '
  '<raw>/001/happiness/take000/img_0000.jpg'
)


class Mug(face_video.FaceVideo, skip_registration=True):
  """MUG: six expressions of 52 subjects, cut at their apex, and neutral."""

  BUILDER_CONFIGS = [face_video.Config('face-256')]
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'MUG is given to researchers under a licence: mug.ee.auth.gr/fed. ' + CURE
  )

  def __init__(self, *, file_format=None, **kwargs):
    # TFDS's own default cannot be read without TensorFlow.
    super().__init__(file_format=file_format or 'array_record', **kwargs)

  def _create_builder_config(self, builder_config, version):
    """Any options may be asked for by their name, not only BUILDER_CONFIGS."""
    del version
    config = builder_config or self.BUILDER_CONFIGS[0]
    if isinstance(config, face_video.Config) and config.scan:
      return config
    name = config if isinstance(config, str) else config.name
    return face_video.Config(name, options=options_of(name))

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=face_video.features(LABELS),
      metadata=tfds.core.MetadataDict(),
      # The metadata name the clips in stored order.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    config = self.builder_config
    if config.scan is None:
      raw = pathlib.Path(dl_manager.manual_dir).resolve()
      config.scan = scan(raw, half=config.options['half'])
      config.raw_digest = face_video.digest(config.scan)
      return {face_video.SPLIT: self._generate_and_tell()}
    return super()._split_generators(dl_manager)

  def _generate_and_tell(self):
    """For TFDS alone: `prepare` lists what was skipped itself."""
    try:
      yield from self._generate_examples()
    finally:
      for path, reason in self.builder_config.scan.skipped:
        logging.warning('skipped %s: %s', path, reason)

  def _generate_examples(self):
    yield from super()._generate_examples()
    metadata, notes = self.info.metadata, []
    metadata['splits'] = name_splits(metadata['clips'], notes)
    metadata['report']['notes'] = self.builder_config.scan.notes + notes


def options_of(name):
  """The options of which `face_video.config_name` made a name."""
  match = re.fullmatch(r'(face|none)-(\d+|native)(?:-(farthest|none))?', name)
  if not match:
    raise ValueError(
      f'mug has no configuration {name!r}. It is named by its options: '
      'face-256, none-native, face-256-farthest.'
    )
  crop, size, half = match.groups()
  return {
    'crop': crop,
    'image_size': 0 if size == 'native' else int(size),
    'subjects': None,
    'half': half or HALVES[0],
  }


def scan(raw, subjects=None, half=HALVES[0]):
  """Finds the takes and cuts them."""
  if subjects is not None:
    raise ValueError('MUG names its subjects itself: leave out --subjects.')
  found = face_video.Scan(_find_root(raw), LABELS)
  for folder in face_video.list_entries(found.raw):
    if folder.is_dir() and _is_subject(folder):
      _scan_subject(folder, folder.name, found)
    else:
      found.skip(
        folder,
        'is not a subject folder, named by three digits. Rename it or move it '
        'away.',
      )
  _note_gaps(found)
  if half != 'none':
    _cut(found, half)
  return found


def _is_subject(folder):
  return re.fullmatch('[0-9]{3}', folder.name) is not None


def _is_session(folder):
  return re.fullmatch('session[0-9]+', folder.name.lower()) is not None


def _expression(folder):
  """The label that a folder's name stands for, or None."""
  name = folder.name.strip().lower()
  name = SPELLINGS.get(name, name)
  return name if name in LABELS else None


def _find_root(raw):
  """The folder of the subjects: `raw`, or one or two levels below."""
  folders = [raw]
  for _ in range(3):
    roots = [folder for folder in folders if _holds_subjects(folder)]
    if len(roots) > 1:
      names = ', '.join(str(folder) for folder in roots[:3])
      raise ValueError(f'{raw} holds MUG more than once. Pass one of: {names}')
    if roots:
      return roots[0]
    folders = [path for folder in folders for path in _folders(folder)]
  for folder in (raw, *raw.parents[:3]):
    if _is_subject(folder) and _holds_expressions(folder):
      raise ValueError(
        f'{raw} is of one subject. Pass the folder above: {folder.parent}'
      )
  raise ValueError(f"{raw} does not hold MUG's folders. {CURE}")


def _folders(folder):
  return [path for path in face_video.list_entries(folder) if path.is_dir()]


def _holds_subjects(folder):
  inside = _folders(folder)
  return any(_is_subject(path) and _holds_expressions(path) for path in inside)


def _holds_expressions(folder):
  inside = _folders(folder)
  return any(_expression(path) or _is_session(path) for path in inside)


def _scan_subject(folder, prefix, found):
  """Takes of a subject, or of one of its sessions."""
  inside = face_video.list_entries(folder)
  if not inside:
    found.skip(folder, 'holds no expressions. Unpack its archive again.')
  for path in inside:
    if not path.is_dir() or not (_is_session(path) or _expression(path)):
      found.skip(
        path, f'is no expression. Name it one of: {", ".join(LABELS)}.'
      )
    elif _expression(path):
      _scan_expression(path, f'{prefix}_{_expression(path)}', found)
    else:
      _scan_subject(path, f'{prefix}_{path.name.lower()}', found)


def _scan_expression(folder, prefix, found):
  takes = face_video.list_entries(folder)
  if any(_number(path) is not None for path in takes):
    found.skip(folder, 'holds frames outside of takes. Move them to take000.')
    takes = _folders(folder)
  elif not takes:
    found.skip(folder, 'holds no takes. Unpack its archive again.')
  for path in takes:
    name = f'{prefix}_{path.name.lower()}'
    if not re.fullmatch('take[0-9]+[a-z]*', path.name.lower()):
      found.skip(path, 'is not a take (take000, take003nsg). Rename it.')
    elif not path.is_dir():
      found.skip(path, 'is a file, not a take. Move it away.')
    elif any(clip.id == name for clip in found.clips):
      found.skip(path, f'is a second take with the id {name}. Rename one.')
    else:
      _scan_take(path, name, found)


def _scan_take(folder, name, found):
  label, subject = _expression(folder.parent), name[:3]
  frames = {}
  for path in face_video.list_frames(folder, found):
    number = _number(path)
    if number is None:
      found.skip(path, 'is not named like img_0000.jpg. Rename it.')
    elif number in frames:
      found.skip(path, f'is a second frame {number}. Move one of them away.')
    else:
      frames[number] = path
  count = len(frames)
  if not count:
    found.skip(folder, 'holds no frames. Unpack its archive again.')
  elif label != 'neutral' and count < MIN_FRAMES:
    found.skip(
      folder,
      f"too short: {count} frames, MUG's published lists drop those under "
      f'{MIN_FRAMES}.',
    )
  else:
    frames = [frames[number] for number in sorted(frames)]
    found.clips.append(face_video.Clip(name, label, subject, frames))


def _number(path):
  """The frame's number, or None if it is not named like a frame of MUG."""
  match = re.fullmatch(r'img_([0-9]+)(\.[a-z]+)?', path.name.lower())
  return int(match[1]) if match else None


def _note_gaps(found):
  """Notes takes some of whose frame numbers, counted from 0, are missing."""
  gaps = {}
  for clip in found.clips:
    numbers = {_number(path) for path in clip.frames}
    missing = sorted(set(range(max(numbers))) - numbers)
    if missing:
      first = ' '.join(f'{number:04d}' for number in missing[:3])
      gaps[clip.id] = first + (' ...' if len(missing) > 3 else '')
  if gaps:
    some = ', '.join(f'{name}: {gaps[name]}' for name in list(gaps)[:3])
    found.notes.append(
      f'{len(gaps)} takes lack frames in between or at the start and are used '
      f'without them ({some}{", ..." if len(gaps) > 3 else ""}). Where 0000 is '
      'missing the first frame may not be neutral'
    )


def _cut(found, half):
  """Ends all takes but the neutral ones at their apex."""
  acted = [clip for clip in found.clips if clip.label != 'neutral']
  measure = {'first': _first_half, 'farthest': _find_apex}[half]
  with concurrent.futures.ThreadPoolExecutor(2) as workers:
    work = workers.map(measure, acted)
    lengths = list(tqdm.tqdm(work, 'apex', len(acted), unit='clip', delay=1))
  for clip, length in zip(acted, lengths):
    clip.frames = clip.frames[:length]
    if length < MIN_CUT:
      found.clips.remove(clip)
      found.skip(
        clip.frames[0].parent,
        f'too short: its frame {length - 1} differs most from the first, '
        f'{MIN_CUT} frames are needed. Use --half first.',
      )


def _first_half(clip):
  return (len(clip.frames) + 1) // 2


def _find_apex(clip):
  """How many frames there are up to the one farthest from the first.

  Distance is the variance of the difference of small blurred grey crops of the
  face: neither noise nor brightness decides. Frames that cannot be read count
  as near; they are listed when the records are made.
  """
  crop = None
  distances = []
  for path in clip.frames:
    try:
      image = video.read_image(path)
    except ValueError:
      if crop is None:
        break  # Without its first frame the clip is skipped later.
      distances.append(-1.0)
      continue
    if crop is None:
      box = faces.detect_face(image) or (0, 0, *image.shape[1::-1])
      crop = neutral = _blurred(image, box)
    distances.append(float(np.var(_blurred(image, box) - neutral)))
  return 1 + int(np.argmax(distances)) if distances else len(clip.frames)


def _blurred(image, box):
  """float32 [SIDE, SIDE], grey."""
  small = cv2.cvtColor(faces.crop(image, box, SIDE), cv2.COLOR_RGB2GRAY)
  return cv2.GaussianBlur(small.astype(np.float32), (0, 0), 1)


def name_splits(clips, notes):
  """The splits of `face_video.make_splits`, MUG's own in their place.

  Args:
    clips: of the metadata.
    notes: list to which is added what a reader of the splits must know.

  Returns:
    {name: [ids]}: of published lists, what is there.
  """
  takes = face_video.make_splits(clips)['everything']
  acted = [name for name in takes if clips[name]['label'] != 'neutral']
  of = lambda who, names: [i for i in names if clips[i]['subject'] in who]
  ours = face_video.make_splits({name: clips[name] for name in acted})
  who = {name: {clips[i]['subject'] for i in ours[name]} for name in ours}
  here = who['everything']
  splits = {**ours, 'everything': takes}
  test, pool = here & IMAGINATOR_TEST, here - IMAGINATOR_TEST
  if test and pool:
    num_val = max(round(face_video.VAL_PART * len(pool)), 1)
    val = set(face_video.shuffled(pool)[: num_val if len(pool) > 1 else 0])
  else:
    test, val = who['test'], who['val']
    notes.append(
      "train, val and test follow the rule of other data sets: ImaGINator's "
      'lists, their default, leave one of them without subjects here'
    )
  if here - SUBJECTS:
    notes.append(
      'in no published list, so in splits named for them neither: subjects '
      + ', '.join(sorted(here - SUBJECTS))
    )
  everyone = {clips[name]['subject'] for name in takes}
  return splits | {
    'train': of(everyone - test - val, takes),
    'val': of(val, acted),
    'test': of(test, acted),
    'imaginator_train': of(SUBJECTS - IMAGINATOR_TEST, acted),
    'imaginator_test': of(IMAGINATOR_TEST, acted),
    'lfdm_train': of(LFDM_TRAIN, takes),
    'lfdm_test': of(SUBJECTS - LFDM_TRAIN, takes),
    'by_video_train': sorted(set(takes) - set(ours['by_video_test'])),
    'subjects_80': of(who['train'] | who['val'], acted),
    'subjects_20': of(who['test'], acted),
  }
