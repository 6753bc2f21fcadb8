//! What happens to latents between the stages: seeded noise, half and twice the size. All of it
//! is exact in f32, on every device.

use super::{Case, Fill, Scale};
use crate::graph::Op;
use crate::tensor::DType;

/// Purpose and stage of block noise for the last stage.
const BLOCK_KIND: u32 = 1 << 16 | 2 << 8;

fn normal_noise(name: &str, [t, h, w]: [usize; 3], block: bool, words: [u32; 4]) -> Case {
    let kind = if block { "block/" } else { "" };
    Case::new("normal_noise", format!("{kind}{name}{t}x{h}x{w}"), move |g, _| {
        let words = g.input("words", &[4], DType::U32);
        let op = Op::NormalNoise { frames: t, height: h, width: w, block };
        let y = g.push_as(op, &[words], DType::F32)?;
        g.mark_output("y", y);
        Ok(())
    })
    .fill("words", Fill::Words(words.to_vec()))
}

fn noise(shape: [usize; 3]) -> Case {
    normal_noise("", shape, false, [0x89ab_cdef, 0x0123_4567, 0, 7])
}

fn block_noise(shape: [usize; 3]) -> Case {
    normal_noise("", shape, true, [0x89ab_cdef, 0x0123_4567, BLOCK_KIND, 7])
}

fn halve(name: &str, [t, h, w]: [usize; 3], factor: f32) -> Case {
    Case::new("halve_bilinear", format!("{name}{t}x{h}x{w}-by-{factor}"), move |g, _| {
        let x = g.input("x", &[t, h, w, 16], DType::F32);
        let y = g.push(Op::HalveBilinear { factor }, &[x])?;
        g.mark_output("y", y);
        Ok(())
    })
}

fn renoise(name: &str, [t, h, w]: [usize; 3], [alpha, beta]: [f32; 2]) -> Case {
    Case::new("double_renoise", format!("{name}{t}x{h}x{w}"), move |g, _| {
        let x = g.input("x", &[t, h, w, 16], DType::F32);
        let noise = g.input("noise", &[t, 2 * h, 2 * w, 16], DType::F32);
        let y = g.push(Op::DoubleRenoise { alpha, beta }, &[x, noise])?;
        g.mark_output("y", y);
        Ok(())
    })
}

/// About those of stage 1.
const COEFFICIENTS: [f32; 2] = [0.599_880_04, 0.693_022_9];

pub(super) fn cases(scale: Scale) -> Vec<Case> {
    match scale {
        Scale::Small => vec![
            noise([2, 3, 5]),
            block_noise([2, 4, 6]),
            halve("", [2, 4, 6], 4.0),
            renoise("", [2, 3, 5], COEFFICIENTS),
        ],
        Scale::Test => test(),
        Scale::Bench => vec![
            noise([1, 96, 160]),
            block_noise([1, 96, 160]),
            halve("", [1, 96, 160], 1.0),
            renoise("", [1, 48, 80], COEFFICIENTS),
        ],
    }
}

fn test() -> Vec<Case> {
    let mut cases = Vec::new();
    for shape in [[1, 1, 1], [3, 5, 7], [2, 33, 17], [1, 24, 40]] {
        cases.push(noise(shape));
        let [t, h, w] = shape;
        cases.push(block_noise([t, 2 * h, 2 * w]));
        cases.push(halve("", [t, 2 * h, 2 * w], 1.0));
        cases.push(renoise("", shape, COEFFICIENTS));
    }
    // Millions of values, to meet the rare branches of logarithm and sine.
    cases.push(noise([13, 96, 160]));
    cases.push(block_noise([3, 96, 160]));
    let most = u32::MAX;
    // The frames are counted past the largest number.
    cases.push(normal_noise("largest/", [3, 4, 6], false, [most, most, most & !0xff, most]));
    cases.push(normal_noise("largest/", [3, 4, 6], true, [most, most, most & !0xff, most]));
    cases.push(normal_noise("zero/", [1, 4, 6], false, [0; 4]));
    cases.push(halve("", [2, 4, 6], 4.0));
    cases.push(halve("uneven/", [1, 10, 14], 0.3));
    let nan = || Fill::Normal(1.0).with_nan((6 + 5) * 16 + 3);
    cases.push(halve("nan/", [2, 4, 6], 4.0).fill("x", nan()));
    cases.push(halve("large/", [1, 4, 6], 4.0).fill("x", Fill::Normal(1e30)));
    cases.push(renoise("nan/", [2, 4, 6], COEFFICIENTS).fill("x", nan()));
    cases.push(renoise("nan-in-noise/", [2, 4, 6], COEFFICIENTS).fill("noise", nan()));
    cases.push(renoise("no-noise/", [1, 4, 6], [1.0, 0.0]));
    cases
}
