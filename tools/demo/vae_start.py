"""A start for the VAE from which it learns fast: a wavelet packet on the skip path.

Left to chance, training loses absolute colour (every norm removes it) and motion for a long time. So the skip path
begins as a fixed linear transform: each strided convolution splits every signal into the bands of 2x2 pixels or 2
frames and keeps the most important ones, each shuffle convolution is the inverse, and the residual branches add
nothing at first. Signals sit in the even channels; the odd channels hold constants, so that a group's statistics,
and with them the norms, hardly depend on the picture. The two output convolutions are fitted by least squares.
"""

import torch

CONSTANT = 1.5
SPACE = {"LL": (1.0, (1, 1, 1, 1), 0.25), "LH": (0.5, (1, 1, -1, -1), 0.5), "HL": (0.5, (1, -1, 1, -1), 0.5),
         "HH": (0.25, (1, -1, -1, 1), 0.5)}  # importance, signs over (y, x), analysis gain
TIME = {"L": 1.0, "D": 0.5}


def zero(conv):
    torch.nn.init.zeros_(conv.weight)
    torch.nn.init.zeros_(conv.bias)


def fill_constants(conv, used):
    """Give the channels that carry no signal a constant value."""
    for channel in range(conv.weight.shape[0]):
        if channel not in used:
            conv.bias.data[channel] = CONSTANT if channel % 4 == 1 else -CONSTANT


def quiet(module):
    """Make every residual branch add nothing."""
    for name, part in module.named_modules():
        if name.endswith("conv2") or name.endswith("to_out.0"):
            part = part.conv if hasattr(part, "conv") else part
            zero(part)


def keep(candidates, count):
    """The most important labels, in a fixed order. candidates: {label: importance}."""
    ranked = sorted(candidates, key=lambda label: (-candidates[label], str(label)))
    return {label: candidates[label] for label in ranked[:count]}


def pass_through(conv, before, after):
    """A 1x1x1 or 3x3x3 convolution that moves labelled signals to their new channels."""
    zero(conv)
    middle = conv.weight.shape[-1] // 2
    for label, source in before.items():
        if label in after:
            conv.weight.data[after[label], source, -1, middle, middle] = 1.0
    fill_constants(conv, set(after.values()))


def channels(labels):
    return {label: 2 * i for i, label in enumerate(labels)}


def start_encoder(encoder):
    """Returns the labels in front of every down block and at the end, with importances."""
    quiet(encoder)
    labels = {("y",): 1.0, ("u",): 0.6, ("v",): 0.6}
    mix = torch.tensor([[1, 1, 1], [1, 0, -1], [-0.5, 1, -0.5]]) * torch.tensor([[0.577], [0.707], [0.816]])
    conv = encoder.conv_in.conv
    zero(conv)
    for row, channel in enumerate(channels(labels).values()):
        conv.weight.data[channel, :, -1, 1, 1] = mix[row]
    fill_constants(conv, set(channels(labels).values()))
    levels = [labels]
    for block in encoder.down_blocks:
        place = channels(labels)
        if hasattr(block.resnets[0], "conv_shortcut"):
            pass_through(block.resnets[0].conv_shortcut.conv, place, place)
        if not hasattr(block, "downsamplers"):
            continue
        conv = block.downsamplers[0].conv.conv
        room = conv.weight.shape[0] // 2
        wide = keep({(c, s): w * SPACE[s][0] for c, w in labels.items() for s in SPACE}, room)
        zero(conv)
        for (c, s), target in channels(wide).items():
            taps = torch.tensor(SPACE[s][1]).reshape(2, 2) * SPACE[s][2]
            conv.weight.data[target, place[c], -1, 1:, 1:] = taps
        fill_constants(conv, set(channels(wide).values()))
        conv = block.temporal_downsamplers[0].conv.conv
        labels = keep({(c, t): w * TIME[t] for c, w in wide.items() for t in TIME}, room)
        zero(conv)
        for (c, t), target in channels(labels).items():
            source = channels(wide)[c]
            conv.weight.data[target, source, 2, 1, 1] = 1.0
            if t == "D":
                conv.weight.data[target, source, 1, 1, 1] = -1.0
        fill_constants(conv, set(channels(labels).values()))
        levels.append(labels)
    return levels


def start_decoder(decoder, latent_labels):
    """Invert the encoder's transform for the labels that the latents hold, in the given order."""
    quiet(decoder)
    labels = list(latent_labels)
    conv = decoder.conv_in.conv
    pass_through(conv, {label: i for i, label in enumerate(labels)}, channels(labels))
    for block in decoder.up_blocks:
        place = channels(labels)
        if hasattr(block.resnets[0], "conv_shortcut"):
            pass_through(block.resnets[0].conv_shortcut.conv, place, place)
        if not hasattr(block, "upsamplers"):
            continue
        conv = block.upsamplers[0].conv.conv
        zero(conv)
        middle = list(dict.fromkeys((c, t) for ((c, _), t) in labels))
        at = channels(middle)
        for ((c, s), t), source in place.items():
            for p, sign in enumerate(SPACE[s][1]):
                conv.weight.data[4 * at[c, t] + p, source, -1, 1, 1] = sign * (1.0 if s == "LL" else 0.5)
        spread_constants(conv, set(at.values()), 4)
        conv = block.temporal_upsamplers[0].conv.conv
        zero(conv)
        after = list(dict.fromkeys(c for c, _ in middle))
        goal = channels(after)
        for (c, t), source in at.items():
            conv.weight.data[2 * goal[c], source, -1, 1, 1] = 1.0 if t == "L" else -1.0
            if t == "L":
                conv.weight.data[2 * goal[c] + 1, source, -1, 1, 1] = 1.0
        spread_constants(conv, set(goal.values()), 2)
        labels = after


def spread_constants(conv, used, parts):
    for channel in range(conv.weight.shape[0] // parts):
        if channel not in used:
            conv.bias.data[parts * channel:parts * (channel + 1)] = CONSTANT if channel % 4 == 1 else -CONSTANT


def fit(conv, features, targets, rows):
    """Set some output rows of a convolution's newest centre tap to the least-squares fit of targets from features."""
    x = torch.cat([features, torch.ones_like(features[:, :1])], 1).double()
    gram = x.T @ x + 1e-4 * len(x) * torch.eye(x.shape[1], dtype=torch.double, device=x.device)
    solution = torch.linalg.solve(gram, x.T @ targets.double())
    conv.weight.data[rows] = 0
    conv.weight.data[rows, :, -1, 1, 1] = solution[:-1].T.float()
    conv.bias.data[rows] = solution[-1].float()


def flat(x):
    return x.float().transpose(0, 1).flatten(1).T


@torch.no_grad()
def start(vae, pixels):
    """Initialise a VAE in place. pixels: a few clips [B, 3, T, H, W] in [-1, 1] to fit the output layers on."""
    encoder, decoder = vae.encoder, vae.decoder
    for norm in (encoder.conv_norm_out, decoder.conv_norm_out):
        norm.bias.fill_(1.5)
    labels = list(start_encoder(encoder)[-1])
    x = encoder.conv_in(pixels)
    for block in encoder.down_blocks:
        x = block(x)
    x = encoder.mid_block(x)
    signals = flat(x)[:, list(channels(labels).values())]
    scale = signals.std(0)
    zero(encoder.conv_out.conv)
    fit(encoder.conv_out.conv, flat(encoder.conv_norm_out(x)), signals / scale, slice(0, 16))
    encoder.conv_out.conv.bias[16:] = -6.0
    for conv in (vae.quant_conv.conv, vae.post_quant_conv.conv):
        zero(conv)
        conv.weight[:, :, 0, 0, 0] = torch.eye(conv.weight.shape[0], device=conv.weight.device)
    start_decoder(decoder, labels)
    decoder.conv_in.conv.weight *= scale[:, None, None, None]
    x = decoder.mid_block(decoder.conv_in(vae.moments(pixels)[:, :16]))
    for block in decoder.up_blocks:
        x = block(x)
    features = decoder.conv_norm_out(x)
    step = max(1, features.numel() // features.shape[1] // 400_000)
    fit(decoder.conv_out.conv, flat(features)[::step], flat(pixels)[::step], slice(0, 3))
