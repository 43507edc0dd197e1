"""The released code's HAT-cGAN step in plain eager PyTorch, to time against.

  python tests/torch_reference.py --image_size 128 --steps 5

Written from a description of the published method (equations, layer tables,
order of work), not from anybody's code. The order is the released one: twelve
full passes of the generator per step for five frames, each through both
encoders and the decoder; alpha as a Python number; one discriminator call per
frame; updates of the alpha, the frame, the lip and then the generator net.
Needs torch and numpy, and nothing of hatjax. Not a test: pytest passes it by.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

NOISE = 0.01  # of every level of a code, in training


class Encoder(nn.Module):
  """k4 s2 convolutions down to 1x1; [N, 3, S, S] -> levels, finest first."""

  def __init__(self, num_downs, width):
    super().__init__()
    sizes = [3] + [width * min(2**n, 8) for n in range(num_downs)]
    self.convs = nn.ModuleList(
      nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(sizes, sizes[1:])
    )

  def forward(self, x):
    levels = []
    for n, conv in enumerate(self.convs):
      x = conv(F.leaky_relu(x, 0.2) if n else x)
      if 0 < n < len(self.convs) - 1:
        x = F.instance_norm(x)
      levels.append(x)
    return levels


class Decoder(nn.Module):
  """k4 s2 transposed convolutions, each joined by its skip tensor."""

  def __init__(self, num_downs, width):
    super().__init__()
    sizes = [width * min(2**n, 8) for n in range(num_downs)]
    convs = [nn.ConvTranspose2d(sizes[-1], sizes[-2], 4, 2, 1)]
    for n in range(num_downs - 2, 0, -1):
      convs.append(nn.ConvTranspose2d(2 * sizes[n], sizes[n - 1], 4, 2, 1))
    convs.append(nn.ConvTranspose2d(2 * sizes[0], 3, 4, 2, 1))
    self.convs = nn.ModuleList(convs)

  def forward(self, levels):
    x, num_downs = levels[-1], len(levels)
    for conv, level in zip(self.convs, range(num_downs, 1, -1)):
      x = F.instance_norm(conv(F.relu(x)))
      if 5 <= level < num_downs:
        x = F.dropout(x, 0.5, self.training)
      x = torch.cat([levels[level - 2], x], 1)
    return torch.tanh(self.convs[-1](F.relu(x)))


class Generator(nn.Module):
  """Two encoders of one image, z_l = b base_l + alpha residual_l, decoder."""

  def __init__(self, image_size=128, width=64):
    super().__init__()
    num_downs = image_size.bit_length() - 1
    self.base = Encoder(num_downs, width)
    self.residual = Encoder(num_downs, width)
    self.decoder = Decoder(num_downs, width)

  def forward(self, image, b, alpha):
    """(frame, bottleneck); every part runs, whatever b and alpha are."""
    levels = [
      b * h + alpha * r for h, r in zip(self.base(image), self.residual(image))
    ]
    if self.training:
      levels = [z + NOISE * torch.randn_like(z) for z in levels]
    return self.decoder(levels), levels[-1]


class PatchDiscriminator(nn.Module):
  """PatchGAN on the input face beside a frame -> logits [N, 1, h, w]."""

  def __init__(self, width=64, num_layers=3):
    super().__init__()
    sizes = [6] + [width * min(2**n, 8) for n in range(num_layers + 1)]
    strides = [2] * num_layers + [1]
    self.convs = nn.ModuleList(
      nn.Conv2d(a, b, 4, s, 1) for a, b, s in zip(sizes, sizes[1:], strides)
    )
    self.last = nn.Conv2d(sizes[-1], 1, 4, 1, 1)

  def forward(self, image, frame):
    x = torch.cat([image, frame], 1)
    for n, conv in enumerate(self.convs):
      x = conv(x)
      x = F.leaky_relu(F.instance_norm(x) if n else x, 0.2)
    return self.last(x)


def alpha_discriminator(k):
  """MLP on the K intensities of a clip."""
  return nn.Sequential(
    nn.Linear(k, k), nn.LeakyReLU(0.2), nn.Linear(k, k), nn.LeakyReLU(0.2),
    nn.Linear(k, 1),
  )


def gan(logits, target):
  """Binary cross entropy after a sigmoid, as the released code has it."""
  score = torch.sigmoid(logits)
  return F.binary_cross_entropy(score, torch.full_like(score, target))


class Trainer:
  """All nets and optimizers, and the step."""

  def __init__(self, image_size, width, k, device):
    self.nets = {
      'generator': Generator(image_size, width),
      'alpha_discriminator': alpha_discriminator(k),
      'discriminator': PatchDiscriminator(width),
      'patch_discriminator': PatchDiscriminator(width),
    }
    self.optimizers = {}
    for name, net in self.nets.items():
      for parameter in net.parameters():
        scale = 0.02 if parameter.ndim > 1 else 0.0
        nn.init.normal_(parameter, 0.0, scale)
      net.to(device).train()
      self.optimizers[name] = torch.optim.Adam(
        net.parameters(), 2e-4, (0.5, 0.999)
      )

  def forward(self, image, frames):
    """(fakes, recons, alphas [1, K]) by 2 + 2K passes."""
    generator = self.nets['generator']
    _, base = generator(image, 1.0, 0.0)
    _, residual = generator(image, 0.0, 1.0)
    recons, alphas = [], []
    for frame in frames:
      recon, code = generator(frame, 1.0, 0.0)
      recons.append(recon)
      shift = ((code - base) * residual).sum().abs()
      alphas.append(shift / (residual.norm() + 1e-6))
    # As numbers: image losses do not reach alpha, and the host waits.
    fakes = [generator(image, 1.0, float(a.detach()))[0] for a in alphas]
    return fakes, recons, torch.stack(alphas)[None]

  def update(self, name, loss):
    self.optimizers[name].zero_grad()
    loss.backward()
    self.optimizers[name].step()

  def step(self, image, frames, mask, masks):
    """One step on one clip: [1, 3, S, S] and lists of K. Returns losses."""
    fakes, recons, alphas = self.forward(image, frames)
    k, losses = len(frames), {}
    judge = self.nets['alpha_discriminator']
    uniform = torch.rand_like(alphas)
    losses['alpha'] = 100 * 0.5 * (
      gan(judge(alphas.detach()), 0.0) + gan(judge(uniform), 1.0)
    )
    self.update('alpha_discriminator', losses['alpha'])
    lips = image * mask
    pairs = {
      'discriminator': (image, fakes, frames),
      'patch_discriminator': (
        lips, [f * m for f, m in zip(fakes, masks)],
        [f * m for f, m in zip(frames, masks)],
      ),
    }
    for name, (still, fake, real) in pairs.items():
      net = self.nets[name]
      losses[name] = sum(
        0.5 * (gan(net(still, f.detach()), 0.0) + gan(net(still, r), 1.0))
        for f, r in zip(fake, real)
      ) / k
      self.update(name, losses[name])
    loss = 100 * gan(judge(alphas), 1.0)
    for name, (still, fake, _) in pairs.items():
      self.nets[name].requires_grad_(False)
      loss = loss + sum(gan(self.nets[name](still, f), 1.0) for f in fake)
    for fake, recon, frame in zip(fakes, recons, frames):
      loss = loss + 100 * F.l1_loss(fake, frame) + 10 * F.l1_loss(recon, frame)
    losses['generator'] = loss / k
    self.update('generator', losses['generator'])
    for name in pairs:
      self.nets[name].requires_grad_(True)
    return {name: loss.item() for name, loss in losses.items()}

  @torch.no_grad()
  def generate(self, image, num_frames=20):
    """Frames at alpha 0, 0.05, ... by one full pass each."""
    generator = self.nets['generator'].eval()
    frames = [
      generator(image, 1.0, t / num_frames)[0] for t in range(num_frames)
    ]
    generator.train()
    return torch.cat(frames).cpu()


def clip(image_size, k, device, seed):
  """Random pixels and a box for the lips."""
  torch.manual_seed(seed)
  make = lambda: (
    torch.randint(0, 256, (1, 3, image_size, image_size)) / 127.5 - 1
  ).to(device)
  mask = torch.zeros(1, 1, image_size, image_size, device=device)
  s = image_size // 8
  mask[..., 5 * s : 6 * s, 3 * s : 5 * s] = 1
  return make(), [make() for _ in range(k)], mask, [mask] * k


def seconds(function, count, device):
  """Seconds of each of `count` calls."""
  times = []
  for _ in range(count):
    begin = time.perf_counter()
    function()
    if device == 'cuda':
      torch.cuda.synchronize()
    times.append(time.perf_counter() - begin)
  return times


def matrix_rate(device, tries=5):
  """GFLOP/s of a float32 product: the best of several sizes."""
  best = 0.0
  for n in (1024, 2048, 4096) if device == 'cpu' else (4096, 8192):
    x, w = torch.randn(2, n, n, device=device)
    multiply = functools.partial(torch.matmul, x, w)
    best = max(best, 2e-9 * n**3 / min(seconds(multiply, tries, device)))
  return best


def peak_gib(device):
  if device == 'cuda':
    return torch.cuda.max_memory_allocated() / 2**30
  # Of the whole process; kilobytes on Linux, bytes on macOS.
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main():
  """The command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--image_size', type=int, default=128, help='a power of two')
  add('--steps', type=int, default=5, help='timed steps')
  add('--warmup', type=int, default=1)
  add('--num_frames', type=int, default=5, help='K, per clip')
  add('--width', type=int, default=64)
  add('--threads', type=int, help="default: torch's")
  add('--device', choices=('cpu', 'cuda'), default='cpu')
  args = parser.parse_args()
  if args.threads:
    torch.set_num_threads(args.threads)
  load = os.getloadavg()[0]
  before = matrix_rate(args.device)
  trainer = Trainer(
    args.image_size, args.width, args.num_frames, args.device
  )
  clips = [
    clip(args.image_size, args.num_frames, args.device, s) for s in range(4)
  ]
  counter = iter(range(args.warmup + args.steps))
  step = lambda: trainer.step(*clips[next(counter) % len(clips)])
  seconds(step, args.warmup, args.device)
  steps = seconds(step, args.steps, args.device)
  memory = peak_gib(args.device)
  generate = lambda: trainer.generate(clips[0][0])
  videos = seconds(generate, 1 + max(1, args.steps), args.device)[1:]
  after = matrix_rate(args.device)
  size = lambda name: sum(p.numel() for p in trainer.nets[name].parameters())
  print(json.dumps({
    'torch': torch.__version__, 'threads': torch.get_num_threads(),
    'device': args.device, 'image_size': args.image_size,
    'load_average': [load, os.getloadavg()[0]],
    'generator_parameters': size('generator'),
    'discriminator_parameters': size('discriminator'),
    'matrix_gflops_before_and_after': [round(before, 1), round(after, 1)],
    'step_seconds': [round(s, 4) for s in steps],
    'step_seconds_median': round(statistics.median(steps), 4),
    'video_20_frames_seconds': [round(s, 4) for s in videos],
    'video_20_frames_seconds_median': round(statistics.median(videos), 4),
    'peak_gib': round(memory, 3),
  }, indent=2))


if __name__ == '__main__':
  main()
