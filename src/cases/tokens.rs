//! What happens to tokens one by one: activations, embeddings, patches, positions, the
//! sampler's step.

use super::linear::{ACTIVATIONS, FRAMED, place_within};
use super::{Case, Fill, Scale};
use crate::graph::{Activation, Op};
use crate::tensor::DType;

/// Where a product and a sum in f32 may be rounded once or twice.
const FUSED: f64 = 2.4e-7;

fn activate(activation: Activation, name: &str, rows: usize, cols: usize) -> Case {
    let function = ACTIVATIONS.iter().find(|(a, _)| *a == activation).map_or("", |a| a.1);
    Case::new("activate", format!("{name}{function}/m{rows}-n{cols}"), move |g, dtype| {
        let x = g.input("x", &[rows, cols], dtype);
        let y = g.push(Op::Activate(activation), &[x])?;
        g.mark_output("y", y);
        Ok(())
    })
}

/// Two activations, the second in the place of the first's result.
fn activate_in_place(rows: usize, cols: usize) -> Case {
    Case::new("activate", format!("in-place/m{rows}-n{cols}"), move |g, dtype| {
        let x = g.input("x", &[rows, cols], dtype);
        let hidden = g.push(Op::Activate(Activation::Silu), &[x])?;
        let y = g.push(Op::Activate(Activation::GeluErf), &[hidden])?;
        g.mark_output("y", y);
        Ok(())
    })
}

fn gated_gelu(name: &str, rows: usize, cols: usize) -> Case {
    Case::new("gated_gelu", format!("{name}m{rows}-n{cols}"), move |g, dtype| {
        let x = g.input("x", &[rows, 2 * cols], dtype);
        let y = g.push(Op::GatedGelu, &[x])?;
        g.mark_output("y", y);
        Ok(())
    })
}

fn embedding(tokens: usize, vocabulary: usize, cols: usize, positions: Option<usize>) -> Case {
    let with = if positions.is_some() { "positions/" } else { "" };
    Case::new("embedding", format!("{with}m{tokens}-v{vocabulary}-n{cols}"), move |g, dtype| {
        let ids = g.input("ids", &[tokens], DType::U32);
        let table = g.weight("table", &[vocabulary, cols]);
        let positions = positions.map(|most| g.weight("positions", &[most, cols]));
        let y = g.push_as(Op::Embedding { table, positions }, &[ids], dtype)?;
        g.mark_output("y", y);
        Ok(())
    })
    .fill("ids", Fill::Ids(vocabulary as u32))
    .fill("table", Fill::Normal(1.0))
    .fill("positions", Fill::Normal(1.0))
}

fn timestep_embedding(name: &str, timesteps: &[f32]) -> Case {
    let rows = timesteps.len();
    Case::new("timestep_embedding", format!("{name}m{rows}"), move |g, dtype| {
        let t = g.input("timesteps", &[rows], DType::F32);
        let y = g.push_as(Op::TimestepEmbedding, &[t], dtype)?;
        g.mark_output("y", y);
        Ok(())
    })
    .fill("timesteps", Fill::Values(timesteps.to_vec()))
}

fn patchify(name: &str, channels_first: bool, shape: [usize; 4]) -> Case {
    let [t, h, w, c] = shape;
    let order = if channels_first { "channels-first" } else { "channels-last" };
    Case::new("patchify", format!("{name}{order}/{t}x{h}x{w}x{c}"), move |g, dtype| {
        let x = g.input("x", &shape, DType::F32);
        let y = g.push_as(Op::Patchify { channels_first }, &[x], dtype)?;
        g.mark_output("y", y);
        Ok(())
    })
}

fn unpatchify(name: &str, shape: [usize; 4]) -> Case {
    let [t, h, w, c] = shape;
    Case::new("unpatchify", format!("{name}{t}x{h}x{w}x{c}"), move |g, dtype| {
        let x = g.input("x", &[t * h * w / 4, 4 * c], dtype);
        let y = g.empty(&shape, DType::F32);
        g.mark_output("y", y);
        g.push_into(Op::Unpatchify, &[x], y)
    })
}

struct Positions {
    frames: usize,
    max_size: usize,
    stage: [usize; 2],
    grid: [usize; 2],
    cols: usize,
    table: DType,
}

impl Positions {
    fn case(self, name: &str) -> Case {
        let Positions { frames, max_size, stage, grid, cols, table } = self;
        let tokens = frames * grid[0] * grid[1];
        let [stage_name, grid_name] = [stage, grid].map(|[h, w]| format!("{h}x{w}"));
        let name = format!("{name}{stage_name}-to-{frames}x{grid_name}-n{cols}-{table}");
        Case::new("add_position_table", name, move |g, dtype| {
            let x = place_within(g, "x", [tokens, cols], dtype);
            g.mark_output("y", x);
            let table = g.weight("table", &[1, max_size * max_size, cols]);
            g.push_into(Op::AddPositionTable { table, max_size, stage, grid }, &[x], x)
        })
        .outputs(&FRAMED)
        .fill_as("table", Fill::Uniform(-1.0, 1.0), table)
    }
}

fn positions(frames: usize, max_size: usize, stage: [usize; 2], grid: [usize; 2]) -> Positions {
    Positions { frames, max_size, stage, grid, cols: 64, table: DType::F32 }
}

fn guided_euler(name: &str, samples: usize, shape: [usize; 3], scalars: [f32; 2]) -> Case {
    let [h, w, c] = shape;
    Case::new("guided_euler", format!("{name}{samples}x{h}x{w}x{c}"), move |g, _| {
        let velocity = g.input("velocity", &[samples, h, w, c], DType::F32);
        let scalars = g.input("scalars", &[2], DType::F32);
        let x = g.input("x", &[1, h, w, c], DType::F32);
        g.mark_output("y", x);
        g.push_into(Op::GuidedEuler, &[velocity, scalars], x)
    })
    .fill("scalars", Fill::Values(scalars.to_vec()))
    .floor(FUSED)
}

pub(super) fn cases(scale: Scale) -> Vec<Case> {
    match scale {
        Scale::Small => small(),
        Scale::Test => test(),
        Scale::Bench => bench(),
    }
}

fn small() -> Vec<Case> {
    let mut cases: Vec<Case> = ACTIVATIONS.map(|(a, _)| activate(a, "", 3, 40)).into();
    cases.push(activate_in_place(3, 8));
    cases.push(gated_gelu("", 3, 24));
    cases.push(embedding(5, 11, 24, None));
    cases.push(embedding(5, 11, 24, Some(7)));
    cases.push(timestep_embedding("", &[0.0, 1000.0, 3.5]));
    cases.extend([true, false].map(|first| patchify("", first, [2, 4, 6, 16])));
    cases.push(unpatchify("", [2, 4, 6, 16]));
    cases.push(positions(2, 16, [4, 6], [4, 6]).case(""));
    cases.push(positions(2, 16, [4, 6], [2, 3]).case(""));
    cases.extend([1, 2].map(|samples| guided_euler("", samples, [4, 6, 16], [7.0, -0.1])));
    cases
}

fn test() -> Vec<Case> {
    let mut cases = Vec::new();
    for (activation, _) in ACTIVATIONS {
        cases.extend(
            [(1, 8), (2, 24), (65, 72), (240, 1536)].map(|(m, n)| activate(activation, "", m, n)),
        );
        let structured = |name: &str, fill| activate(activation, name, 33, 72).fill("x", fill);
        cases.push(structured("wide/", Fill::Uniform(-100.0, 100.0)));
        cases.push(structured("negative/", Fill::Uniform(-6.0, -2.0)));
        cases.push(structured("small/", Fill::Normal(1e-3)));
        cases.push(structured("zeros/", Fill::Constant(0.0)));
        cases.push(structured("nan/", Fill::Normal(1.0).with_nan(33 * 72 - 1)));
    }
    cases.extend([(3, 8), (65, 72)].map(|(m, n)| activate_in_place(m, n)));
    cases.extend([(1, 8), (17, 24), (65, 136), (128, 1024)].map(|(m, n)| gated_gelu("", m, n)));
    cases.push(gated_gelu("wide/", 33, 72).fill("x", Fill::Uniform(-30.0, 30.0)));
    cases.push(gated_gelu("nan/", 33, 72).fill("x", Fill::Normal(1.0).with_nan(5 * 144 + 72)));
    for tokens in [1, 2, 77, 128] {
        cases.push(embedding(tokens, 1000, 72, None));
        cases.push(embedding(tokens, 1000, 72, Some(128)));
    }
    cases.push(embedding(77, 500, 768, Some(77)));
    cases.push(embedding(128, 300, 4096, None));
    cases.push(timestep_embedding("", &[0.0]));
    cases.push(timestep_embedding(
        "",
        &[0.0, 1.0, 0.5, 17.25, 333.333_34, 500.0, 666.666_7, 999.0, 999.99, 1000.0],
    ));
    let steps: Vec<f32> = (0..=250).map(|i| 1000.0 - 4.0 * i as f32).collect();
    cases.push(timestep_embedding("", &steps));
    cases.push(
        timestep_embedding("nan/", &[1.0, f32::NAN, 3.0])
            .fill("timesteps", Fill::Values(vec![1.0, 2.0, 3.0]).with_nan(1)),
    );
    for first in [true, false] {
        for shape in [[1, 2, 2, 16], [1, 2, 2, 8], [2, 4, 6, 16], [3, 10, 14, 16], [1, 34, 18, 16]]
        {
            cases.push(patchify("", first, shape));
        }
        let nan = Fill::Normal(1.0).with_nan(((4 + 3) * 6 + 5) * 16 + 7);
        cases.push(patchify("nan/", first, [2, 4, 6, 16]).fill("x", nan));
    }
    for shape in [[1, 2, 2, 16], [1, 2, 2, 8], [2, 4, 6, 16], [1, 10, 14, 16], [2, 34, 18, 16]] {
        cases.push(unpatchify("", shape));
    }
    cases
        .push(unpatchify("nan/", [2, 4, 6, 16]).fill("x", Fill::Normal(1.0).with_nan(5 * 64 + 63)));
    cases.extend(position_tables());
    for samples in [1, 2] {
        for shape in [[2, 2, 16], [10, 14, 16], [34, 18, 16]] {
            cases.push(guided_euler("", samples, shape, [7.0, -0.0371]));
        }
        cases.push(guided_euler("no-step/", samples, [4, 6, 16], [7.0, 0.0]));
        let nan = Fill::Normal(1.0).with_nan(30);
        cases.push(guided_euler("nan/", samples, [4, 6, 16], [7.0, -0.1]).fill("velocity", nan));
    }
    cases.push(guided_euler("no-guidance/", 2, [4, 6, 16], [1.0, -0.1]));
    cases
}

fn position_tables() -> Vec<Case> {
    let mut cases = Vec::new();
    for (stage, grid) in [
        ([8, 12], [8, 12]),
        ([8, 12], [4, 6]),
        ([8, 12], [2, 3]),
        ([16, 16], [16, 16]),
        ([5, 7], [5, 7]),
        ([5, 7], [2, 3]),
        ([3, 4], [1, 1]),
        ([1, 1], [1, 1]),
        // Not met in a run, but defined: larger than the stage.
        ([3, 4], [7, 9]),
    ] {
        cases.push(positions(3, 16, stage, grid).case(""));
    }
    let other = |cols, table| Positions { cols, table, ..positions(2, 24, [9, 6], [4, 3]) };
    cases.push(other(72, DType::F32).case(""));
    cases.push(other(72, DType::Bf16).case(""));
    cases.push(other(1536, DType::F32).case(""));
    let nan = Fill::Normal(1.0).with_nan(3 * 96 + 20);
    cases.push(positions(1, 16, [4, 6], [4, 6]).case("nan/").fill("x", nan));
    cases
}

fn bench() -> Vec<Case> {
    let full = |grid| Positions { cols: 1536, ..positions(1, 192, [48, 80], grid) };
    vec![
        activate(Activation::Silu, "", 120, 1536),
        gated_gelu("", 128, 10240),
        embedding(128, 32128, 4096, None),
        embedding(77, 49408, 1280, Some(77)),
        timestep_embedding("", &[500.0; 120]),
        patchify("", true, [1, 96, 160, 16]),
        patchify("", false, [13, 24, 40, 16]),
        unpatchify("", [2, 96, 160, 16]),
        full([48, 80]).case(""),
        full([24, 40]).case(""),
        guided_euler("", 2, [96, 160, 16], [7.0, -0.05]),
    ]
}
