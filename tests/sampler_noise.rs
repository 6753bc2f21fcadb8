//! Is the seeded noise what it claims to be? Statistics of fixed seeds. Every bound is five
//! standard deviations of the statistic under the claim (one in two million), unless said.

use pyraflow::sampler::{CHANNELS, Latent, LatentShape, NoiseSource, PhiloxNoise};

const SHAPE: LatentShape = LatentShape { frames: 1, height: 96, width: 160 };
const SEEDS: [u64; 4] = [0, 1, 42, u64::MAX];
const SIGMAS: f64 = 5.0;

fn initial(seed: u64, frame: usize) -> Vec<f64> {
    wide(&PhiloxNoise { seed }.initial(frame, SHAPE).unwrap().into_latent())
}

fn block(seed: u64, unit: usize, stage: usize) -> Vec<f64> {
    wide(&PhiloxNoise { seed }.block(unit, stage, SHAPE).unwrap().into_latent())
}

fn wide(latent: &Latent) -> Vec<f64> {
    latent.data().iter().map(|&x| f64::from(x)).collect()
}

fn mean_of(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}

/// Asserts that the mean of a statistic over `n` samples is `expected`, given the variance of
/// one sample.
fn assert_mean(what: &str, mean: f64, expected: f64, variance: f64, n: usize) {
    let bound = SIGMAS * (variance / n as f64).sqrt();
    assert!((mean - expected).abs() < bound, "{what}: {mean}, not {expected} ± {bound}");
}

#[test]
fn moments_are_those_of_the_standard_normal() {
    for seed in SEEDS {
        let z = initial(seed, 3);
        // E z^k, and the variance of z^k, which is E z^2k - (E z^k)².
        for (k, expected, variance) in
            [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]
        {
            let mean = mean_of(z.iter().map(|z| z.powi(k)));
            assert_mean(&format!("seed {seed}, power {k}"), mean, expected, variance, z.len());
        }
    }
}

/// Kolmogorov-Smirnov: the largest distance of the empirical distribution from the normal one,
/// times √n, exceeds 2.47 once in 10⁵ times.
#[test]
fn the_distribution_is_normal() {
    for seed in SEEDS {
        let mut z = initial(seed, 0);
        z.sort_by(f64::total_cmp);
        let n = z.len() as f64;
        let distance = z.iter().enumerate().fold(0f64, |largest, (i, &z)| {
            let normal = 0.5 * libm::erfc(-z / 2f64.sqrt());
            largest.max((normal - i as f64 / n).abs()).max((normal - (i + 1) as f64 / n).abs())
        });
        assert!(distance * n.sqrt() < 2.47, "seed {seed}: {}", distance * n.sqrt());
        // The tails are there: of 245,760 normals about 15 lie beyond ±4, none beyond ±6.77.
        let far = z.iter().filter(|z| z.abs() > 4.0).count();
        assert!((1..40).contains(&far), "seed {seed}: {far} beyond 4");
    }
}

/// Products of independent standard normals have mean 0 and variance 1.
fn assert_uncorrelated(what: &str, a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    let mean = mean_of(a.iter().zip(b).map(|(a, b)| a * b));
    assert_mean(what, mean, 0.0, 1.0, a.len());
    // So are their squares: mean 1, variance E a⁴·E b⁴ - 1 = 8.
    let mean = mean_of(a.iter().zip(b).map(|(a, b)| a * a * b * b));
    assert_mean(&format!("{what}, squared"), mean, 1.0, 8.0, a.len());
}

#[test]
fn neighbours_are_independent() {
    let z = initial(7, 0);
    let row = SHAPE.width * CHANNELS;
    for (what, lag) in
        [("channels", 1), ("pairs", 2), ("quads", 4), ("columns", CHANNELS), ("rows", row)]
    {
        assert_uncorrelated(what, &z[lag..], &z[..z.len() - lag]);
    }
}

#[test]
fn seeds_frames_and_purposes_are_independent() {
    let z = initial(7, 0);
    let other_purpose = PhiloxNoise { seed: 7 }.posterior(SHAPE).unwrap();
    for (what, other) in [
        ("next seed", initial(8, 0)),
        ("seed in the upper word", initial(7 << 32, 0)),
        ("next frame", initial(7, 1)),
        ("posterior", wide(&other_purpose)),
    ] {
        assert_uncorrelated(what, &z, &other);
    }
    // Block noise is correlated within itself, but not with anything else. The products of a
    // block sum to one with variance 4·(1 + 3/9) (both of the pair being block noise) or 4.
    let n = block(7, 0, 1);
    let pairs = SHAPE.len() as f64;
    for (what, other, variance) in [
        ("next unit", block(7, 1, 1), 4.0 / 3.0),
        ("next stage", block(7, 0, 2), 4.0 / 3.0),
        ("initial noise", z, 1.0),
    ] {
        let mean = n.iter().zip(&other).map(|(a, b)| a * b).sum::<f64>() / pairs;
        assert_mean(what, mean, 0.0, variance, SHAPE.len());
    }
}

/// Within a block: variance 1, covariance -1/3, sum 0. Between blocks: nothing.
#[test]
fn block_noise_has_the_specified_covariance() {
    for (seed, unit, stage) in [(0, 0, 1), (3, 5, 2), (u64::MAX, 30, 1)] {
        let n = block(seed, unit, stage);
        let at = |y: usize, x: usize, c: usize| n[(y * SHAPE.width + x) * CHANNELS + c];
        let blocks: Vec<[f64; 8]> = (0..SHAPE.len() / 8)
            .map(|i| {
                let (c, x) = (i % CHANNELS, i / CHANNELS % (SHAPE.width / 4) * 4);
                let y = i / CHANNELS / (SHAPE.width / 4) * 2;
                // A block and the one to its right.
                std::array::from_fn(|k| at(y + k / 2 % 2, x + k % 2 + k / 4 * 2, c))
            })
            .collect();
        for block in &blocks {
            assert!(block[..4].iter().sum::<f64>().abs() < 2e-6, "{block:?}");
        }
        for i in 0..8 {
            for j in i..8 {
                let mean = mean_of(blocks.iter().map(|block| block[i] * block[j]));
                let expected = match (i == j, i / 4 == j / 4) {
                    (true, _) => 1.0,
                    (false, true) => -1.0 / 3.0,
                    (false, false) => 0.0,
                };
                // Of normals with unit variances, the product varies by 1 + covariance².
                let variance = 1.0 + expected * expected;
                assert_mean(&format!("covariance {i}{j}"), mean, expected, variance, blocks.len());
            }
        }
    }
}

/// Doubling a stage's result and adding block noise must leave white noise: the property that
/// the coefficients and the covariance exist for.
#[test]
fn renoised_noise_is_white() {
    let half = LatentShape { frames: 1, height: SHAPE.height / 2, width: SHAPE.width / 2 };
    let span = pyraflow::sampler::stage_spans();
    let (alpha, beta) = span[1].renoise();
    let mut x = PhiloxNoise { seed: 21 }.initial(0, half).unwrap().into_latent();
    x.scale(span[0].end as f32);
    let mut x = x.doubled();
    let noise = PhiloxNoise { seed: 21 }.block(0, 1, SHAPE).unwrap().into_latent();
    x.renoise(&noise, alpha as f32, beta as f32);
    x.scale(1.0 / span[1].start as f32);
    let z = wide(&x);
    for (what, lag) in [("columns", CHANNELS), ("rows", SHAPE.width * CHANNELS)] {
        assert_uncorrelated(what, &z[lag..], &z[..z.len() - lag]);
    }
    assert_mean("variance", mean_of(z.iter().map(|z| z * z)), 1.0, 2.0, z.len());
}
