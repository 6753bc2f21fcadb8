//! Norms of rows and of heads.

use super::linear::{BESIDE, FRAMED, place_within, row_groups};
use super::{Case, Fill, Scale};
use crate::Result;
use crate::graph::{Activation, Graph, Op, TensorId};
use crate::models::dit::HEAD_SIZE;
use crate::tensor::DType;

/// Rows of the modulation table that [`row_groups`] points to.
const SAMPLES: usize = 3;

/// What an error of the mean in its last bit becomes where the variance is zero: the scale
/// is then 1/√eps, a thousand.
const CONSTANT_ROWS: f64 = 1e-3;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Norm {
    Layer,
    Rms,
    Modulate { runs: usize },
}

impl Norm {
    fn op(self) -> &'static str {
        match self {
            Norm::Layer => "layer_norm",
            Norm::Rms => "rms_norm",
            Norm::Modulate { .. } => "layer_norm_modulate",
        }
    }

    fn record(self, g: &mut Graph, x: TensorId) -> Result<TensorId> {
        let [rows, cols] = [g.tensor(x).rows(), g.tensor(x).cols()];
        match self {
            Norm::Layer => {
                let weight = g.weight("weight", &[cols]);
                let bias = g.weight("bias", &[cols]);
                g.push(Op::LayerNorm { weight, bias, eps: 1e-5 }, &[x])
            }
            Norm::Rms => {
                let weight = g.weight("weight", &[cols]);
                g.push(Op::RmsNorm { weight, eps: 1e-6 }, &[x])
            }
            Norm::Modulate { runs } => {
                let table = g.input("modulation", &[SAMPLES, 3 * cols + 8], DType::F32);
                let op = Op::LayerNormModulate {
                    eps: 1e-6,
                    shift_column: 2 * cols,
                    scale_column: 8,
                    groups: row_groups(rows, runs),
                };
                g.push(op, &[x, table])
            }
        }
    }

    /// The norm of an input `x`.
    fn case(self, name: &str, rows: usize, cols: usize) -> Case {
        let runs = if let Norm::Modulate { runs } = self { format!("-g{runs}") } else { "".into() };
        let name = format!("{name}m{rows}-n{cols}{runs}");
        Case::new(self.op(), name, move |g, dtype| {
            let x = g.input("x", &[rows, cols], dtype);
            let y = self.record(g, x)?;
            g.mark_output("y", y);
            Ok(())
        })
    }

    /// The norm of rows `3 ..` of a larger tensor.
    fn of_rows(self, rows: usize, cols: usize) -> Case {
        Case::new(self.op(), format!("rows/m{rows}-n{cols}"), move |g, dtype| {
            let whole = g.input("x", &[rows + 5, cols], dtype);
            let x = g.rows(whole, 3..3 + rows);
            let y = self.record(g, x)?;
            g.mark_output("y", y);
            Ok(())
        })
    }

    /// The norm of an intermediate whose place the result takes.
    fn in_place(self, rows: usize, cols: usize) -> Case {
        Case::new(self.op(), format!("in-place/m{rows}-n{cols}"), move |g, dtype| {
            let x = g.input("x", &[rows, cols], dtype);
            let hidden = g.push(Op::Activate(Activation::Silu), &[x])?;
            let normed = self.record(g, hidden)?;
            let y = g.push(Op::Activate(Activation::GeluTanh), &[normed])?;
            g.mark_output("y", y);
            Ok(())
        })
    }
}

/// Norms with scale and shift, of so many rows and columns, that may run at the same time.
fn modulates(norms: &'static [(usize, usize)]) -> Case {
    let names: Vec<_> = norms.iter().map(|(m, n)| format!("m{m}-n{n}")).collect();
    Case::new("layer_norm_modulate", format!("beside/{}", names.join("|")), move |g, dtype| {
        for (i, &(rows, cols)) in norms.iter().enumerate() {
            let x = g.input(&format!("{i}:x"), &[rows, cols], dtype);
            let table = g.input(&format!("{i}:table"), &[SAMPLES, 2 * cols + 4 * i], DType::F32);
            let groups = row_groups(rows, 1 + i);
            let [shift_column, scale_column] = [4 * i, cols + 4 * i];
            let op = Op::LayerNormModulate { eps: 1e-6, shift_column, scale_column, groups };
            let y = g.push(op, &[x, table])?;
            g.mark_output(BESIDE[i], y);
        }
        g.side_by_side(norms.len())
    })
    .outputs(&BESIDE[..norms.len()])
}

/// Queries and keys of text and of image in one tensor, all with weights of their own.
fn heads_beside(text: usize, image: usize, heads: usize) -> Case {
    let name = format!("beside/m{text}+{image}-h{heads}");
    Case::new("head_norm_rope", name, move |g, dtype| {
        let (d, rows) = (heads * HEAD_SIZE, text + image);
        let qkv = g.input("qkv", &[rows, 3 * d], dtype);
        g.mark_output("y", qkv);
        let angles = (0..rows * HEAD_SIZE).map(|i| ((i / 2) as f64 * 0.37, i % 2));
        let table = angles.map(|(a, odd)| if odd == 0 { a.cos() } else { a.sin() } as f32);
        let table = g.constant("rope", &[rows, HEAD_SIZE], table.collect());
        for (i, range) in [0..text, text..rows].into_iter().enumerate() {
            let [place, table] = [qkv, table].map(|of| g.rows(of, range.clone()));
            for part in 0..2 {
                let weight = g.weight(&format!("{i}.{part}.weight"), &[HEAD_SIZE]);
                let x = g.cols(place, part * d..part * d + d);
                g.push_into(Op::HeadNormRope { weight, eps: 1e-6, heads }, &[table], x)?;
            }
        }
        g.side_by_side(4)
    })
}

/// Queries or keys within `qkv`, rotated by the rows `first ..` of a larger table.
fn head_norm_rope(name: &str, rows: usize, heads: usize, first: usize) -> Case {
    let name = format!("{name}m{rows}-h{heads}-from{first}");
    Case::new("head_norm_rope", name, move |g, dtype| {
        let d = heads * HEAD_SIZE;
        let x = place_within(g, "qkv", [rows, d], dtype);
        g.mark_output("y", x);
        let angle =
            |i: usize| (i / HEAD_SIZE) as f64 * 1e4f64.powf(-((i % HEAD_SIZE / 2) as f64) / 32.0);
        let part = |i: usize| if i.is_multiple_of(2) { angle(i).cos() } else { angle(i).sin() };
        let table_rows = first + rows + 2;
        let table = (0..table_rows * HEAD_SIZE).map(|i| part(i) as f32).collect();
        let table = g.constant("rope", &[table_rows, HEAD_SIZE], table);
        let table = g.rows(table, first..first + rows);
        let weight = g.weight("weight", &[HEAD_SIZE]);
        g.push_into(Op::HeadNormRope { weight, eps: 1e-6, heads }, &[table], x)
    })
    .outputs(&FRAMED)
}

const NORMS: [Norm; 3] = [Norm::Layer, Norm::Rms, Norm::Modulate { runs: 2 }];

pub(super) fn cases(scale: Scale) -> Vec<Case> {
    match scale {
        Scale::Small => small(),
        Scale::Test => test(),
        Scale::Bench => bench(),
    }
}

fn small() -> Vec<Case> {
    let mut cases = Vec::new();
    for norm in NORMS {
        cases.extend([8, 72, 1536].map(|cols| norm.case("", 5, cols)));
        cases.push(norm.of_rows(3, 64));
        cases.push(norm.in_place(3, 64));
    }
    cases.push(Norm::Modulate { runs: 6 }.case("", 40, 16));
    cases.extend([1, 3].map(|heads| head_norm_rope("", 5, heads, 2)));
    cases.push(modulates(&[(3, 64), (5, 72)]));
    cases.push(heads_beside(3, 5, 2));
    cases
}

fn test() -> Vec<Case> {
    let mut cases = Vec::new();
    for norm in NORMS {
        for cols in [8, 16, 24, 40, 64, 72, 128, 256, 768, 1280, 1536, 1920, 2048, 4096] {
            cases.extend([1, 65].map(|rows| norm.case("", rows, cols)));
        }
        cases.extend([2, 240, 1000].map(|rows| norm.case("", rows, 1536)));
        cases.extend([1, 77].map(|rows| norm.of_rows(rows, 128)));
        cases.extend([64, 1920].map(|cols| norm.in_place(65, cols)));
        for cols in [72, 1536] {
            let structured = |name: &str, fill| norm.case(name, 33, cols).fill("x", fill);
            let nearly = Fill::NearlyConstant { mean: 1000.0, rarity: 24 };
            cases.push(structured("large-mean/", nearly));
            cases.push(structured("constant-rows/", Fill::ConstantRows).floor(CONSTANT_ROWS));
            cases.push(structured("ones/", Fill::Constant(1.0)).floor(CONSTANT_ROWS));
            cases.push(structured("zeros/", Fill::Constant(0.0)));
            cases.push(structured("small/", Fill::Normal(1e-3)));
            cases.push(structured("large/", Fill::Normal(1e4)));
            cases.push(structured("nan/", Fill::Normal(1.0).with_nan(3 * cols + cols - 1)));
        }
    }
    for runs in [1, 3, 4, 5, 6] {
        cases.extend([2, 65, 257].map(|rows| Norm::Modulate { runs }.case("", rows, 64)));
    }
    let nan = Fill::Normal(1.0).with_nan(2 * 64 + 5);
    cases.push(Norm::Modulate { runs: 3 }.case("nan-in-shift/", 33, 64).fill("modulation", nan));
    for rows in [1, 2, 65, 240] {
        cases.extend([1, 2, 3, 4, 24, 30].map(|heads| head_norm_rope("", rows, heads, rows % 7)));
    }
    cases.push(modulates(&[(97, 1536), (240, 1536)]));
    cases.push(modulates(&[(1, 1920), (257, 8), (4, 72), (65, 4096), (2, 264)]));
    cases.push(modulates(&[(5, 20), (9, 64)]));
    cases.extend([(1, 65), (97, 240), (40, 3)].map(|(t, i)| heads_beside(t, i, 24)));
    cases.push(heads_beside(9, 14, 1));
    let row = 3 * HEAD_SIZE + 32;
    cases.push(head_norm_rope("ones/", 20, 3, 1).fill("qkv", Fill::Constant(1.0)));
    cases.push(head_norm_rope("zeros/", 20, 3, 1).fill("qkv", Fill::Constant(0.0)));
    cases.push(head_norm_rope("small/", 20, 3, 1).fill("qkv", Fill::Normal(1e-3)));
    cases.push(
        head_norm_rope("nan/", 20, 3, 1).fill("qkv", Fill::Normal(1.0).with_nan(2 * row + 90)),
    );
    cases
}

fn bench() -> Vec<Case> {
    let mut cases = Vec::new();
    for rows in [480, 2000, 8000, 20000] {
        for cols in [1536, 1920] {
            cases.push(Norm::Modulate { runs: 6 }.case("", rows, cols));
        }
        cases.extend([24, 30].map(|heads| head_norm_rope("", rows, heads, 0)));
    }
    cases.push(modulates(&[(97, 1536), (1850, 1536)]));
    cases.push(heads_beside(97, 1850, 24));
    cases.push(Norm::Rms.case("", 128, 4096));
    cases.push(Norm::Layer.case("", 77, 768));
    cases.push(Norm::Layer.case("", 77, 1280));
    cases
}
