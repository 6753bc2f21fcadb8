//! Names the object's colour by hue, saturation and brightness.

use super::{median, scene::Object, words};

words! {
    /// A colour word.
    Colour {
        Red = "red", Orange = "orange", Yellow = "yellow", Green = "green",
        Cyan = "cyan", Blue = "blue", Purple = "purple", White = "white",
    }
}

/// Where the hue of one colour ends and that of the next begins, in degrees.
const HUES: [(f32, Colour); 7] = [
    (15.0, Colour::Red),
    (44.0, Colour::Orange),
    (72.0, Colour::Yellow),
    (160.0, Colour::Green),
    (205.0, Colour::Cyan),
    (252.0, Colour::Blue),
    (330.0, Colour::Purple),
];
/// Below this saturation a colour has no hue to speak of: it is white, or grey.
const LEAST_SATURATION: f32 = 0.25;
/// Below this brightness an unsaturated colour is grey, not white.
const LEAST_WHITE: f32 = 150.0;

/// The colour of an object over a clip.
pub struct Reading {
    /// What most frames say; `None` where that is grey.
    pub colour: Option<Colour>,
    /// The median colour, 0 to 255.
    pub rgb: [f32; 3],
    /// The share of frames that say so.
    pub agreement: f32,
}

/// Reads the colour that the object has in most frames.
pub fn read(objects: &[Object]) -> Reading {
    let names: Vec<_> = objects.iter().map(|o| name(o.rgb)).collect();
    let votes = |colour| names.iter().filter(|n| **n == colour).count();
    let candidates = std::iter::once(None).chain(Colour::ALL.iter().copied().map(Some));
    let colour = candidates.max_by_key(|c| votes(*c)).flatten();
    Reading {
        colour,
        rgb: [0, 1, 2].map(|c| median(objects.iter().map(|o| o.rgb[c]).collect())),
        agreement: votes(colour) as f32 / names.len().max(1) as f32,
    }
}

/// The word for one colour; `None` for grey and black.
fn name([r, g, b]: [f32; 3]) -> Option<Colour> {
    let brightest = r.max(g).max(b);
    let range = brightest - r.min(g).min(b);
    if range <= LEAST_SATURATION * brightest {
        return (brightest >= LEAST_WHITE).then_some(Colour::White);
    }
    let sixth = if brightest == r {
        ((g - b) / range).rem_euclid(6.0)
    } else if brightest == g {
        (b - r) / range + 2.0
    } else {
        (r - g) / range + 4.0
    };
    let hue = 60.0 * sixth;
    Some(HUES.iter().find(|(end, _)| hue < *end).map_or(Colour::Red, |(_, colour)| *colour))
}
