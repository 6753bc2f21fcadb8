//! Prompts to what the transformer sees of them.

use std::sync::Arc;

use super::Weights;
use super::memory::{Once, stream_weights};
use crate::checkpoint::{Checkpoint, Component};
use crate::exec::Backend;
use crate::graph::Graph;
use crate::models::{clip, t5};
use crate::tensor::WeightSource;
use crate::text::{ClipTokenizer, T5Tokenizer, Tokens};
use crate::{Error, Result};

/// One prompt, encoded.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedPrompt {
    /// T5 states of the tokens, padding left out: `[tokens, width]`.
    pub embeds: Vec<f32>,
    /// Number of T5 tokens, the end mark included.
    pub tokens: usize,
    /// Pooled CLIP state (CLIP-L, for sd3 followed by CLIP-G).
    pub pooled: Vec<f32>,
}

/// The tokenizers of a checkpoint.
pub struct Tokenizers {
    clips: Vec<(Component, ClipTokenizer)>,
    t5: T5Tokenizer,
}

/// Token ids of one prompt for each encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptTokens {
    clips: Vec<(Component, Tokens)>,
    t5: Tokens,
}

impl Tokenizers {
    /// Reads the tokenizers of `checkpoint`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] when a file is missing or damaged.
    pub fn open(checkpoint: &Checkpoint) -> Result<Tokenizers> {
        let mut clips = Vec::new();
        for &component in checkpoint.family().components() {
            if matches!(component, Component::ClipL | Component::ClipG) {
                let folder = checkpoint.tokenizer_dir(component)?;
                clips.push((component, ClipTokenizer::from_dir(folder)?));
            }
        }
        let t5 = T5Tokenizer::from_dir(checkpoint.tokenizer_dir(Component::T5)?)?;
        Ok(Tokenizers { clips, t5 })
    }

    /// The ids of `prompt`.
    ///
    /// # Errors
    /// As [`T5Tokenizer::encode`].
    pub fn encode(&self, prompt: &str) -> Result<PromptTokens> {
        let clips = self.clips.iter().map(|(c, tokenizer)| (*c, tokenizer.encode(prompt)));
        Ok(PromptTokens { clips: clips.collect(), t5: self.t5.encode(prompt)? })
    }
}

impl PromptTokens {
    /// What did not fit, for people: one line for each encoder that lost something.
    pub fn losses(&self) -> Vec<String> {
        let clips = self.clips.iter().map(|(_, tokens)| ("CLIP", tokens));
        let all = clips.chain([("T5", &self.t5)]);
        let mut lines: Vec<String> = all
            .filter_map(|(name, tokens)| {
                let lost = tokens.lost.as_ref()?;
                let length = tokens.ids.len();
                Some(format!("{name} takes {length} tokens; cut off: {}", shorten(lost)))
            })
            .collect();
        lines.dedup();
        lines
    }
}

/// The beginning of a text that may be very long.
fn shorten(text: &str) -> String {
    const MOST: usize = 200;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("“{}…”", &text[..end]),
        None => format!("“{text}”"),
    }
}

/// Encodes `prompts`, one encoder after the other, so that only one is in use at a time. All
/// prompts go through T5 together: its weights are needed once, and come in for it.
///
/// # Errors
/// Those of the backend.
pub fn encode(
    backend: &dyn Backend,
    checkpoint: &Checkpoint,
    weights: &Weights,
    prompts: &[PromptTokens],
    mut encoder_done: impl FnMut(usize, usize) -> Result<()>,
) -> Result<Vec<EncodedPrompt>> {
    let mut encoded: Vec<EncodedPrompt> = prompts
        .iter()
        .map(|p| EncodedPrompt { embeds: Vec::new(), tokens: p.t5.len, pooled: Vec::new() })
        .collect();
    let encoders = prompts.first().map_or(0, |p| p.clips.len()) + 1;
    for index in 0..encoders - 1 {
        let Some(component) = prompts.first().map(|p| p.clips[index].0) else { break };
        let config = match component {
            Component::ClipG => checkpoint.clip_g()?,
            _ => checkpoint.clip_l()?,
        };
        let all = prompts.iter().map(|prompt| {
            let ids = &prompt.clips[index].1.ids;
            let ids = &ids[..clip::pooled_length(ids)];
            Ok((clip::record(config, ids.len(), backend.activations())?, ids))
        });
        let graphs = all.collect::<Result<Vec<_>>>()?;
        let pooled = run(backend, weights.get(component)?, graphs, Once::Nothing, "pooled")?;
        for (out, pooled) in encoded.iter_mut().zip(pooled) {
            out.pooled.extend(pooled);
        }
        encoder_done(index + 1, encoders)?;
    }
    let lengths: Vec<usize> = prompts.iter().map(|p| p.t5.len).collect();
    let ids: Vec<u32> = prompts.iter().flat_map(|p| p.t5.ids[..p.t5.len].iter().copied()).collect();
    let config = checkpoint.t5()?;
    let graph = t5::record(config, &lengths, backend.activations())?;
    let graphs = vec![(graph, ids.as_slice())];
    let embeds = run(backend, weights.get(Component::T5)?, graphs, Once::Everything, "embeds")?;
    let mut rest = embeds.first().map_or(&[][..], Vec::as_slice);
    for (out, length) in encoded.iter_mut().zip(lengths) {
        let (own, others) = rest.split_at(length * config.width);
        (out.embeds, rest) = (own.to_vec(), others);
    }
    encoder_done(encoders, encoders)?;
    let wanted = checkpoint.transformer().pooled_dim();
    match encoded.iter().find(|e| e.pooled.len() != wanted) {
        None => Ok(encoded),
        Some(e) => Err(Error::model(format!(
            "the CLIP encoders give {} pooled values, the transformer takes {wanted}",
            e.pooled.len()
        ))),
    }
}

/// Runs graphs of one encoder, each on its ids, and gives the output called `output` of each.
fn run(
    backend: &dyn Backend,
    weights: Arc<dyn WeightSource>,
    graphs: Vec<(Graph, &[u32])>,
    once: Once,
    output: &str,
) -> Result<Vec<Vec<f32>>> {
    let fit = stream_weights(&graphs.iter().map(|(g, _)| g).collect::<Vec<_>>(), once, backend);
    fit.require(backend, "encoding the prompts")?;
    let mut session = backend.open_with(weights, &fit.residency)?;
    let run = |(graph, ids)| {
        let graph = session.add(graph)?;
        let input = session.find(graph, "ids")?;
        session.write_ids(graph, input, ids)?;
        session.run(graph)?;
        let output = session.find(graph, output)?;
        let values = session.read(graph, output)?;
        session.remove(graph);
        Ok(values)
    };
    graphs.into_iter().map(run).collect()
}
