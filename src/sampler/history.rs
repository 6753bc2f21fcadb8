//! The history pyramid: which finished frames a stage sees, and at which size.
//!
//! A new frame needs its predecessor in detail and the older ones only roughly, so the
//! frame before is shown at the current stage's size, the one before that at the next
//! smaller size, and so on; all frames too old for a size of their own share the smallest.

use std::ops::Range;

use super::latent::{Latent, LatentShape};
use super::schedule::STAGES;

/// A run of finished frames shown at one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clip {
    /// The pyramid level: 0 a quarter of the full latent size, 1 a half, 2 the whole.
    pub level: usize,
    /// The frames, by unit number.
    pub frames: Range<usize>,
}

/// The clips that stage `stage` of unit `unit` sees, oldest first; together they cover
/// frames `0..unit`, each once.
pub fn clips(unit: usize, stage: usize) -> Vec<Clip> {
    let mut newest_first = Vec::with_capacity(STAGES);
    let mut level = stage;
    let mut end = unit;
    while end > 0 {
        // The newest clip is one frame at any level; after it, level 0 takes all the rest.
        let single = end == unit || level > 0;
        let start = if single { end - 1 } else { 0 };
        newest_first.push(Clip { level, frames: start..end });
        end = start;
        level = level.saturating_sub(1);
    }
    newest_first.reverse();
    newest_first
}

/// The size of pyramid level `level` below the full latent size `full`.
pub fn level_shape(full: LatentShape, level: usize) -> LatentShape {
    let shift = STAGES - 1 - level;
    LatentShape { height: full.height >> shift, width: full.width >> shift, ..full }
}

/// The finished frames of a run, each at every level of the pyramid.
#[derive(Debug)]
pub struct History {
    frames: Vec<[Latent; STAGES]>,
    round: bool,
}

impl History {
    /// An empty history; `round` rounds the reduced frames to bf16 (the full ones are kept as
    /// they come).
    pub fn new(round: bool) -> Self {
        History { frames: Vec::new(), round }
    }

    /// Number of finished frames, which is also the next unit.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether no frame is finished.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Adds a finished frame at full size.
    ///
    /// # Panics
    /// If it cannot be halved twice.
    pub fn push(&mut self, frame: Latent) {
        let halve = |latent: &Latent| {
            let mut half = latent.halved();
            if self.round {
                half.round_to_bf16();
            }
            half
        };
        let half = halve(&frame);
        self.frames.push([halve(&half), half, frame]);
    }

    /// The clips that stage `stage` of the next unit sees, oldest first.
    pub fn clips(&self, stage: usize) -> Vec<Latent> {
        let assemble = |clip: Clip| {
            Latent::concat(self.frames[clip.frames].iter().map(|levels| &levels[clip.level]))
        };
        clips(self.len(), stage).into_iter().map(assemble).collect()
    }

    /// The finished frames at full size.
    pub fn into_frames(self) -> Vec<Latent> {
        self.frames.into_iter().map(|[_, _, full]| full).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The specification's wording, word for word: "newest first: clean_i[last 1], j = i; then
    /// while fewer than u frames are covered: j <- max(j-1, 0); if j > 0 add clean_j[the next
    /// older frame], if j = 0 add all remaining older frames of clean_0 as one clip and end."
    fn transcription(u: usize, i: usize) -> Vec<Clip> {
        if u == 0 {
            return Vec::new();
        }
        let mut list = vec![Clip { level: i, frames: u - 1..u }];
        let mut covered = 1;
        let mut j = i;
        while covered < u {
            j = if j == 0 { 0 } else { j - 1 };
            if j > 0 {
                list.push(Clip { level: j, frames: u - covered - 1..u - covered });
                covered += 1;
            } else {
                list.push(Clip { level: 0, frames: 0..u - covered });
                break;
            }
        }
        list.reverse();
        list
    }

    #[test]
    fn clips_are_as_specified() {
        for unit in 0..=31 {
            for stage in 0..STAGES {
                let clips = clips(unit, stage);
                assert_eq!(clips, transcription(unit, stage), "unit {unit}, stage {stage}");
                let frames: Vec<usize> = clips.iter().flat_map(|c| c.frames.clone()).collect();
                assert_eq!(frames, (0..unit).collect::<Vec<_>>());
            }
        }
    }

    /// The examples spelt out for u >= 3.
    #[test]
    fn clips_of_later_units() {
        let clip = |level, frames| Clip { level, frames };
        for u in 3..40 {
            assert_eq!(clips(u, 0), [clip(0, 0..u - 1), clip(0, u - 1..u)]);
            assert_eq!(clips(u, 1), [clip(0, 0..u - 1), clip(1, u - 1..u)]);
            let full = [clip(0, 0..u - 2), clip(1, u - 2..u - 1), clip(2, u - 1..u)];
            assert_eq!(clips(u, 2), full);
        }
        assert_eq!(clips(2, 2), [clip(1, 0..1), clip(2, 1..2)]);
        assert_eq!(clips(1, 2), [clip(2, 0..1)]);
    }

    #[test]
    fn assembled_clips_hold_the_resized_frames() {
        let full = LatentShape::frame(8, 16);
        let frame = |unit: usize| {
            let values = (0..full.len()).map(|i| (i * 31 % 97 + unit * 1000) as f32 * 1.01);
            Latent::new(full, values.collect()).unwrap()
        };
        let mut history = History::new(false);
        (0..4).for_each(|unit| history.push(frame(unit)));
        let clips = history.clips(2);
        assert_eq!(clips.len(), 3);
        let oldest = [0, 1].map(|unit| frame(unit).halved().halved());
        assert_eq!(clips[0], Latent::concat(&oldest));
        assert_eq!(clips[1], frame(2).halved());
        assert_eq!(clips[2], frame(3));
        assert_eq!(clips[0].shape(), LatentShape { frames: 2, ..level_shape(full, 0) });
        assert_eq!(history.into_frames(), (0..4).map(frame).collect::<Vec<_>>());
    }

    #[test]
    fn reduced_frames_are_rounded_on_request() {
        let full = LatentShape::frame(4, 4);
        let values = (0..full.len()).map(|i| 1.0 + i as f32 / 1000.0);
        let frame = Latent::new(full, values.collect()).unwrap();
        let mut history = History::new(true);
        history.push(frame.clone());
        let mut half = frame.halved();
        half.round_to_bf16();
        assert_ne!(half, frame.halved());
        assert_eq!(history.clips(1), [half]);
        assert_eq!(history.clips(2), [frame]);
    }
}
