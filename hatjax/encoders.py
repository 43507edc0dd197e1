"""Videos as mp4, gif and webp files, and pictures as png, with a comment.

Frames come as an iterator of uint8 [H, W, 3] of one size, at least one. The
comment is a line of ASCII, '' for none: in an mp4 and a GIF the field of that
name, in a PNG a text chunk, in a WebP the description of its XMP.
"""

import fractions
import io
import itertools
import struct
import zlib

import av
import numpy as np
from PIL import Image


def to_mp4(path, frames, fps, comment):
  """H.264, index first; `fps` is a Fraction."""
  rate = fps.limit_denominator(1001)
  frames = _to_av(
    map(_to_even, frames), rate, rate, format='yuv420p',
    dst_colorspace='ITU709', dst_color_range='MPEG',
  )
  form = {'movflags': '+faststart'}
  _mux(path, frames, 'mp4', form, 'libx264', comment, crf='17')


def to_gif(path, frames, fps, comment):
  """One palette for all frames, which are kept in memory."""
  frames = _to_one_palette(_to_av(frames, fps, ticks=100))
  last = str(round(100 / fps))  # else the last frame flashes by
  _mux(path, frames, 'gif', {'loop': '0', 'final_delay': last}, 'gif')
  _rewrite(path, comment, _comment_gif)


def to_webp(path, frames, fps, comment):
  """Lossy and animated."""
  frames = _to_av(frames, fps, ticks=1000, format='bgra')
  _mux(path, frames, 'webp', {'loop': '0'}, 'libwebp_anim', quality='90')
  _rewrite(path, comment, _comment_webp)


def _mux(
  path, frames, form, form_options, codec, comment='', **codec_options
):
  first = next(frames)
  with av.open(str(path), 'w', format=form, options=form_options) as container:
    if comment:
      container.metadata['comment'] = comment
    stream = container.add_stream(
      codec, rate=1 / first.time_base, options=codec_options
    )
    stream.width, stream.height = first.width, first.height
    stream.pix_fmt = first.format.name
    context = stream.codec_context
    stream.time_base = context.time_base = first.time_base
    if codec == 'libx264':
      # Without tags players guess the matrix, and skin turns green or red.
      context.colorspace = context.color_primaries = context.color_trc = 1
      context.color_range = 1
    for frame in itertools.chain([first], frames):
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _to_av(frames, fps, ticks, **form):
  for t, frame in enumerate(frames):
    frame = av.VideoFrame.from_ndarray(frame, format='rgb24').reformat(**form)
    frame.pts = round(t * ticks / fps)
    frame.time_base = 1 / fractions.Fraction(ticks)
    yield frame


def _to_even(frame):
  height, width, _ = frame.shape
  return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode='edge')


def _to_one_palette(frames):
  """FFmpeg's filters that find one palette for all frames, then apply it."""
  first = next(frames)
  graph = av.filter.Graph()
  source = graph.add_buffer(
    width=first.width, height=first.height, format='rgb24',
    time_base=first.time_base,
  )
  split = graph.add('split')
  palette = graph.add('palettegen', 'reserve_transparent=0')
  # Ordered dither stands still from frame to frame; error diffusion crawls.
  use = graph.add('paletteuse', 'dither=bayer:bayer_scale=5')
  source.link_to(split)
  split.link_to(use, 0, 0)
  split.link_to(palette, 1, 0)
  palette.link_to(use, 0, 1)
  use.link_to(graph.add('buffersink'))
  graph.configure()
  for last, frame in enumerate(itertools.chain([first], frames)):  # noqa: B007
    graph.push(frame)
  graph.push(None)
  for _ in range(last + 1):
    yield graph.pull()


def _rewrite(path, comment, change):
  if comment:
    path.write_bytes(change(path.read_bytes(), comment.encode('ascii')))


def comment_png(data, comment):
  """The bytes of a PNG -> the same with a comment."""
  text = b'tEXtComment\0' + comment.encode('ascii')
  chunk = struct.pack('>I', len(text) - 4) + text
  chunk += struct.pack('>I', zlib.crc32(text))
  return data[:33] + chunk + data[33:]  # behind the signature and IHDR


def _comment_gif(data, comment):
  """Puts a comment extension behind the header and its colours."""
  colours = 3 * 2 ** (data[10] % 8 + 1) if data[10] & 0x80 else 0
  blocks = b''.join(
    bytes([len(part)]) + part
    for part in (comment[i : i + 255] for i in range(0, len(comment), 255))
  )
  at = 13 + colours
  return data[:at] + b'\x21\xfe' + blocks + b'\0' + data[at:]


def _comment_webp(data, comment):
  """Appends XMP, and says in the first chunk that it is there."""
  if data[12:16] != b'VP8X':  # a still, which has no such chunk yet
    width, height = (n - 1 for n in Image.open(io.BytesIO(data)).size)
    size = struct.pack('<IHBHB', 0, width & 0xffff, width >> 16,
                       height & 0xffff, height >> 16)
    data = data[:12] + b'VP8X' + struct.pack('<I', 10) + size + data[12:]
  text = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf='
    b'"http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    b'xmlns:dc="http://purl.org/dc/elements/1.1/" dc:description="'
    + comment + b'"/></rdf:RDF></x:xmpmeta>'
  )
  text += b' ' * (len(text) % 2)
  chunk = b'XMP ' + struct.pack('<I', len(text)) + text
  flags = bytes([data[20] | 0x04])
  body = data[8:20] + flags + data[21:] + chunk
  return b'RIFF' + struct.pack('<I', len(body)) + body
