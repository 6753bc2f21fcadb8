//! The shapes that matrix products are tried with: small ones for the sanitizers, tails and edges
//! for the tests, those of the models for the bench.

use super::{GATE_COLUMN, Kind, Linear, linear, side_by_side};
use crate::cases::{Case, Fill, Scale};
use crate::graph::Activation;

pub(in crate::cases) fn cases(scale: Scale) -> Vec<Case> {
    match scale {
        Scale::Small => small(),
        Scale::Test => test(),
        Scale::Bench => bench(),
    }
}

fn small() -> Vec<Case> {
    let mut cases: Vec<Case> = Kind::ALL.map(|kind| linear(kind, 65, &[24], 40).case()).into();
    for kind in Kind::ALL {
        cases.push(linear(kind, 3, &[8, 16, 8], 16).strided(true, true).case());
    }
    cases.push(linear(Kind::Store, 129, &[136], 72).case());
    cases.push(linear(Kind::Store, 1, &[8], 8).without_bias().case());
    cases.push(linear(Kind::Store, 2, &[72], 64).into_f32().strided(false, true).case());
    cases.push(Linear { patches: true, ..linear(Kind::Store, 6, &[24], 64) }.case());
    cases.extend(
        (1..=6).map(|runs| linear(Kind::Gated { runs }, 70, &[16], 8).without_bias().case()),
    );
    let gelu = Kind::Activate(Activation::GeluTanh);
    cases.push(
        linear(Kind::Heads { size: 64 }, 65, &[128, 128, 128], 72).strided(true, true).case(),
    );
    cases.push(linear(Kind::Heads { size: 8 }, 3, &[24], 16).case());
    cases.push(linear(Kind::Gated { runs: 2 }, 70, &[72], 4104).case());
    cases.push(side_by_side(&[
        linear(Kind::Store, 5, &[72], 40),
        linear(gelu, 70, &[24, 8], 72).strided(true, false),
        linear(Kind::Gated { runs: 2 }, 3, &[16], 8),
    ]));
    cases
}

fn test() -> Vec<Case> {
    let mut cases = tails();
    for kind in Kind::ALL {
        for (m, n, k) in [(1, 24, 72), (63, 136, 264), (240, 96, 1536), (1000, 1536, 64)] {
            cases.push(linear(kind, m, &[n], k).case());
        }
        cases.push(linear(kind, 65, &[72], 40).without_bias().case());
        for (input, output) in [(true, false), (false, true), (true, true)] {
            cases.push(linear(kind, 65, &[72], 136).strided(input, output).case());
        }
        for n in [&[64, 64][..], &[72, 136], &[64, 8, 24], &[1536, 1536, 1536]] {
            cases.push(linear(kind, 66, n, 96).case());
        }
        cases.push(
            linear(kind, 130, &[128, 64, 128], 128).strided(true, true).without_bias().case(),
        );
    }
    for runs in [1, 3, 4, 5, 6] {
        for m in [2, 63, 257, 1000] {
            cases.push(linear(Kind::Gated { runs }, m, &[72], 64).case());
        }
    }
    for (m, n, k) in [(1, 72, 64), (2, 9216, 1536), (60, 64, 256)] {
        cases.push(linear(Kind::Store, m, &[n], k).into_f32().case());
        cases.push(linear(Kind::Store, m, &[n], k).into_f32().strided(false, true).case());
    }
    for (m, n) in [(24, 128), (960, 1536)] {
        cases.push(Linear { patches: true, ..linear(Kind::Store, m, &[n], 64) }.case());
    }
    cases.push(linear(Kind::Store, 63, &[72], 6144).case());
    cases.push(linear(Kind::Accumulate, 65, &[136], 10240).without_bias().case());
    cases.extend(heads());
    cases.extend(structured());
    cases.extend(beside());
    cases
}

/// Heads of every number and place, of other sizes than the models', and in parts of unequal width.
fn heads() -> Vec<Case> {
    let heads = Kind::Heads { size: 64 };
    let mut cases = Vec::new();
    for m in [1, 63, 65, 130, 257, 1000] {
        for (n, k) in [(&[64][..], 72), (&[192, 192], 264), (&[320, 320, 320], 64)] {
            cases.push(linear(heads, m, n, k).case());
        }
        cases.push(linear(heads, m, &[1536, 1536, 1536], 136).strided(false, true).case());
    }
    cases.push(linear(heads, 2100, &[1920, 1920], 1920).without_bias().strided(true, true).case());
    cases.push(linear(heads, 66, &[64, 128, 64], 72).case());
    for size in [8, 48, 128] {
        cases.push(linear(Kind::Heads { size }, 65, &[2 * size, 2 * size], 40).case());
    }
    for (name, fill) in [
        ("zeros/", Fill::Constant(0.0)),
        ("small/", Fill::Normal(1e-3)),
        ("nan/", Fill::Normal(1.0).with_nan(9 * 72 + 5)),
    ] {
        let case = linear(heads, 20, &[128, 128, 128], 72).without_bias().named(name);
        cases.push(case.fill("x", fill));
    }
    let joint = |m| linear(heads, m, &[192, 192, 192], 136);
    cases.extend([(1, 240), (97, 130), (300, 63)].map(|(t, i)| side_by_side(&[t, i].map(joint))));
    let gelu = Kind::Activate(Activation::GeluTanh);
    cases.push(side_by_side(&[
        linear(heads, 130, &[192], 192),
        linear(heads, 257, &[192, 192], 192),
        linear(gelu, 130, &[768], 192).strided(true, false),
    ]));
    // In the tiles of few and of many rows, and of a deep product.
    cases.push(linear(heads, 140, &[192, 192, 192], 2000).case());
    cases.push(linear(heads, 97, &[192, 192, 192], 4104).case());
    let wide = |m| linear(heads, m, &[1536, 1536, 1536], 136);
    cases.push(side_by_side(&[97, 2500].map(wide)));
    // A launch of their own beside those that norm within the product.
    cases.push(side_by_side(&[
        linear(heads, 65, &[192], 192),
        linear(Kind::Heads { size: 48 }, 70, &[96, 96, 96], 192),
    ]));
    cases
}

/// Text beside image, the parts of a joined block, more than one launch takes, results of two
/// types.
fn beside() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for kind in Kind::ALL {
        for (text, image) in [(1, 240), (97, 130), (300, 63)] {
            let of = |m| linear(kind, m, &[264, 136], 136);
            cases.push(side_by_side(&[of(text), of(image).without_bias()]));
        }
    }
    let gelu = Kind::Activate(Activation::GeluTanh);
    cases.push(side_by_side(&[
        linear(Kind::Store, 130, &[192], 192),
        linear(Kind::Store, 257, &[192, 192], 192),
        linear(gelu, 130, &[768], 192).strided(true, false),
        linear(Kind::Gated { runs: 4 }, 65, &[72], 1536),
    ]));
    let patches = |m| Linear { patches: true, ..linear(Kind::Store, m, &[1536], 64) };
    cases.push(side_by_side(&[15, 15, 60, 60, 240, 240].map(patches)));
    // Few rows, which have tiles of their own; more than one round of tiles.
    for kind in Kind::ALL {
        cases.push(linear(kind, 130, &[1528], 4096).case());
        cases.push(linear(kind, 65, &[12280], 136).case());
        cases.push(linear(kind, 2100, &[1536], 1600).case());
    }
    cases.push(linear(Kind::Store, 257, &[6152], 4104).case());
    // Few rows and deep products, whose tiles two blocks share: an odd number of steps, two
    // products in a launch, as many tiles as can be.
    for kind in Kind::ALL {
        cases.push(linear(kind, 97, &[520], 4104).case());
    }
    cases.push(side_by_side(&[
        linear(Kind::Store, 1, &[520], 4168),
        linear(Kind::Gated { runs: 3 }, 128, &[136], 4104),
    ]));
    cases.push(linear(Kind::Accumulate, 128, &[4160], 4104).without_bias().case());
    cases.push(side_by_side(&[97, 2500].map(|m| linear(Kind::Gated { runs: 3 }, m, &[1536], 512))));
    cases.push(side_by_side(&[
        linear(Kind::Store, 65, &[72], 64).without_bias().into_f32(),
        linear(Kind::Store, 65, &[72], 64),
    ]));
    cases
}

/// All rows with all columns, the inner dimension taking turns; then the edges of tiles.
fn tails() -> Vec<Case> {
    const K: [usize; 8] = [8, 16, 24, 40, 64, 72, 264, 1536];
    let mut shapes = Vec::new();
    for (i, m) in [1, 2, 63, 65, 240, 1000].into_iter().enumerate() {
        for (j, n) in [8, 16, 24, 64, 72, 136, 1536].into_iter().enumerate() {
            shapes.push((m, n, K[(3 * i + j) % K.len()]));
        }
    }
    for m in [127, 128, 129, 192, 255, 256, 257] {
        shapes.extend([(m, 128, 32), (m, 248, 128), (m, 256, 192), (m, 264, 56)]);
    }
    shapes.into_iter().map(|(m, n, k)| linear(Kind::Store, m, &[n], k).case()).collect()
}

fn structured() -> Vec<Case> {
    let named = |kind, name: &str| linear(kind, 65, &[72], 72).named(&format!("{name}/"));
    let x_nan = || Fill::Normal(1.0).with_nan(7 * 72 + 71);
    vec![
        // The result is the input itself.
        linear(Kind::Store, 65, &[72], 72)
            .without_bias()
            .named("identity/")
            .fill("0.weight", Fill::Identity),
        linear(Kind::Store, 130, &[128], 64)
            .without_bias()
            .named("identity/")
            .fill("0.weight", Fill::Identity),
        named(Kind::Store, "ones")
            .fill("x", Fill::Constant(1.0))
            .fill("0.weight", Fill::Constant(1.0))
            .fill("0.bias", Fill::Constant(1.0)),
        named(Kind::Accumulate, "zeros")
            .fill("x", Fill::Constant(0.0))
            .fill("0.bias", Fill::Constant(0.0)),
        // Products of every size, most of which a sum in bf16 would lose.
        linear(Kind::Store, 65, &[72], 1536)
            .named("large-and-small/")
            .fill("x", Fill::Values(vec![256.0, 1.0, -1.5, 0.01, -256.0])),
        named(Kind::Store, "nan-in-x").fill("x", x_nan()),
        named(Kind::Activate(Activation::Silu), "nan-in-x").fill("x", x_nan()),
        named(Kind::Activate(Activation::GeluTanh), "nan-in-x").fill("x", x_nan()),
        named(Kind::Activate(Activation::GeluErf), "nan-in-x").fill("x", x_nan()),
        named(Kind::Activate(Activation::QuickGelu), "nan-in-x").fill("x", x_nan()),
        named(Kind::Gated { runs: 2 }, "nan-in-x").fill("x", x_nan()),
        named(Kind::Store, "nan-in-weight")
            .fill("0.weight", Fill::Normal(0.1).with_nan(71 * 72 + 5)),
        named(Kind::Store, "nan-in-bias").fill("0.bias", Fill::Normal(0.1).with_nan(64)),
        named(Kind::Accumulate, "nan-in-y")
            .fill("accumulator", Fill::Normal(1.0).with_nan(64 * 72)),
        named(Kind::Gated { runs: 2 }, "nan-in-y")
            .fill("accumulator", Fill::Normal(1.0).with_nan(71)),
        named(Kind::Gated { runs: 2 }, "nan-in-gate")
            .fill("modulation", Fill::Normal(1.0).with_nan(GATE_COLUMN + 3)),
    ]
}

fn bench() -> Vec<Case> {
    let mut cases = Vec::new();
    let gelu = Kind::Activate(Activation::GeluTanh);
    let gated = Kind::Gated { runs: 6 };
    let heads = Kind::Heads { size: 64 };
    for m in [480, 2000, 8000, 20000] {
        // Text beside image, in the joint blocks of sd3 and of miniflux.
        for d in [1536, 1920] {
            for (kind, n, k) in [
                (Kind::Store, vec![d, d, d], d),
                (heads, vec![d, d, d], d),
                (gated, vec![d], d),
                (gelu, vec![4 * d], d),
                (gated, vec![d], 4 * d),
            ] {
                cases.push(side_by_side(&[97, m].map(|m| linear(kind, m, &n, k))));
            }
        }
        // miniflux's single blocks: queries beside keys and values, the hidden state, and it joined
        // with what attention gives.
        for kind in [Kind::Store, heads] {
            let part = |n: &[usize]| linear(kind, m, n, 1920);
            cases.push(side_by_side(&[part(&[1920]), part(&[1920, 1920])]));
        }
        cases.push(linear(gelu, m, &[4 * 1920], 1920).strided(false, true).case());
        cases.push(linear(gated, m, &[1920], 5 * 1920).case());
    }
    // Products alone, for rates.
    for kind in [Kind::Store, heads] {
        cases.push(linear(kind, 20000, &[1536, 1536, 1536], 1536).case());
    }
    cases.push(linear(gelu, 20000, &[6144], 1536).case());
    cases.push(linear(gated, 20000, &[1536], 6144).case());
    // The T5 encoder, the modulation tables, the ends of the transformers.
    let t5 = |kind, n: &[usize], k| linear(kind, 128, n, k).without_bias().case();
    cases.push(t5(Kind::Store, &[4096, 4096, 4096], 4096));
    cases.push(t5(Kind::Store, &[10240, 10240], 4096));
    cases.push(t5(Kind::Accumulate, &[4096], 10240));
    cases.push(linear(Kind::Store, 120, &[9216], 1536).into_f32().case());
    let patches = Linear { patches: true, ..linear(Kind::Store, 3840, &[1536], 64) };
    // The text's embedding, of one prompt or of two.
    for text in [40, 97, 140, 200, 256] {
        cases.extend([1536, 1920].map(|d| linear(Kind::Store, text, &[d], 4096).case()));
    }
    cases.push(side_by_side(&[patches.clone(), patches]));
    cases.push(linear(Kind::Store, 7680, &[64], 1536).case());
    cases.push(linear(Kind::Accumulate, 30720, &[512], 512).case());
    // CLIP's activations.
    cases.push(linear(Kind::Activate(Activation::QuickGelu), 77, &[3072], 768).case());
    cases.push(linear(Kind::Activate(Activation::GeluErf), 77, &[5120], 1280).case());
    cases.push(linear(Kind::Activate(Activation::Silu), 120, &[1536], 256).case());
    cases
}
