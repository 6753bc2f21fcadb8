//! A small analytic model in place of the transformer, and the sampling loop written straight
//! from the description of the algorithm.

use pyraflow::Result;
use pyraflow::sampler::{
    CHANNELS, Denoiser, Entry, Latent, LatentShape, RecordedNoise, SamplerRequest, StageGeometry,
    Step, guided_euler_step,
};

/// One frame, `[channel][row][column]`.
pub type Frame = Vec<Vec<Vec<f64>>>;
/// Frames shown at one size.
pub type FrameClip = Vec<Frame>;

/// A velocity that depends on everything it may depend on, with weights that tell positions,
/// channels, frames and clips apart.
fn velocity(x: &Frame, timestep: f64, history: &[FrameClip], positive: bool) -> Frame {
    let prompt = if positive { 1.0 } else { -0.4 };
    let mut past = 0.0;
    for (k, clip) in history.iter().enumerate() {
        let values = clip.len() * clip[0][0].len() * clip[0][0][0].len();
        for (f, frame) in clip.iter().enumerate() {
            visit(frame, |c, y, x, value| {
                let angle = k as f64 + 0.7 * f as f64 + 1.3 * c as f64 + 0.37 * y + 0.11 * x;
                past += angle.cos() * value * (k + 1) as f64 / values as f64;
            });
        }
    }
    let mut out = x.clone();
    for (c, plane) in out.iter_mut().enumerate() {
        for (y, row) in plane.iter_mut().enumerate() {
            for (x, value) in row.iter_mut().enumerate() {
                let pattern = (c as f64 + 2.0 * y as f64 + 3.0 * x as f64).cos();
                *value = 0.3 * *value * (1.0 + 0.1 * prompt)
                    + pattern * (timestep / 300.0).sin()
                    + prompt * (0.2 + past * (1.0 + pattern));
            }
        }
    }
    out
}

fn visit(frame: &Frame, mut f: impl FnMut(usize, f64, f64, f64)) {
    for (c, plane) in frame.iter().enumerate() {
        for (y, row) in plane.iter().enumerate() {
            for (x, &value) in row.iter().enumerate() {
                f(c, y as f64, x as f64, value);
            }
        }
    }
}

/// The model as a [`Denoiser`]; it also checks what the sampler promises it.
#[derive(Default)]
pub struct Analytic {
    pub stage: Option<StageGeometry>,
    /// The stage that was announced.
    pub expected: Option<StageGeometry>,
    pub x: Option<Latent>,
    pub history: Vec<FrameClip>,
    pub calls: Vec<(usize, usize, Step)>,
    pub bf16: bool,
    /// A unit and a stage whose steps give this for one value, if any do.
    pub poison: Option<(usize, usize, f32)>,
    /// The stages after which the latent was asked for.
    pub asked: Vec<(usize, usize)>,
}

impl Analytic {
    fn check_rounded(&self, latent: &Latent) {
        let rounded = |x: &f32| x.to_bits() & 0xffff == 0;
        assert_eq!(self.bf16, latent.data().iter().all(rounded), "bf16 values");
    }
}

impl Denoiser for Analytic {
    fn begin_stage(
        &mut self,
        stage: &StageGeometry,
        history: &[Latent],
        entry: &Entry,
    ) -> Result<()> {
        let shapes: Vec<_> = history.iter().map(Latent::shape).collect();
        assert_eq!(shapes, stage.history);
        if self.stage.is_some() {
            assert_eq!(self.expected.take().as_ref(), Some(stage), "every stage but the first");
        }
        history.iter().for_each(|clip| self.check_rounded(clip));
        self.history = history.iter().map(frames_of).collect();
        assert_eq!(entry.shape(), stage.shape);
        let mut x = entry.latent(self.x.as_ref())?;
        assert_eq!(x.shape(), stage.shape);
        assert_eq!(stage.rounded, self.bf16);
        if stage.rounded {
            x.round_to_bf16();
        }
        self.x = Some(x);
        self.stage = Some(stage.clone());
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        let stage = self.stage.as_ref().expect("begin_stage comes first");
        let mut x = self.x.take().expect("begin_stage comes first");
        assert_eq!(step.timestep, stage.timesteps[step.index]);
        assert_eq!(step.guidance.is_some(), stage.guided);
        self.check_rounded(&x);
        self.calls.push((stage.unit, stage.stage, *step));
        let current = frames_of(&x).remove(0);
        let [positive, negative] = [true, false].map(|positive| {
            let v = velocity(&current, step.timestep.into(), &self.history, positive);
            latent_of(&[v]).into_data()
        });
        let negative = step.guidance.map(|scale| (&negative[..], scale));
        guided_euler_step(x.data_mut(), &positive, negative, step.dsigma);
        match self.poison {
            Some((unit, at, value)) if (unit, at) == (stage.unit, stage.stage) => {
                x.data_mut()[7] = value;
            }
            _ => {}
        }
        if stage.rounded {
            x.round_to_bf16();
        }
        self.x = Some(x);
        Ok(())
    }

    fn expect_stage(&mut self, next: &StageGeometry) -> Result<()> {
        assert_eq!(self.expected.replace(next.clone()), None);
        Ok(())
    }

    fn latent(&mut self) -> Result<Latent> {
        let stage = self.stage.as_ref().expect("begin_stage comes first");
        self.asked.push((stage.unit, stage.stage));
        Ok(self.x.clone().expect("begin_stage comes first"))
    }
}

pub fn frames_of(latent: &Latent) -> FrameClip {
    let LatentShape { frames, height, width } = latent.shape();
    let first = latent.to_channels_first();
    let row = |c: usize, t: usize, y: usize| {
        let start = ((c * frames + t) * height + y) * width;
        first[start..start + width].iter().map(|&v| f64::from(v)).collect()
    };
    let plane = |c, t| (0..height).map(|y| row(c, t, y)).collect();
    (0..frames).map(|t| (0..CHANNELS).map(|c| plane(c, t)).collect()).collect()
}

pub fn latent_of(frames: &[Frame]) -> Latent {
    let (height, width) = (frames[0][0].len(), frames[0][0][0].len());
    let shape = LatentShape { frames: frames.len(), height, width };
    let planes = (0..CHANNELS).flat_map(|c| frames.iter().map(move |frame| &frame[c]));
    let values: Vec<f32> = planes.flatten().flatten().map(|&v| v as f32).collect();
    Latent::from_channels_first(shape, &values).unwrap()
}

fn halve(frame: &Frame) -> Frame {
    let half = |plane: &Vec<Vec<f64>>| {
        let mean = |y: usize, x: usize| {
            (plane[2 * y][2 * x]
                + plane[2 * y][2 * x + 1]
                + plane[2 * y + 1][2 * x]
                + plane[2 * y + 1][2 * x + 1])
                / 4.0
        };
        (0..plane.len() / 2)
            .map(|y| (0..plane[0].len() / 2).map(|x| mean(y, x)).collect())
            .collect()
    };
    frame.iter().map(half).collect()
}

/// `frame` at pyramid level `level`.
fn resize(frame: &Frame, level: usize) -> Frame {
    (level..2).fold(frame.clone(), |frame, _| halve(&frame))
}

fn history_of(finished: &[Frame], stage: usize) -> Vec<FrameClip> {
    let clean = |level: usize, frame: usize| resize(&finished[frame], level);
    let mut newest_first: Vec<FrameClip> = Vec::new();
    let mut left = finished.len();
    let mut level = stage;
    if left > 0 {
        left -= 1;
        newest_first.push(vec![clean(level, left)]);
    }
    while left > 0 {
        level = level.max(1) - 1;
        if level > 0 {
            left -= 1;
            newest_first.push(vec![clean(level, left)]);
        } else {
            newest_first.push((0..left).map(|frame| clean(0, frame)).collect());
            left = 0;
        }
    }
    newest_first.reverse();
    newest_first
}

pub fn reference(
    request: &SamplerRequest,
    image: Option<&Frame>,
    noise: &RecordedNoise,
) -> Vec<Frame> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/scheduler.json");
    let recorded: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let numbers = |value: &serde_json::Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect()
    };
    let initial = frames_of(&noise.initial);
    let mut blocks = noise.blocks.iter().map(|block| frames_of(block).remove(0));
    let mut finished: Vec<Frame> = image.into_iter().cloned().collect();
    while finished.len() < request.units {
        let unit = finished.len();
        let start = &initial[if image.is_some() { unit - 1 } else { unit }];
        let mut x = halve(&halve(start));
        x.iter_mut().flatten().flatten().for_each(|v| *v *= 4.0);
        let first = image.is_some() || unit == 0;
        for stage in 0..3 {
            if stage > 0 {
                let s = 1.0 - recorded["ori_start_sigmas"][stage.to_string()].as_f64().unwrap();
                let alpha = 1.0 / (2.0 * (1.0 - s) + s);
                let beta = alpha * (1.0 - s) * 3f64.sqrt();
                let mut next = blocks.next().unwrap();
                for (c, plane) in next.iter_mut().enumerate() {
                    for (y, row) in plane.iter_mut().enumerate() {
                        for (column, n) in row.iter_mut().enumerate() {
                            *n = alpha * x[c][y / 2][column / 2] + beta * *n;
                        }
                    }
                }
                x = next;
            }
            let steps = if first { request.steps } else { request.video_steps }[stage];
            let schedule = &recorded["steps"][steps.to_string()][stage];
            let timesteps = numbers(&schedule["timesteps"]);
            let sigmas = numbers(&schedule["sigmas"]);
            let history = history_of(&finished, stage);
            for k in 0..steps {
                let positive = velocity(&x, timesteps[k], &history, true);
                let negative = velocity(&x, timesteps[k], &history, false);
                let constant = if unit == 0 { request.guidance } else { request.video_guidance };
                let scale = f64::from(match request.linear_guidance {
                    Some(linear) => (request.guidance - linear.alpha * unit as f32).max(linear.min),
                    None => constant,
                });
                for (c, plane) in x.iter_mut().enumerate() {
                    for (y, row) in plane.iter_mut().enumerate() {
                        for (column, value) in row.iter_mut().enumerate() {
                            let (p, n) = (positive[c][y][column], negative[c][y][column]);
                            let v = if request.guidance == 0.0 { p } else { n + scale * (p - n) };
                            *value += (sigmas[k + 1] - sigmas[k]) * v;
                        }
                    }
                }
            }
        }
        finished.push(x);
    }
    finished
}
