"""FEV-GAN's numbers, as presets.

default    makes a flow of the input face and what it adds to it; E_id is a
           small net trained on the training subjects (identity_encoder)
paper      Bouzid & Ballihi: direct head, VGG-Face, lr 2e-5; lambda_rec and
           lambda_id, which the paper does not state, are ours
paper_1024 the same, E_id's 1024 maps being pool4 and relu5_3 together
tiny       the smallest legal one: seconds on a CPU

VGG-Face wants its weights: --config.init_from.vgg_face=vgg_face.npz; a
stand-in wants --config.init_from.identity_encoder=<run>, or to be trained by
the same command: `identity_encoder,fev_gan`.
"""

from configs import methods
from configs.methods import identity_encoder

PRESETS = ('default', 'paper', 'paper_1024', 'tiny')
IMAGE_SIZE = 64                   # unless the argument says another
INIT_FROM = ('vgg_face', 'identity_encoder')


def get_stage(preset, image_size, data):
  """The four blocks of a stage.

  Args:
    preset: one of PRESETS.
    image_size: side in pixels, a power of two.
    data: what the data set says of its block, such as the name.

  Returns:
    ConfigDict with method, model, optim, data and train.
  """
  stage = methods.start_stage('fev_gan', PRESETS, preset, image_size)
  stage.model = _model(preset, image_size)
  # All frames of the model, the first being the input face.
  stage.data.update(
    frames='even', num_frames=stage.model['num_frames'] - 1, batch_size=8,
  )
  adam = dict(lr=2e-5, b1=0.5, b2=0.999)
  if not preset.startswith('paper'):
    adam['lr'] = 1e-3
  stage.optim = dict(generator=dict(adam), discriminator=dict(adam))
  if not preset.startswith('paper'):
    stage.optim.discriminator.lr = 2e-4
  if preset == 'tiny':
    stage.data.batch_size = 2
  stage.data.update(data)
  return stage


def _model(preset, image_size):
  model = dict(
    image_size=image_size,
    num_labels=-1,                # as many as the data have
    num_frames=32,
    use_identity=True,            # Table 3: without E_id
    use_spatial=True,             # Table 3: without E_s
    eid='vgg_face',               # its weights; trained, random
    eid_size=224,                 # side that E_id sees
    eid_taps=('relu5_3',),
    eid_depths=(2, 2, 3, 3, 3),   # convolutions of its blocks: VGG-16
    eid_width=64,
    eid_dropout=0.0,              # share of its maps
    es_width=128,
    dec_arch='down4',             # or up16
    dec_width=128,
    dec_size=0,                   # side that it works at; 0: image_size
    head='direct',                # residual, warp
    flow_sizes=(),                # of warp's flows, small first; (): as decoded
    painter_width=0,              # of a net that sees what y is added to
    norm='batch',                 # or group, which needs no large batches
    label_everywhere=False,       # learns its maps, changes every layer
    init_weights='normal',        # N(0, 0.01); or he
    hold_ends=False,              # first and last frame go on beyond the video
    discriminator_width=64,
    discriminator_size=0,         # side of the frames it sees; 0: image_size
    discriminator_lips=False,     # sees a cut of that side, of the lips, too
    label_inject='first',         # after D's first layer; input
    n_id_frames=4,
    lambda_gan=1.0,
    lambda_rec=100.0,
    lambda_lips=0.0,              # L1 inside the lips
    lambda_id=1.0,
    ema_decay=0.0,                # of the generator, warmed up; 0: none
    microbatches=1,               # parts of a batch, one after another
    remat=False,                  # less memory, a third more work
    dtype='float32',              # of the computation; or bfloat16
  )
  if preset == 'paper_1024':
    model['eid_taps'] = ('pool4', 'relu5_3')
  if preset in ('default', 'tiny'):
    net = identity_encoder.net(preset)
    model |= {
      'eid': 'trained', 'eid_size': net['input_size'],
      'eid_taps': net['taps'], 'eid_depths': net['depths'],
      'eid_width': net['width'], 'dec_arch': 'up16', 'head': 'warp',
      'dec_width': 64, 'norm': 'group', 'ema_decay': 0.999,
      'eid_dropout': 0.5, 'lambda_gan': 0.25, 'label_everywhere': True,
      'painter_width': 32, 'hold_ends': True, 'init_weights': 'he',
    }
  if preset == 'tiny':
    model |= dict(
      num_frames=image_size // 2, es_width=4, dec_width=4,
      discriminator_width=4, painter_width=4,
    )
  return model


def shrink(stage):
  """Makes a stage one for minutes on a CPU.

  Narrow nets, a decoder and a discriminator of half the side, less weight on
  the discriminator, fewer faces compared, twice the learning rate, which falls
  to the end of the training: kept, it once broke what 380 steps had learned.
  """
  model = stage.model
  # The flow is smooth; the discriminator, else, takes half the time.
  if model.image_size == 64:
    model.dec_size = model.discriminator_size = 32
    model.flow_sizes = (8, 16)
  model.lambda_gan = min(model.lambda_gan, 0.05)
  for name, most in dict(
    dec_width=32, es_width=32, discriminator_width=8, n_id_frames=2,
  ).items():
    model[name] = min(model[name], most)
  stage.optim.generator.update(
    lr=2 * stage.optim.generator.lr, schedule='cosine'
  )
  stage.data.batch_size = min(4, stage.data.batch_size)
