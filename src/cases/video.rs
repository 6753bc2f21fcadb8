//! The VAE's ops: causal convolutions, alone and window after window, and group norms.

use super::{Case, Fill, Scale};
use crate::Result;
use crate::graph::{Activation, ConvSpec, Graph, Op, Shuffle};
use crate::tensor::DType;

#[derive(Debug, Clone)]
struct Conv {
    /// Frames of each window; more than one window, and frames are carried.
    windows: Vec<usize>,
    height: usize,
    width: usize,
    inputs: usize,
    outputs: usize,
    kernel: usize,
    stride: [usize; 3],
    shuffle: Shuffle,
    residual: bool,
}

fn conv([frames, height, width]: [usize; 3], inputs: usize, outputs: usize) -> Conv {
    Conv {
        windows: vec![frames],
        height,
        width,
        inputs,
        outputs,
        kernel: 3,
        stride: [1; 3],
        shuffle: Shuffle::None,
        residual: false,
    }
}

impl Conv {
    fn pointwise(self) -> Conv {
        Conv { kernel: 1, ..self }
    }

    fn with_stride(self, stride: [usize; 3]) -> Conv {
        Conv { stride, ..self }
    }

    fn with_shuffle(self, shuffle: Shuffle) -> Conv {
        Conv { shuffle, ..self }
    }

    fn with_residual(self) -> Conv {
        Conv { residual: true, ..self }
    }

    /// Of a shuffle into time the frames one after the other.
    fn in_halves(self) -> Conv {
        self.with_shuffle(Shuffle::OneOfTime { second: true })
    }

    fn in_windows(self, frames: &[usize]) -> Conv {
        Conv { windows: frames.to_vec(), ..self }
    }

    /// Records window number `window`.
    fn record(&self, g: &mut Graph, dtype: DType, window: usize) -> Result<()> {
        let Conv { height, width, inputs, outputs, kernel, stride, .. } = *self;
        let frames = self.windows[window];
        let x = g.input("x", &[frames, height, width, inputs], dtype);
        let continues = window > 0;
        let shuffle = match self.shuffle {
            // A window that continues drops nothing.
            Shuffle::Time { drop_first } => Shuffle::Time { drop_first: drop_first && !continues },
            other => other,
        };
        let spec = ConvSpec {
            weight: g.weight("weight", &[outputs, inputs, kernel, kernel, kernel]),
            bias: g.weight("bias", &[outputs]),
            kernel: [kernel; 3],
            stride,
            shuffle,
            residual: self.residual,
            continues,
            moves_on: true,
        };
        if self.shuffle == (Shuffle::OneOfTime { second: true }) {
            let shuffle = Shuffle::OneOfTime { second: false };
            let first = ConvSpec { shuffle, moves_on: false, ..spec.clone() };
            let y = g.conv3d(first, &[x], self.windows.len() > 1)?;
            g.mark_output("first", y);
        }
        let mut read = vec![x];
        if self.residual {
            let front = spec.front_frames();
            let shape = [
                (frames + front - kernel) / stride[0] + 1,
                (height - 1) / stride[1] + 1,
                (width - 1) / stride[2] + 1,
                outputs,
            ];
            read.push(g.input("residual", &shape, dtype));
        }
        let y = g.conv3d(spec, &read, self.windows.len() > 1)?;
        g.mark_output("y", y);
        Ok(())
    }

    fn named(self, prefix: &str) -> Case {
        let frames: Vec<_> = self.windows.iter().map(usize::to_string).collect();
        let [kt, sh] = [self.stride[0], self.stride[1]];
        let mut kind = format!("k{}", self.kernel);
        if [kt, sh] != [1, 1] {
            kind += &format!("-stride{}{}{}", self.stride[0], self.stride[1], self.stride[2]);
        }
        kind += match self.shuffle {
            Shuffle::None => "",
            Shuffle::Space => "-space",
            Shuffle::Time { drop_first: true } => "-time-drop",
            Shuffle::Time { drop_first: false } => "-time",
            Shuffle::OneOfTime { .. } => "-time-in-halves",
        };
        kind += if self.residual { "-residual" } else { "" };
        let Conv { height, width, inputs, outputs, .. } = self;
        let frames = frames.join("+");
        let name = format!("{prefix}{kind}/{frames}x{height}x{width}-c{inputs}-{outputs}");
        let first = self.clone();
        let mut case = Case::new("conv3d", name, move |g, dtype| first.record(g, dtype, 0));
        if let Shuffle::OneOfTime { .. } = self.shuffle {
            case.outputs.push("first");
        }
        for window in 1..self.windows.len() {
            let conv = self.clone();
            case = case.then(move |g, dtype| conv.record(g, dtype, window));
        }
        case
    }

    fn case(self) -> Case {
        self.named("")
    }
}

#[derive(Debug, Clone, Copy)]
struct GroupNorm {
    shape: [usize; 4],
    groups: usize,
    silu: bool,
}

impl GroupNorm {
    fn record(self, g: &mut Graph, dtype: DType, in_place: bool) -> Result<()> {
        let channels = self.shape[3];
        let mut x = g.input("x", &self.shape, dtype);
        if in_place {
            x = g.push(Op::Activate(Activation::Silu), &[x])?;
        }
        let weight = g.weight("weight", &[channels]);
        let bias = g.weight("bias", &[channels]);
        let (groups, silu) = (self.groups, self.silu);
        let y = g.push(Op::GroupNorm { weight, bias, groups, eps: 1e-6, silu }, &[x])?;
        g.mark_output("y", y);
        Ok(())
    }

    fn named(self, prefix: &str, in_place: bool) -> Case {
        let [t, h, w, c] = self.shape;
        let silu = if self.silu { "-silu" } else { "" };
        let name = format!("{prefix}{t}x{h}x{w}-c{c}-g{}{silu}", self.groups);
        Case::new("group_norm", name, move |g, dtype| self.record(g, dtype, in_place))
    }

    fn case(self) -> Case {
        self.named("", false)
    }
}

fn group_norm([t, h, w]: [usize; 3], channels: usize, groups: usize, silu: bool) -> GroupNorm {
    GroupNorm { shape: [t, h, w, channels], groups, silu }
}

const DROP: Shuffle = Shuffle::Time { drop_first: true };
const KEEP: Shuffle = Shuffle::Time { drop_first: false };

pub(super) fn cases(scale: Scale) -> Vec<Case> {
    match scale {
        Scale::Small => small(),
        Scale::Test => test(),
        Scale::Bench => bench(),
    }
}

fn small() -> Vec<Case> {
    let size = [2, 3, 5];
    vec![
        conv(size, 3, 16).case(),
        conv(size, 16, 3).case(),
        conv(size, 40, 24).case(),
        conv(size, 24, 40).pointwise().case(),
        conv(size, 16, 16).with_stride([1, 2, 2]).case(),
        conv([3, 3, 5], 16, 16).with_stride([2, 1, 1]).case(),
        conv(size, 16, 16).with_shuffle(Shuffle::Space).case(),
        conv(size, 16, 16).with_shuffle(DROP).case(),
        conv(size, 16, 16).with_shuffle(KEEP).case(),
        conv(size, 16, 16).in_halves().case(),
        conv(size, 16, 24).with_residual().case(),
        conv(size, 16, 16).in_windows(&[2, 1, 3]).case(),
        conv(size, 16, 16).in_windows(&[3, 2]).with_stride([2, 1, 1]).case(),
        conv(size, 16, 16).in_windows(&[1, 1]).with_shuffle(DROP).case(),
        group_norm(size, 24, 8, true).case(),
        group_norm(size, 8, 8, false).case(),
        group_norm([1, 16, 16], 32, 2, true).case(),
        group_norm(size, 24, 8, true).named("in-place/", true),
    ]
}

fn test() -> Vec<Case> {
    let mut cases = channels_and_extents();
    for (frames, height, width) in [(1, 1, 1), (2, 5, 7), (5, 8, 8), (3, 33, 17), (9, 2, 1)] {
        let size = [frames, height, width];
        for (inputs, outputs) in [(16, 16), (24, 32), (128, 64)] {
            let conv = || conv(size, inputs, outputs);
            cases.push(conv().with_stride([1, 2, 2]).case());
            cases.push(conv().with_stride([2, 1, 1]).case());
            cases.push(conv().with_shuffle(Shuffle::Space).case());
            cases.push(conv().with_shuffle(DROP).case());
            cases.push(conv().with_shuffle(KEEP).case());
            cases.push(conv().in_halves().case());
            cases.push(conv().with_residual().case());
        }
    }
    for outputs in [8, 12, 20, 96, 160, 256] {
        cases.push(conv([2, 5, 7], 16, outputs).with_shuffle(Shuffle::Space).case());
        cases.push(conv([2, 5, 7], 16, outputs).with_shuffle(DROP).case());
        cases.push(conv([2, 5, 7], 16, outputs).in_halves().case());
    }
    cases.extend(windows());
    cases.extend(structured_convolutions());
    cases.extend(group_norms());
    cases
}

fn channels_and_extents() -> Vec<Case> {
    const SIZES: [[usize; 3]; 6] =
        [[1, 1, 1], [2, 5, 7], [3, 33, 17], [4, 8, 8], [1, 16, 24], [5, 1, 9]];
    const CHANNELS: [usize; 7] = [3, 16, 24, 32, 40, 64, 128];
    let mut cases = Vec::new();
    for (i, inputs) in CHANNELS.into_iter().enumerate() {
        for (j, outputs) in CHANNELS.into_iter().enumerate() {
            let size = SIZES[(i + j) % SIZES.len()];
            cases.push(conv(size, inputs, outputs).case());
            cases.push(conv(SIZES[(i + j + 3) % SIZES.len()], inputs, outputs).pointwise().case());
        }
    }
    for size in SIZES {
        cases.push(conv(size, 16, 96).case());
        cases.push(conv(size, 40, 40).with_residual().case());
    }
    cases.push(conv([2, 4, 6], 256, 512).case());
    cases.push(conv([2, 4, 6], 512, 256).with_residual().case());
    cases.push(conv([1, 3, 5], 512, 512).pointwise().case());
    cases.push(conv([1, 64, 130], 16, 32).case());
    cases
}

fn windows() -> Vec<Case> {
    let mut cases = Vec::new();
    let size = [1, 5, 7];
    for frames in [&[1, 1, 1, 1][..], &[2, 1, 3], &[5, 4], &[1, 2]] {
        for (inputs, outputs) in [(16, 24), (40, 16), (3, 16), (128, 128)] {
            cases.push(conv(size, inputs, outputs).in_windows(frames).case());
        }
        cases.push(conv(size, 24, 24).in_windows(frames).with_residual().case());
        cases.push(conv(size, 16, 32).in_windows(frames).with_shuffle(Shuffle::Space).case());
        cases.push(conv(size, 16, 32).in_windows(frames).with_shuffle(DROP).case());
        cases.push(conv(size, 64, 128).in_windows(frames).in_halves().case());
        cases.push(conv(size, 16, 32).in_windows(frames).with_stride([1, 2, 2]).case());
        cases.push(conv(size, 16, 24).in_windows(frames).pointwise().case());
    }
    // An encoder's windows: one frame more than a multiple of 8, then multiples.
    for frames in [&[9, 8, 16][..], &[5, 4], &[3, 2, 2], &[1, 2]] {
        cases.push(conv(size, 16, 24).in_windows(frames).with_stride([2, 1, 1]).case());
    }
    cases.push(conv([1, 33, 17], 16, 16).in_windows(&[2, 2]).case());
    cases
}

fn structured_convolutions() -> Vec<Case> {
    let size = [3, 5, 7];
    // The last pixel but one of the second frame.
    let nan = |channels: usize| Fill::Normal(1.0).with_nan((2 * 35 - 2) * channels + 3);
    let centre: Vec<f32> = (0..27).map(|tap| f32::from(u8::from(tap == 22))).collect();
    vec![
        conv(size, 24, 24)
            .pointwise()
            .named("identity/")
            .fill("weight", Fill::Identity)
            .fill("bias", Fill::Constant(0.0)),
        // The sum over the channels of the pixel itself: the last tap in time, the middle one
        // in space.
        conv(size, 16, 16).named("centre/").fill("weight", Fill::Values(centre)),
        // Counts the taps that lie within the video.
        conv(size, 16, 16)
            .named("ones/")
            .fill("x", Fill::Constant(1.0))
            .fill("weight", Fill::Constant(0.0625))
            .fill("bias", Fill::Constant(0.0)),
        conv([1, 5, 7], 16, 16)
            .in_windows(&[2, 2])
            .named("ones/")
            .fill("x", Fill::Constant(1.0))
            .fill("weight", Fill::Constant(0.0625)),
        conv(size, 16, 24).named("nan/").fill("x", nan(16)),
        conv(size, 3, 24).named("nan/").fill("x", Fill::Normal(1.0).with_nan(3 * 40)),
        conv(size, 40, 24).pointwise().named("nan/").fill("x", nan(40)),
        conv(size, 16, 24).with_stride([1, 2, 2]).named("nan/").fill("x", nan(16)),
        conv(size, 16, 24).with_stride([2, 1, 1]).named("nan/").fill("x", nan(16)),
        conv(size, 16, 24).with_shuffle(Shuffle::Space).named("nan/").fill("x", nan(16)),
        conv(size, 16, 24).with_shuffle(DROP).named("nan/").fill("x", nan(16)),
        conv(size, 16, 24).with_residual().named("nan-in-residual/").fill("residual", nan(24)),
        conv(size, 16, 24).named("nan-in-bias/").fill("bias", Fill::Normal(0.5).with_nan(23)),
        conv([1, 5, 7], 16, 24).in_windows(&[2, 3]).named("nan-carried/").fill("x", nan(16)),
    ]
}

fn group_norms() -> Vec<Case> {
    let mut cases = Vec::new();
    for (channels, groups) in [
        (8, 8),
        (16, 8),
        (24, 8),
        (32, 8),
        (40, 8),
        (16, 2),
        (32, 2),
        (64, 32),
        (128, 32),
        (256, 32),
        (512, 32),
        (96, 8),
    ] {
        for size in [[1, 1, 1], [2, 5, 7], [1, 33, 17], [3, 16, 24]] {
            let silu = (channels + size[1]) % 2 == 1;
            cases.push(group_norm(size, channels, groups, silu).case());
        }
        cases.push(group_norm([1, 8, 8], channels, groups, true).case());
        cases.push(group_norm([1, 8, 8], channels, groups, false).case());
    }
    cases.push(group_norm([2, 96, 130], 32, 8, true).case());
    cases.push(group_norm([5, 16, 16], 128, 32, true).named("in-place/", true));
    for (size, channels, groups) in [([2, 5, 7], 24, 8), ([2, 33, 17], 128, 32), ([1, 9, 9], 64, 4)]
    {
        let structured = |name: &str, fill| {
            group_norm(size, channels, groups, false).named(name, false).fill("x", fill)
        };
        let pixel = size[2] * channels;
        cases.push(structured("large-mean/", Fill::NearlyConstant { mean: 1000.0, rarity: 24 }));
        cases.push(structured("large-mean-of-rows/", Fill::ConstantRows));
        // As for norms of rows: the last bit of the mean, times 1/√eps.
        cases.push(structured("ones/", Fill::Constant(1.0)).floor(1e-3));
        cases.push(structured("zeros/", Fill::Constant(0.0)));
        cases.push(structured("small/", Fill::Normal(1e-3)));
        cases.push(structured("large/", Fill::Normal(1e4)));
        cases.push(structured("nan/", Fill::Normal(1.0).with_nan(pixel + 1)));
    }
    cases
}

fn bench() -> Vec<Case> {
    // 768p, one latent (8 frames) a window.
    vec![
        conv([1, 96, 160], 16, 512).case(),
        conv([1, 96, 160], 16, 16).pointwise().case(),
        conv([1, 96, 160], 512, 512).with_residual().case(),
        conv([1, 96, 160], 512, 2048).with_shuffle(Shuffle::Space).case(),
        conv([1, 192, 320], 512, 1024).with_shuffle(KEEP).case(),
        conv([1, 192, 320], 512, 1024).with_shuffle(DROP).case(),
        conv([2, 192, 320], 512, 512).with_residual().case(),
        conv([1, 192, 320], 512, 512).in_windows(&[2, 2]).case(),
        conv([4, 384, 640], 512, 256).case(),
        conv([4, 384, 640], 512, 256).pointwise().case(),
        conv([4, 384, 640], 256, 256).with_residual().case(),
        conv([4, 384, 640], 256, 1024).with_shuffle(Shuffle::Space).case(),
        conv([1, 768, 1280], 256, 512).in_halves().case(),
        conv([8, 768, 1280], 256, 128).case(),
        conv([8, 768, 1280], 128, 128).with_residual().case(),
        conv([8, 768, 1280], 128, 3).case(),
        // The encoder's.
        conv([1, 768, 1280], 3, 128).case(),
        conv([1, 768, 1280], 128, 128).with_stride([1, 2, 2]).case(),
        conv([8, 384, 640], 128, 128).with_stride([2, 1, 1]).case(),
        group_norm([8, 768, 1280], 128, 32, true).case(),
        group_norm([4, 384, 640], 256, 32, true).case(),
        group_norm([2, 192, 320], 512, 32, true).case(),
        group_norm([1, 96, 160], 512, 32, false).case(),
    ]
}
