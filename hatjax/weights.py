"""Weights that others released: what they are, where they are, are they whole.

hatjax ships none. A file lives in `folder()` under the name it was released
with; what OpenCV reads is used as it is, everything else once converted (by
`python -m hatjax.convert weights fetch NAME`) to <name>.npz: named arrays,
nothing that runs code. Checksums are verified before every use.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import urllib.error
import urllib.request

import numpy as np

from hatjax import cache

CHUNK = 1 << 20
_DIGEST, _SOURCE = '__digest__', '__source__'  # in an npz beside the arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """One released file.

  Attributes:
    name: what hatjax calls it.
    use: what it is for.
    licence: under which it was released.
    file: its name there and in `folder()`.
    address: where it is released; '' if it can only be fetched by hand.
    sha256: of the file; '' where hatjax does not know it: then the one of the
      first file put there is kept, and every table prints it.
    size: bytes, 0 if unknown.
    converted: whether hatjax reads a converted <name>.npz, not the file.
    note: what else to know, e.g. the page to fetch it from by hand.
  """

  name: str
  use: str
  licence: str
  file: str
  address: str = ''
  sha256: str = ''
  size: int = 0
  converted: bool = False
  note: str = ''


_ZOO = 'https://github.com/opencv/opencv_zoo/raw/main/models'
_ENTRIES = (
  Entry(
    name='openface', use='ACD: the face embedding of the published tables',
    licence='Apache-2.0', file='nn4.small2.v1.t7', size=31510785,
    address='https://storage.cmusatyalab.org/openface-models/nn4.small2.v1.t7',
    sha256='9b72d54aeb24a64a8135dca8e792f7cc675c99a884a6940350a6cedcf7b7ba08',
  ),
  Entry(
    name='yunet', use='finds faces and five points on each, to align them',
    licence='MIT', file='face_detection_yunet_2023mar.onnx', size=232589,
    address=f'{_ZOO}/face_detection_yunet/face_detection_yunet_2023mar.onnx',
    sha256='8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4',
  ),
  Entry(
    name='sface', use='ACD: a newer face embedding',
    licence='Apache-2.0', file='face_recognition_sface_2021dec.onnx',
    size=38696353, address=f'{_ZOO}/face_recognition_sface/'
    'face_recognition_sface_2021dec.onnx',
    sha256='0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79',
  ),
  Entry(
    name='inception_fid', use='image FID, KID, IS (the 2015-12-05 Inception)',
    licence='Apache-2.0', file='pt_inception-2015-12-05-6726825d.pth',
    size=95628359, converted=True,
    address='https://github.com/mseitzer/pytorch-fid/releases/download/'
    'fid_weights/pt_inception-2015-12-05-6726825d.pth',
    sha256='6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2',
  ),
  Entry(
    name='vgg16', use='LPIPS: its features', licence='BSD-3-Clause',
    file='vgg16-397923af.pth', size=553433881, converted=True,
    address='https://download.pytorch.org/models/vgg16-397923af.pth',
    sha256='397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0',
  ),
  Entry(
    name='lpips_vgg', use='LPIPS: its weights of those features',
    licence='BSD-2-Clause', file='lpips_vgg_v0.1.pth', size=7289,
    converted=True, address='https://raw.githubusercontent.com/richzhang/'
    'PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth',
    sha256='a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868',
  ),
  Entry(
    name='vgg19', use='perceptual losses', licence='BSD-3-Clause',
    file='vgg19-dcbb9e9d.pth', size=574673361, converted=True,
    address='https://download.pytorch.org/models/vgg19-dcbb9e9d.pth',
    sha256='dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44',
  ),
  Entry(
    name='vgg_face', use='FEV-GAN: VGG-16 trained on faces',
    licence='CC-BY-NC-4.0', file='vgg_face_dag.pth', converted=True,
    address='https://www.robots.ox.ac.uk/~albanie/models/pytorch-mcn/'
    'vgg_face_dag.pth', note="about 580 MB; not for commercial use; Albanie's "
    'conversion of the release, whose channels are RGB',
  ),
  Entry(
    name='resnext101_kinetics', use='video FID of ImaGINator and G3AN',
    licence='MIT', file='resnext-101-kinetics.pth', converted=True,
    note='by hand: https://github.com/kenshohara/'
    'video-classification-3d-cnn-pytorch, Pretrained Models',
  ),
)
REGISTRY = {entry.name: entry for entry in _ENTRIES}


def folder():
  """Where the files live: $HATJAX_WEIGHTS, else the user's cache folder."""
  path = os.environ.get('HATJAX_WEIGHTS')
  return pathlib.Path(path).expanduser() if path else cache.folder('weights')


def cure(name):
  """What to type to get the weights of that name."""
  entry = entry_of(name)
  if entry.address:
    return f'python -m hatjax.convert weights fetch {name}'
  return (
    f'{entry.note}; then python -m hatjax.convert weights fetch {name} '
    '--source <file>'
  )


def entry_of(name):
  """The entry of that name; ValueError listing the known."""
  if name not in REGISTRY:
    raise ValueError(
      f'Unknown weights {name!r}. Choose one of: {", ".join(REGISTRY)}.'
    )
  return REGISTRY[name]


def is_there(name):
  """Whether `find` would look at a file (it may still be damaged)."""
  return _path(entry_of(name)).is_file()


def find(name):
  """The file that hatjax reads, verified: the released or the converted one.

  Returns:
    pathlib.Path.

  Raises:
    ValueError: absent, or not what it should be; with the line that cures it.
  """
  entry = entry_of(name)
  path = _path(entry)
  if not path.is_file():
    raise ValueError(f'Weights {name} are not in {folder()}. {_get(name)}')
  if not entry.converted:
    verify(name, path)
  return path


def load(name):
  """The arrays of a converted file, {name: np.ndarray}, verified.

  Raises:
    ValueError: see `find`; or weights that OpenCV reads itself.
  """
  path = find(name)
  if not entry_of(name).converted:
    raise ValueError(f'Weights {name} are read by OpenCV: use weights.find.')
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {key: file[key] for key in file.files}
    digest, source = arrays.pop(_DIGEST), arrays.pop(_SOURCE)
  except Exception as error:  # numpy raises many kinds for a damaged file.
    raise ValueError(f'{path} is damaged ({error}). {_get(name)}') from error
  if str(digest) != _digest(arrays):
    raise ValueError(f'{path} is damaged: its checksum is wrong. {_get(name)}')
  wanted = entry_of(name).sha256
  if wanted and str(source) != wanted:
    raise ValueError(
      f'{path} was made from another file than the released one. {_get(name)}'
    )
  return arrays


def store(name, arrays, source):
  """Writes a converted file.

  Args:
    name: of the weights.
    arrays: {name: np.ndarray}.
    source: checksum of the released file they come from.

  Returns:
    pathlib.Path of the npz.
  """
  entry = entry_of(name)
  path = _path(entry)
  path.parent.mkdir(parents=True, exist_ok=True)
  known = {_DIGEST: np.array(_digest(arrays)), _SOURCE: np.array(source)}
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    with open(temporary, 'wb') as file:
      np.savez(file, **arrays, **known)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  return path


def checksum(name):
  """What a table says of the weights used: 'sha256:<64 digits>'.

  Of the released file, also where a converted one is read.
  """
  entry = entry_of(name)
  if entry.sha256:
    return f'sha256:{entry.sha256}'
  if entry.converted:
    with np.load(_path(entry), allow_pickle=False) as file:
      return f'sha256:{file[_SOURCE]}'
  return f'sha256:{sha256(_path(entry))}'


def released(name):
  """The released file's path in `folder()`, there or not."""
  return folder() / entry_of(name).file


def verify(name, path):
  """The checksum of a file; ValueError unless it is the released one's."""
  entry, found = entry_of(name), sha256(path)
  note = pathlib.Path(f'{path}.sha256')
  wanted = entry.sha256
  if not wanted and note.is_file():
    wanted = note.read_text().strip()
  if wanted and found != wanted:
    raise ValueError(
      f'{path} is not the released file: its SHA-256 is {found[:16]}..., not '
      f'{wanted[:16]}... Delete it, then: {cure(name)}'
    )
  if not wanted:
    note.write_text(found + '\n')
  return found


def sha256(path):
  """Hexadecimal SHA-256 of a file."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def fetch(name, progress=None, source=None):
  """Puts the released file into `folder()`, verified; resumes a broken load.

  Args:
    name: of the weights.
    progress: takes (bytes so far, bytes in all or 0); None for silence.
    source: another address, or a file on this machine; default: the entry's.

  Returns:
    pathlib.Path of the released file.

  Raises:
    ValueError: no address, no connection, or not the released file.
  """
  entry = entry_of(name)
  path = released(name)
  if path.is_file():
    verify(name, path)
    return path
  source = str(source or entry.address)
  if not source:
    raise ValueError(f'{name} has no address. Get it {cure(name)}')
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.part')
  if '://' not in source:
    local = pathlib.Path(source).expanduser()
    if not local.is_file():
      raise ValueError(f'There is no file {source}. Pass another --source.')
    _download(local.resolve().as_uri(), part, progress, resume=False)
  else:
    _download(source, part, progress)
  try:
    verify(name, part)
  except ValueError as error:
    part.unlink()
    raise ValueError(
      f'{source} gave another file than the released {entry.file}; it was '
      f'deleted ({str(error).split(": ", 1)[1].split(" Delete")[0]})'
    ) from None
  os.replace(part, path)
  note = pathlib.Path(f'{part}.sha256')
  if note.is_file():
    os.replace(note, f'{path}.sha256')
  return path


def _download(address, part, progress, resume=True):
  """Appends to `part` what it lacks; as much as came stays there."""
  have = part.stat().st_size if resume and part.is_file() else 0
  headers = {'User-Agent': 'hatjax'}
  if have:
    headers['Range'] = f'bytes={have}-'
  try:
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
      if have and reply.status != 206:
        have = 0  # The server sends the whole.
      rest = int(reply.headers.get('Content-Length') or 0)
      total = have + rest if rest else 0
      with open(part, 'ab' if have else 'wb') as file:
        while block := reply.read(CHUNK):
          file.write(block)
          have += len(block)
          if progress:
            progress(have, total)
  except urllib.error.HTTPError as error:
    if error.code == 416 and have:  # It was complete already.
      return
    raise ValueError(
      f'{address} answers {error.code} {error.reason}. Get the file another '
      'way and pass --source <file>.'
    ) from error
  except (OSError, urllib.error.URLError) as error:
    raise ValueError(
      f'Cannot fetch {address}: {getattr(error, "reason", error)}. Run the '
      'same again to resume, or pass --source <file>.'
    ) from error
  if total and have < total:
    raise ValueError(
      f'{address} broke off after {have} of {total} bytes. Run the same again '
      'to resume.'
    )


def _path(entry):
  """The file that hatjax reads."""
  return folder() / (f'{entry.name}.npz' if entry.converted else entry.file)


def _get(name):
  return f'Get them: {cure(name)}'


def _digest(arrays):
  """Hexadecimal SHA-256 of named arrays, whatever their order."""
  found = hashlib.sha256()
  for name in sorted(arrays):
    value = np.ascontiguousarray(arrays[name])
    head = json.dumps([name, value.dtype.str, list(value.shape)])
    found.update(head.encode())
    found.update(value.tobytes())
  return found.hexdigest()
