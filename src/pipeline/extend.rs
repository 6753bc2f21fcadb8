//! Going on from what an earlier run left: more units, or only its frames.

use std::time::Instant;

use super::generate::Start;
use super::settings::Given;
use super::{Output, Phase, Pipeline, Reporter, Request, SavedRun, State, Timings};
use crate::sampler::LatentShape;
use crate::{Error, Result};

impl Pipeline {
    /// Makes the video of `request` out of `state`, sampling the units that are not there yet.
    /// `request` is the state's own ([`State::request`]), perhaps of another length; the result
    /// has the bits of a run that was asked for that length at once. New units are added to the
    /// state's folder, which stays; those of a file of latents go to [`Output::units`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] when the state is of another model, device or version; else
    /// as [`Pipeline::generate`].
    pub fn extend(
        &self,
        state: &State,
        request: &Request,
        output: &Output,
        reporter: &mut dyn Reporter,
    ) -> Result<Timings> {
        let (_, spec) = request.resolve()?;
        output.check(&spec)?;
        self.warn_of_untrained_size(request, reporter);
        self.check_memory(request, output, reporter)?;
        let given = Given::of(&state.identity);
        let tokens = self.tokenize(request)?;
        let folder = state.folder().or(output.units.as_deref());
        let saved = folder.map(|f| self.saved_run(f, request, &given));
        let shape = request.resolve()?.0.unit_shape();
        let mut finished = match (&saved, state.folder()) {
            (Some(saved), Some(_)) => saved.resume(shape)?,
            _ => self.begin_extension(state, request, output, saved.as_ref(), shape)?,
        };
        finished.truncate(request.units);
        if request.image.is_some() && finished.is_empty() {
            return Err(Error::input(format!(
                "{} holds no unit yet, and the first image is not kept",
                state.path.display()
            ))
            .hint("run the same generate command again"));
        }
        let output =
            Output { keep_units: output.keep_units || state.folder.is_some(), ..output.clone() };
        let start = Start { image: None, finished, saved, given };
        self.produce(request, &output, &tokens, start, reporter)
    }

    /// The units of a file of latents, or those an interrupted extension of it left.
    fn begin_extension(
        &self,
        state: &State,
        request: &Request,
        output: &Output,
        saved: Option<&SavedRun>,
        shape: LatentShape,
    ) -> Result<Vec<crate::sampler::Latent>> {
        let here = self.identity(request, &Given::of(&state.identity));
        SavedRun::new(&state.path, here).check(&state.identity)?;
        if let Some(saved) = saved {
            let resumed = super::generate::prepare_units(Some(saved), output, request)?;
            if resumed.len() > state.units.len() {
                return Ok(resumed);
            }
            for (unit, latent) in state.units.iter().enumerate().skip(resumed.len()) {
                saved.save(unit, latent)?;
            }
        }
        match state.units.iter().all(|latent| latent.shape() == shape) {
            true => Ok(state.units.clone()),
            false => Err(Error::input(format!(
                "the latents in {} are not of the size they say",
                state.path.display()
            ))),
        }
    }

    /// Decodes what is there of `state` and writes it; `request` says the size, the tiling and
    /// what is written into the file about how it was made.
    ///
    /// # Errors
    /// As [`Pipeline::decode`], and those of the output.
    pub fn decode_state(
        &self,
        state: &State,
        request: &Request,
        output: &Output,
        reporter: &mut dyn Reporter,
    ) -> Result<Timings> {
        let (settings, spec) = request.resolve()?;
        output.check(&spec)?;
        if let Some((family, _)) = state.model().filter(|m| m.0 != self.checkpoint().family()) {
            let here = self.checkpoint().family();
            return Err(Error::input(format!(
                "the latents are of a {family} model, the checkpoint is {here}"
            ))
            .hint("name the checkpoint they were made with: --model DIR"));
        }
        let units = state.units.get(..request.units).unwrap_or(&state.units);
        if units.len() < request.units || units.is_empty() {
            return Err(Error::input(format!(
                "{} holds {} latent frames, not {}",
                state.path.display(),
                units.len(),
                request.units
            ))
            .hint("pyraflow extend makes the others"));
        }
        if units.iter().any(|latent| latent.shape() != settings.unit_shape()) {
            return Err(Error::input("the latents are not of the size that was asked for"));
        }
        let clock = Instant::now();
        self.write(request, output, units, reporter)?;
        let decoding = super::generate::finish(Phase::Decoding, clock, reporter);
        Ok(Timings { loading: self.loading_seconds, decoding, ..Timings::default() })
    }
}
