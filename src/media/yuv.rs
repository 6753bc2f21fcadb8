//! RGB to BT.709 Y'CbCr, 8 bits, limited range, 4:2:0: what video files hold.
//!
//! Rec. ITU-R BT.709-6, item 3: `Y' = 0.2126 R' + 0.7152 G' + 0.0722 B'`,
//! `Cb = (B' − Y') / 1.8556`, `Cr = (R' − Y') / 1.5748`; quantised to
//! `16 + 219 Y'` and `128 + 224 C`. A chroma sample stands for the mean of its 2×2 pixels.

use super::Frame;

/// Fractional bits of the integer weights below.
const SHIFT: u32 = 16;

/// Weights of R, G and B (0..=255) in a quantised component, in units of 2⁻¹⁶.
struct Weights([i32; 3]);

impl Weights {
    const fn new(scale: f64, weights: [f64; 3]) -> Self {
        let unit = scale / 255.0 * (1u32 << SHIFT) as f64;
        // Casts truncate, hence the half; its sign follows the weight's.
        const fn round(x: f64) -> i32 {
            (if x < 0.0 { x - 0.5 } else { x + 0.5 }) as i32
        }
        Weights([round(weights[0] * unit), round(weights[1] * unit), round(weights[2] * unit)])
    }

    fn sum(&self, rgb: [i32; 3]) -> i32 {
        self.0[0] * rgb[0] + self.0[1] * rgb[1] + self.0[2] * rgb[2]
    }
}

const KR: f64 = 0.2126;
const KG: f64 = 0.7152;
const KB: f64 = 0.0722;
const Y: Weights = Weights::new(219.0, [KR, KG, KB]);
const CB: Weights = Weights::new(224.0 / 1.8556, [-KR, -KG, 1.0 - KB]);
const CR: Weights = Weights::new(224.0 / 1.5748, [1.0 - KR, -KG, -KB]);

/// A picture as three planes: Y' (`w·h`), Cb and Cr (`w/2 · h/2` each), one after another.
pub(super) struct Yuv420 {
    width: usize,
    height: usize,
    data: Vec<u8>,
}

impl Yuv420 {
    /// Room for a picture of even `width` and `height`.
    pub(super) fn new(width: u32, height: u32) -> Self {
        let (width, height) = (width as usize, height as usize);
        debug_assert!(width % 2 == 0 && height % 2 == 0, "4:2:0 needs even sides");
        Yuv420 { width, height, data: vec![0; width * height * 3 / 2] }
    }

    /// All planes in file order (I420).
    pub(super) fn data(&self) -> &[u8] {
        &self.data
    }

    /// The planes Y', Cb, Cr.
    pub(super) fn planes(&self) -> (&[u8], &[u8], &[u8]) {
        let luma = self.width * self.height;
        let (y, chroma) = self.data.split_at(luma);
        let (cb, cr) = chroma.split_at(luma / 4);
        (y, cb, cr)
    }

    /// Width and height in pixels.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.width, self.height)
    }

    /// Replaces the picture by `frame`, which must be of the same size.
    pub(super) fn fill(&mut self, frame: &Frame) {
        let (width, luma) = (self.width, self.width * self.height);
        let (y, chroma) = self.data.split_at_mut(luma);
        let (cb, cr) = chroma.split_at_mut(luma / 4);
        let two_rows = frame.data().chunks_exact(width * 6);
        let chroma_rows = cb.chunks_exact_mut(width / 2).zip(cr.chunks_exact_mut(width / 2));
        for ((rgb, y), (cb, cr)) in two_rows.zip(y.chunks_exact_mut(width * 2)).zip(chroma_rows) {
            let (upper, lower) = rgb.split_at(width * 3);
            for (rgb, y) in rgb.as_chunks::<3>().0.iter().zip(y) {
                *y = luma_of(rgb.map(i32::from));
            }
            let pairs = upper.as_chunks::<6>().0.iter().zip(lower.as_chunks::<6>().0);
            for ((upper, lower), (cb, cr)) in pairs.zip(cb.iter_mut().zip(cr)) {
                let sum = [0, 1, 2].map(|c| {
                    i32::from(upper[c])
                        + i32::from(upper[c + 3])
                        + i32::from(lower[c])
                        + i32::from(lower[c + 3])
                });
                (*cb, *cr) = (chroma_of(&CB, sum), chroma_of(&CR, sum));
            }
        }
    }
}

fn luma_of(rgb: [i32; 3]) -> u8 {
    ((Y.sum(rgb) + (16 << SHIFT) + (1 << (SHIFT - 1))) >> SHIFT) as u8
}

/// `sum` is that of four pixels, so the mean costs two more bits of shift.
fn chroma_of(weights: &Weights, sum: [i32; 3]) -> u8 {
    const BITS: u32 = SHIFT + 2;
    ((weights.sum(sum) + (128 << BITS) + (1 << (BITS - 1))) >> BITS) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The formula of the standard in f64, one uniform picture.
    fn reference(rgb: [u8; 3]) -> [f64; 3] {
        let [r, g, b] = rgb.map(|c| f64::from(c) / 255.0);
        let y = KR * r + KG * g + KB * b;
        [16.0 + 219.0 * y, 128.0 + 224.0 * (b - y) / 1.8556, 128.0 + 224.0 * (r - y) / 1.5748]
    }

    #[test]
    fn every_sample_is_the_standards_value_rounded() {
        let levels: Vec<u8> = (0..=255).step_by(3).collect();
        let mut planes = Yuv420::new(2, 2);
        for &r in &levels {
            for &g in &levels {
                for &b in &levels {
                    planes.fill(&Frame::new(2, 2, [r, g, b].repeat(4)).unwrap());
                    let (y, cb, cr) = planes.planes();
                    for (got, want) in [y[0], cb[0], cr[0]].into_iter().zip(reference([r, g, b])) {
                        // Half a step of rounding, and the weights' own rounding.
                        assert!((f64::from(got) - want).abs() < 0.51, "{r} {g} {b}: {got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn black_white_and_grey_are_exact() {
        let mut planes = Yuv420::new(2, 2);
        for (grey, luma) in [(0, 16), (255, 235), (128, 126)] {
            planes.fill(&Frame::new(2, 2, vec![grey; 12]).unwrap());
            assert_eq!(planes.data(), [luma, luma, luma, luma, 128, 128]);
        }
    }

    #[test]
    fn chroma_is_the_mean_of_its_four_pixels_and_rows_stay_in_place() {
        let colours: [[u8; 3]; 4] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]];
        let frame =
            Frame::from_fn(4, 2, |x, y| if x < 2 { colours[(y * 2 + x) as usize] } else { [0; 3] });
        let mut planes = Yuv420::new(4, 2);
        planes.fill(&frame.unwrap());
        let (y, cb, cr) = planes.planes();
        let mean: Vec<f64> =
            (1..3).map(|c| colours.iter().map(|p| reference(*p)[c]).sum::<f64>() / 4.0).collect();
        assert_eq!([cb[0], cr[0]], [mean[0].round() as u8, mean[1].round() as u8]);
        assert_eq!([cb[1], cr[1]], [128, 128]);
        let lumas = colours.map(|p| reference(p)[0].round() as u8);
        assert_eq!(y, [lumas[0], lumas[1], 16, 16, lumas[2], lumas[3], 16, 16]);
    }
}
