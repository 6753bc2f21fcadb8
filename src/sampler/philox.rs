//! Philox 4x32-10, the counter-based random generator of Salmon, Moraes, Dror and Shaw
//! ("Parallel random numbers: as easy as 1, 2, 3", SC 2011), and normals made from it.
//!
//! A counter-based generator has no state: every value is a pure function of a key and a
//! counter. When the counter is the value's own coordinates, the order of evaluation, the
//! number of threads and the size of the tensor cannot change a bit of it.

use std::f64::consts::TAU;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Four random words for `counter` under `key`.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    for _ in 0..ROUNDS {
        let (high0, low0) = wide_product(MULTIPLIERS[0], c[0]);
        let (high1, low1) = wide_product(MULTIPLIERS[1], c[2]);
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0];
        k[0] = k[0].wrapping_add(WEYL[0]);
        k[1] = k[1].wrapping_add(WEYL[1]);
    }
    c
}

/// The upper and lower word of `a * b`.
fn wide_product(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    ((product >> 32) as u32, product as u32)
}

/// Four independent standard normals for `counter` under `key`.
pub fn normals(counter: [u32; 4], key: [u32; 2]) -> [f32; 4] {
    let [a, b, c, d] = philox4x32(counter, key);
    let [[z0, z1], [z2, z3]] = [box_muller(a, b), box_muller(c, d)];
    [z0, z1, z2, z3]
}

/// Two standard normals from two uniform words (Box-Muller transform).
///
/// The logarithm, sine and cosine are those of the pure-Rust `libm`, built from IEEE additions
/// and multiplications only: unlike the system's, they give the same bits everywhere. The
/// maths is in f64, and one rounding to f32 ends it.
fn box_muller(a: u32, b: u32) -> [f32; 2] {
    const UNIT: f64 = 1.0 / 4_294_967_296.0;
    // Half a unit up, so that the logarithm never sees 0; normals reach ±6.76.
    let radius = (-2.0 * libm::log((f64::from(a) + 0.5) * UNIT)).sqrt();
    let (sin, cos) = libm::sincos(TAU * (f64::from(b) * UNIT));
    [(radius * cos) as f32, (radius * sin) as f32]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors' Random123 library is distributed with.
    #[test]
    fn known_answers() {
        let zeros = philox4x32([0; 4], [0; 2]);
        assert_eq!(zeros, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = philox4x32([u32::MAX; 4], [u32::MAX; 2]);
        assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = philox4x32(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
        );
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn extreme_words_give_finite_normals() {
        let largest = box_muller(0, 0)[0];
        assert!((largest - 6.763_705_6).abs() < 1e-6, "{largest}");
        let smallest = box_muller(u32::MAX, u32::MAX);
        assert!(smallest.iter().all(|z| z.abs() < 2e-5), "{smallest:?}");
    }
}
