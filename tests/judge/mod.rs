//! Says what a short clip shows: the colour, the shape and the motion of its one object.
//!
//! This is how the built-in demo model is scored. It is made of plain image measures and
//! knows nothing of the generator of the training clips or of the model:
//!
//! 1. [`scene`]: two colours explain a clip, background and object; each pixel's place
//!    between them is a soft mask, its largest connected piece the object.
//! 2. [`colour`]: hue and saturation of the middle of the object.
//! 3. [`outline`]: the distance from centre to edge in all directions, compared with that
//!    of a circle, a square, a triangle and a five-pointed star in any orientation.
//! 4. [`motion`]: how far place, size and orientation carry the edge over the clip.
//!
//! Nothing here is random; the same frames always give the same verdict.

// Each program that includes this module uses a part of it.
#![allow(dead_code)]

pub mod clip;
pub mod colour;
pub mod motion;
pub mod outline;
pub mod scene;

pub use clip::Frame;
pub use colour::Colour;
pub use motion::{Motion, Travel};
pub use outline::Shape;

/// Declares an enum of the words of one attribute, with their spelling.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $(#[doc = $word] $variant),* }

        impl $name {
            /// Every word, in order of declaration.
            pub const ALL: &[$name] = &[$($name::$variant),*];

            /// The word as captions spell it.
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $word),* }
            }
        }
    };
}
use words;

/// What a clip shows. An attribute is `None` where the clip does not show it clearly: no
/// object, an outline that is none of the known shapes, nothing that moves.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    pub colour: Option<Colour>,
    pub shape: Option<Shape>,
    pub motion: Option<Motion>,
    /// What the attributes were read from; `None` where there is no object.
    pub measures: Option<Measures>,
}

/// The numbers behind a [`Verdict`].
#[derive(Debug, Clone, PartialEq)]
pub struct Measures {
    /// Share of the frames in which the object was found.
    pub seen: f32,
    /// Distance between the colours of object and background (0 to 441).
    pub contrast: f32,
    /// Mean colour of the object's middle, 0 to 255.
    pub rgb: [f32; 3],
    /// Share of the frames that agree with the colour.
    pub colour_agreement: f32,
    /// Median misfit (root mean square, in radii) for each of [`Shape::ALL`].
    pub misfits: [f32; 4],
    /// How far the edge was carried by each kind of change.
    pub travel: Travel,
}

/// An object must be seen in this share of the frames to be judged.
const SEEN_ENOUGH: f32 = 0.5;

/// Judges a clip of equally sized frames in order of time.
pub fn judge(frames: &[Frame]) -> Verdict {
    let nothing = Verdict { colour: None, shape: None, motion: None, measures: None };
    let Some(scene) = scene::Scene::read(frames) else { return nothing };
    let seen = scene.objects.len() as f32 / frames.len() as f32;
    if seen < SEEN_ENOUGH {
        return nothing;
    }
    let outlines: Vec<_> = scene.objects.iter().map(outline::Outline::trace).collect();
    let reading = colour::read(&scene.objects);
    let (shape, misfits) = outline::classify(&outlines);
    let travel = Travel::measure(&scene.objects, &outlines, shape);
    Verdict {
        colour: reading.colour,
        shape,
        motion: travel.motion(),
        measures: Some(Measures {
            seen,
            contrast: scene.contrast,
            rgb: reading.rgb,
            colour_agreement: reading.agreement,
            misfits,
            travel,
        }),
    }
}

/// The middle value (the upper one of two); 0 for an empty list.
fn median(mut values: Vec<f32>) -> f32 {
    let middle = values.len() / 2;
    if values.is_empty() { 0.0 } else { *values.select_nth_unstable_by(middle, f32::total_cmp).1 }
}
