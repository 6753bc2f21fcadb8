//! Frames as soon as their unit is sampled: the decoder is causal, so a finished unit needs
//! nothing of those after it.

use std::time::Instant;

use super::{Output, Pipeline, Reporter, Request, Vae, stop_if_cancelled};
use crate::Result;
use crate::media::{FrameSink, Metadata, open_sink};
use crate::sampler::{Latent, LatentScaling};

/// Decodes unit after unit into the output, while the next ones are sampled. Every unit is
/// decoded once, and to the bits that decoding all of them at the end gives.
pub(super) struct Stream<'a> {
    vae: Vae<'a>,
    scaling: LatentScaling,
    units: usize,
    sink: Box<dyn FrameSink>,
    seconds: f64,
}

impl<'a> Stream<'a> {
    /// Opens the decoder and the output. There must be no tiling: a tile is decoded whole.
    pub(super) fn open(
        pipeline: &'a Pipeline,
        request: &Request,
        output: &Output,
    ) -> Result<Stream<'a>> {
        let (_, spec) = request.resolve()?;
        let metadata = Metadata { comment: Some(pipeline.settings(request).to_string()) };
        let mut sink = open_sink(&output.target, &spec, &metadata, output.overwrite)?;
        if output.follow {
            sink.show_early()?;
        }
        let (vae, scaling) = (pipeline.vae()?, pipeline.latent_scaling());
        Ok(Stream { vae, scaling, units: request.units, sink, seconds: 0.0 })
    }

    /// Decodes a unit; units come in order.
    pub(super) fn push(
        &mut self,
        unit: usize,
        latent: &Latent,
        reporter: &mut dyn Reporter,
    ) -> Result<()> {
        let clock = Instant::now();
        let mut latent = latent.clone();
        self.scaling.to_vae(unit, &mut latent);
        let frames = self.vae.decode_unit(unit, self.units, &latent)?;
        for frame in &frames {
            self.sink.push(frame)?;
        }
        self.sink.settle()?;
        reporter.unit_decoded(unit, &latent, &frames);
        self.seconds += clock.elapsed().as_secs_f64();
        stop_if_cancelled(reporter)
    }

    /// Completes the output; the seconds that decoding and writing took.
    pub(super) fn finish(self) -> Result<f64> {
        let clock = Instant::now();
        self.sink.finish()?;
        Ok(self.seconds + clock.elapsed().as_secs_f64())
    }
}
