//! Single calls of the networks.

use pyraflow::Result;
use pyraflow::checkpoint::{Checkpoint, Component, TransformerConfig};
use pyraflow::exec::{GraphId, Session};
use pyraflow::graph::Graph;
use pyraflow::models::adaptive_norm::ModulationLayout;
use pyraflow::models::dit::{Clip, Geometry, StepOutput};
use pyraflow::models::vae::{Window, record_decoder, record_encoder};
use pyraflow::models::{clip, flux, mmdit, t5};
use pyraflow::pipeline::EncodedPrompt;
use pyraflow::tensor::DType;

use super::common::golden::{Golden, channels_last};

/// Runs that are timed.
const REPEATS: usize = 10;

/// Median seconds of a graph that ran once before.
fn time(session: &mut dyn Session, graph: GraphId) -> Result<f64> {
    let mut times = session.time(graph, REPEATS)?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// An input of a graph.
enum Input<'a> {
    Values(&'a [f32]),
    Ids(&'a [u32]),
}

/// One call on a backend: its tensors, and a session on the weights of its component.
pub struct Network<'a> {
    pub checkpoint: &'a Checkpoint,
    pub session: &'a mut dyn Session,
    pub dtype: DType,
    pub golden: &'a Golden,
}

/// What a call gave, and the seconds it takes.
type Outcome = (Vec<f32>, f64);

/// The text of all samples, as the transformer is given it.
pub fn prompts(golden: &Golden) -> Vec<EncodedPrompt> {
    let (shape, mask) = golden.tensor("mask");
    let (_, embeds) = golden.tensor("embeds");
    let (_, pooled) = golden.tensor("pooled");
    let (samples, width) = (shape[0], embeds.len() / mask.len());
    let masks = mask.chunks_exact(shape[1]).zip(embeds.chunks_exact(shape[1] * width));
    masks
        .zip(pooled.chunks_exact(pooled.len() / samples))
        .map(|((mask, embeds), pooled)| {
            let rows = mask.iter().zip(embeds.chunks_exact(width)).filter(|(m, _)| **m != 0.0);
            EncodedPrompt {
                tokens: rows.clone().count(),
                embeds: rows.flat_map(|(_, row)| row.iter().copied()).collect(),
                pooled: pooled.to_vec(),
            }
        })
        .collect()
}

impl Network<'_> {
    /// Runs `graph` and forgets it.
    fn run(&mut self, graph: Graph, inputs: &[(&str, Input)], output: &str) -> Result<Outcome> {
        let graph = self.session.add(graph)?;
        for (name, input) in inputs {
            let id = self.session.find(graph, name)?;
            match input {
                Input::Values(values) => self.session.write(graph, id, values)?,
                Input::Ids(ids) => self.session.write_ids(graph, id, ids)?,
            }
        }
        self.session.run(graph)?;
        let id = self.session.find(graph, output)?;
        let found = self.session.read(graph, id)?;
        let seconds = time(self.session, graph)?;
        self.session.remove(graph);
        Ok((found, seconds))
    }

    /// The call whose tensors are in `golden`: what it gives, and what it should give.
    pub fn call(&mut self, component: Component) -> Result<(Outcome, Vec<f32>)> {
        let found = match component {
            Component::Transformer => self.step()?,
            Component::Vae if self.golden.has("latents") => self.decode()?,
            Component::Vae => self.encode()?,
            Component::T5 => {
                let (_, mask) = self.golden.tensor("mask");
                let ids = &self.ids()[..mask.iter().filter(|m| **m != 0.0).count()];
                let graph = t5::record(self.checkpoint.t5()?, &[ids.len()], self.dtype)?;
                self.run(graph, &[("ids", Input::Ids(ids))], "embeds")?
            }
            Component::ClipL | Component::ClipG => {
                let config = match component {
                    Component::ClipL => self.checkpoint.clip_l()?,
                    _ => self.checkpoint.clip_g()?,
                };
                let ids = self.ids();
                let ids = &ids[..clip::pooled_length(&ids)];
                let graph = clip::record(config, ids.len(), self.dtype)?;
                self.run(graph, &[("ids", Input::Ids(ids))], "pooled")?
            }
        };
        let (shape, expected) = self.golden.tensor("out");
        let expected = if shape.len() == 5 { channels_last(&shape, &expected).1 } else { expected };
        Ok((found, expected))
    }

    fn ids(&self) -> Vec<u32> {
        self.golden.tensor("ids").1.iter().map(|&id| id as u32).collect()
    }

    /// The transformer's velocity. The adaptive norms' vectors, which a run computes once for
    /// all its steps, are not timed.
    fn step(&mut self) -> Result<Outcome> {
        let clips = (0..).map(|i| format!("clip{i}")).take_while(|name| self.golden.has(name));
        let clips: Vec<_> = clips
            .map(|name| {
                let (shape, values) = self.golden.tensor(&name);
                let clip = Clip { frames: shape[2], height: shape[3], width: shape[4] };
                (name, clip, channels_last(&shape, &values).1)
            })
            .collect();
        let (current, history) = clips.split_last().expect("clips");
        let prompts = prompts(self.golden);
        let text: Vec<f32> = prompts.iter().flat_map(|p| p.embeds.iter().copied()).collect();
        let geometry = Geometry {
            text_tokens: prompts.iter().map(|p| p.tokens).collect(),
            history: history.iter().map(|c| c.1).collect(),
            current: current.1,
            separate_latents: false,
        };
        let config = self.checkpoint.transformer();
        let (layout, graph) = record_step(config, &geometry, self.dtype)?;
        let (width, pooled_dim) = (config.width(), config.pooled_dim());
        let rows = geometry.samples();
        let table = layout.record(rows, 0..rows, width, pooled_dim, self.dtype)?;
        let (_, timesteps) = self.golden.tensor("timestep");
        let pooled: Vec<f32> = prompts.iter().flat_map(|p| p.pooled.iter().copied()).collect();
        let inputs = [("timesteps", Input::Values(&timesteps)), ("pooled", Input::Values(&pooled))];
        let (modulation, _) = self.run(table, &inputs, "modulation")?;

        let mut inputs = vec![
            ("text", Input::Values(&text)),
            ("modulation", Input::Values(&modulation)),
            ("current", Input::Values(&current.2)),
        ];
        inputs.extend(history.iter().map(|c| (c.0.as_str(), Input::Values(&c.2))));
        self.run(graph, &inputs, "velocity")
    }

    /// Frames, as a run decodes them: one latent at a time. The seconds are those of all windows.
    /// Timing a window spoils the frames it carries, which only a third one would notice.
    fn decode(&mut self) -> Result<Outcome> {
        let (shape, values) = self.golden.tensor("latents");
        let ([frames, height, width, channels], values) = channels_last(&shape, &values);
        let mut out = (Vec::new(), 0.0);
        assert!(frames <= 2, "{frames} latents");
        for (i, latent) in values.chunks_exact(height * width * channels).enumerate() {
            let carries = frames > 1;
            let window = Window { continues: i > 0, carries, ..Window::whole(1, height, width) };
            let graph = record_decoder(self.checkpoint.vae()?, window, self.dtype)?;
            let (video, seconds) =
                self.run(graph, &[("latents", Input::Values(latent))], "video")?;
            out.0.extend(video);
            out.1 += seconds;
        }
        Ok(out)
    }

    fn encode(&mut self) -> Result<Outcome> {
        let (shape, values) = self.golden.tensor("video");
        let ([frames, height, width, _], values) = channels_last(&shape, &values);
        let window = Window::whole(frames, height, width);
        let graph = record_encoder(self.checkpoint.vae()?, window, self.dtype)?;
        self.run(graph, &[("video", Input::Values(&values))], "moments")
    }
}

fn record_step(
    config: &TransformerConfig,
    geometry: &Geometry,
    dtype: DType,
) -> Result<(ModulationLayout, Graph)> {
    Ok(match config {
        TransformerConfig::Mmdit(c) => (
            mmdit::modulation_layout(c),
            mmdit::record_step(c, geometry, StepOutput::Velocity, dtype)?,
        ),
        TransformerConfig::Flux(c) => (
            flux::modulation_layout(c),
            flux::record_step(c, geometry, StepOutput::Velocity, dtype)?,
        ),
    })
}
