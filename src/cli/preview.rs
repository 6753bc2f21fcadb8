//! `--preview`: what a run looks like while it goes on.

use std::fs;
use std::io::{IsTerminal, stderr};
use std::path::{Path, PathBuf};

use pyraflow::media::{Frame, write_png};
use pyraflow::pipeline::{LatentRgb, LatentRgbFit, Pipeline};
use pyraflow::sampler::{Latent, LatentScaling};
use pyraflow::{Error, Result};

/// Columns of a picture in a terminal.
const COLUMNS: u32 = 48;

/// Where previews go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// PNG files in a folder.
    Folder(PathBuf),
    /// Blocks of colour on the terminal.
    Terminal,
}

impl Place {
    /// As typed: `terminal`, or a folder.
    pub fn parse(text: &Path) -> Result<Place> {
        if text != Path::new("terminal") {
            return Ok(Place::Folder(text.into()));
        }
        if stderr().is_terminal() {
            return Ok(Place::Terminal);
        }
        Err(Error::usage("there is no terminal to show previews on")
            .hint("name a folder for them: --preview DIR"))
    }
}

/// Shows stages as pictures of their latents and units by their last frame.
pub struct Preview {
    place: Place,
    scaling: LatentScaling,
    map: Option<LatentRgb>,
    /// Collects decoded units until the map of an unknown VAE can be told.
    fit: Option<LatentRgbFit>,
    /// Lines of the picture that is on the terminal.
    shown: usize,
}

impl Preview {
    /// Prepares the place. Where no map from latents to colours is known, one is fitted to the
    /// units that are decoded.
    pub fn new(place: Place, pipeline: &Pipeline) -> Result<Preview> {
        if let Place::Folder(folder) = &place {
            fs::create_dir_all(folder).map_err(|e| Error::io("cannot create", folder, e))?;
        }
        let map = pipeline.latent_rgb();
        let fit = map.is_none().then(LatentRgbFit::default);
        Ok(Preview { place, scaling: pipeline.latent_scaling(), map, fit, shown: 0 })
    }

    /// Whether there is a map to show stages with.
    pub fn shows_stages(&self) -> bool {
        self.map.is_some()
    }

    /// Shows the latent of a stage, as large as the video.
    pub fn stage_finished(&mut self, unit: usize, stage: usize, latent: &Latent) -> Result<()> {
        let Some(map) = &self.map else { return Ok(()) };
        let mut latent = latent.clone();
        self.scaling.to_vae(unit, &mut latent);
        let frame = map.frame(&latent)?;
        // Stages double the size; the decoder makes 8 pixels of each position of the last.
        let frame = enlarged(&frame, 8 << (2 - stage.min(2)))?;
        self.show(&format!("unit-{unit:04}-stage-{}", stage + 1), &frame)
    }

    /// Shows the last frame of a decoded unit.
    pub fn unit_decoded(&mut self, unit: usize, latent: &Latent, frames: &[Frame]) -> Result<()> {
        if let Some(fit) = &mut self.fit {
            fit.add(latent, frames);
            self.map = fit.solve();
        }
        match frames.last() {
            Some(frame) => self.show(&format!("unit-{unit:04}"), frame),
            None => Ok(()),
        }
    }

    /// Other lines were written: the next picture stands below them.
    pub fn leave(&mut self) {
        self.shown = 0;
    }

    fn show(&mut self, name: &str, frame: &Frame) -> Result<()> {
        match &self.place {
            Place::Folder(folder) => {
                write_png(&folder.join(format!("{name}.png")), frame)?;
                write_png(&folder.join("latest.png"), frame)
            }
            Place::Terminal => {
                let picture = blocks(frame, COLUMNS);
                let up = match self.shown {
                    0 => String::new(),
                    lines => format!("\x1b[{lines}A"),
                };
                self.shown = picture.lines().count();
                super::say(format!("{up}{picture}").trim_end_matches('\n'));
                Ok(())
            }
        }
    }
}

/// Every pixel as a square of `factor` × `factor`.
fn enlarged(frame: &Frame, factor: u32) -> Result<Frame> {
    let at = |x, y| frame.pixel(x / factor, y / factor).unwrap_or_default();
    Frame::from_fn(frame.width() * factor, frame.height() * factor, at)
}

/// The picture as half blocks in 24-bit colours, two rows of pixels a line.
fn blocks(frame: &Frame, columns: u32) -> String {
    let rows = (columns * frame.height()).div_ceil(frame.width()).next_multiple_of(2);
    let at = |x: u32, y: u32| {
        let (x, y) = (x * frame.width() / columns, y * frame.height() / rows);
        frame.pixel(x, y).unwrap_or_default()
    };
    let mut text = String::new();
    for y in (0..rows).step_by(2) {
        for x in 0..columns {
            let ([r, g, b], [s, h, c]) = (at(x, y), at(x, y + 1));
            text += &format!("\x1b[38;2;{r};{g};{b};48;2;{s};{h};{c}m▀");
        }
        text += "\x1b[0m\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_keep_colours_and_shape() {
        let frame = Frame::from_fn(4, 4, |x, y| [x as u8, y as u8, 7]).expect("a frame");
        let text = blocks(&frame, 4);
        assert_eq!(text.lines().count(), 2);
        assert!(text.starts_with("\x1b[38;2;0;0;7;48;2;0;1;7m▀"), "{text:?}");
        assert!(text.ends_with("\x1b[38;2;3;2;7;48;2;3;3;7m▀\x1b[0m\n"), "{text:?}");
        let wide = blocks(&Frame::from_fn(128, 64, |_, _| [0; 3]).expect("a frame"), 48);
        assert_eq!((wide.lines().count(), wide.matches('▀').count()), (12, 12 * 48));
        let large = enlarged(&frame, 8).expect("a frame");
        assert_eq!((large.width(), large.pixel(31, 15)), (32, Some([3, 1, 7])));
    }
}
