//! Matrix products: every epilogue, tails in all three extents, several weights side by
//! side, views of rows and columns on both sides.

use std::sync::Arc;

use super::{Case, Fill, Scale};
use crate::Result;
use crate::graph::{Activation, Epilogue, Graph, HeadNorms, Op, RowGroup, TensorId, WeightId};
use crate::tensor::DType;

pub(super) const ACTIVATIONS: [(Activation, &str); 4] = [
    (Activation::Silu, "silu"),
    (Activation::GeluTanh, "gelu_tanh"),
    (Activation::GeluErf, "gelu_erf"),
    (Activation::QuickGelu, "quick_gelu"),
];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Store,
    Activate(Activation),
    Accumulate,
    Gated {
        runs: usize,
    },
    /// Heads of this size, normed and rotated in all parts but the last of several.
    Heads {
        size: usize,
    },
}

impl Kind {
    const ALL: [Kind; 7] = [
        Kind::Store,
        Kind::Activate(Activation::Silu),
        Kind::Activate(Activation::GeluTanh),
        Kind::Activate(Activation::GeluErf),
        Kind::Activate(Activation::QuickGelu),
        Kind::Accumulate,
        Kind::Gated { runs: 2 },
    ];

    fn name(self) -> String {
        match self {
            Kind::Store => "store".into(),
            Kind::Activate(activation) => {
                let name = ACTIVATIONS.iter().find(|(a, _)| *a == activation).map_or("", |a| a.1);
                name.into()
            }
            Kind::Accumulate => "accumulate".into(),
            Kind::Gated { runs } => format!("gated-{runs}"),
            Kind::Heads { size } => format!("heads-{size}"),
        }
    }
}

/// Rows of the modulation table.
const SAMPLES: usize = 3;
/// First column of the gate, as if other vectors came before it.
const GATE_COLUMN: usize = 24;

/// `rows` in `runs` of unequal length, the first ones perhaps empty (as where a batch has no
/// history), with samples in no order.
pub(super) fn row_groups(rows: usize, runs: usize) -> Arc<[RowGroup]> {
    let start = |i: usize| rows * i * i / (runs * runs);
    let group = |i| RowGroup { rows: start(i + 1) - start(i), sample: (2 * i + 1) % SAMPLES };
    (0..runs).map(group).collect()
}

/// A tensor for `rows × cols` that lies inside a larger input `name`, and marks of what
/// lies around it, so that a write beyond the edges shows.
pub(super) fn place_within(
    g: &mut Graph,
    name: &str,
    [rows, cols]: [usize; 2],
    dtype: DType,
) -> TensorId {
    const MARGIN: usize = 16;
    let whole = g.input(name, &[rows + 3, cols + 2 * MARGIN], dtype);
    let above = g.rows(whole, 0..1);
    let below = g.rows(whole, 1 + rows..rows + 3);
    let middle = g.rows(whole, 1..1 + rows);
    let left = g.cols(middle, 0..MARGIN);
    let right = g.cols(middle, MARGIN + cols..2 * MARGIN + cols);
    for (side, view) in [("above", above), ("below", below), ("left", left), ("right", right)] {
        g.mark_output(side, view);
    }
    g.cols(middle, MARGIN..MARGIN + cols)
}

/// The result and what [`place_within`] puts around it.
pub(super) const FRAMED: [&str; 5] = ["y", "above", "below", "left", "right"];

/// Rows `2 ..` and columns `8 ..` of a larger input.
pub(super) fn view_of_input(
    g: &mut Graph,
    name: &str,
    [rows, cols]: [usize; 2],
    dtype: DType,
) -> TensorId {
    let whole = g.input(name, &[rows + 3, cols + 24], dtype);
    let rows = g.rows(whole, 2..2 + rows);
    g.cols(rows, 8..8 + cols)
}

#[derive(Debug, Clone)]
struct Linear {
    m: usize,
    /// Columns of each weight.
    n: Vec<usize>,
    k: usize,
    kind: Kind,
    bias: bool,
    f32_output: bool,
    /// Whether the input, and whether the output, are views.
    strided: [bool; 2],
    /// The weight as a convolution over 2×2 patches has it.
    patches: bool,
}

fn linear(kind: Kind, m: usize, n: &[usize], k: usize) -> Linear {
    Linear {
        m,
        n: n.to_vec(),
        k,
        kind,
        bias: true,
        f32_output: false,
        strided: [false; 2],
        patches: false,
    }
}

impl Linear {
    fn without_bias(self) -> Linear {
        Linear { bias: false, ..self }
    }

    fn into_f32(self) -> Linear {
        Linear { f32_output: true, ..self }
    }

    fn strided(self, input: bool, output: bool) -> Linear {
        Linear { strided: [input, output], ..self }
    }

    /// Records the layer with names that begin with `prefix`.
    fn record(&self, g: &mut Graph, dtype: DType, prefix: &str) -> Result<()> {
        let Linear { m, k, .. } = *self;
        let columns: usize = self.n.iter().sum();
        let name = |of: &str| format!("{prefix}{of}");
        let x = match self.strided[0] {
            true => view_of_input(g, &name("x"), [m, k], dtype),
            false => g.input(&name("x"), &[m, k], dtype),
        };
        let mut parts = Vec::new();
        for (i, &n) in self.n.iter().enumerate() {
            let shape = if self.patches { vec![n, k / 4, 2, 2] } else { vec![n, k] };
            let bias = self.bias.then(|| g.weight(&name(&format!("{i}.bias")), &[n]));
            parts.push((g.weight(&name(&format!("{i}.weight")), &shape), bias));
        }
        let mut inputs = vec![x];
        let epilogue = match self.kind {
            Kind::Store => Epilogue::Store,
            Kind::Activate(activation) => Epilogue::Activate(activation),
            Kind::Accumulate => Epilogue::Accumulate,
            Kind::Gated { runs } => {
                let width = GATE_COLUMN + columns + 8;
                inputs.push(g.input(&name("modulation"), &[SAMPLES, width], DType::F32));
                let groups = row_groups(m, runs);
                Epilogue::GatedAccumulate { gate_column: GATE_COLUMN, groups }
            }
            Kind::Heads { size } => {
                let (table, norms) = self.heads(g, size, prefix);
                inputs.push(table);
                Epilogue::NormHeads(norms)
            }
        };
        let op = Op::Linear { parts, epilogue };
        let output = if self.f32_output { DType::F32 } else { dtype };
        let place = match (self.strided[1], op.updates_output()) {
            (true, _) => place_within(g, "around", [m, columns], output),
            (false, true) => g.input(&name("accumulator"), &[m, columns], output),
            (false, false) => g.empty(&[m, columns], output),
        };
        g.mark_output(&name("y"), place);
        g.push_into(op, &inputs, place)
    }

    /// The rotations of the rows, which lie within a larger table, and the norms of the parts.
    fn heads(&self, g: &mut Graph, size: usize, prefix: &str) -> (TensorId, HeadNorms) {
        let above = self.m % 7;
        let rows = above + self.m + 2;
        let angle = |i: usize| (i / size) as f64 * 1e4f64.powf(-((i % size / 2) as f64) / 32.0);
        let part = |i: usize| if i.is_multiple_of(2) { angle(i).cos() } else { angle(i).sin() };
        let values = (0..rows * size).map(|i| part(i) as f32).collect();
        let table = g.constant(&format!("{prefix}rope"), &[rows, size], values);
        let plain = (self.n.len() > 1).then_some(self.n.len() - 1);
        let norm = |i: usize| -> Option<WeightId> {
            (plain != Some(i)).then(|| g.weight(&format!("{prefix}{i}.norm"), &[size]))
        };
        let weights = (0..self.n.len()).map(norm).collect();
        (g.rows(table, above..above + self.m), HeadNorms { weights, eps: 1e-6 })
    }

    fn named(self, prefix: &str) -> Case {
        let list: Vec<_> = self.n.iter().map(usize::to_string).collect();
        let mut name =
            format!("{prefix}{}/m{}-n{}-k{}", self.kind.name(), self.m, list.join("+"), self.k);
        for (said, suffix) in [
            (!self.bias, "-nobias"),
            (self.f32_output, "-f32"),
            (self.strided[0], "-x_view"),
            (self.strided[1], "-y_view"),
            (self.patches, "-patches"),
        ] {
            name += if said { suffix } else { "" };
        }
        let outputs: &[&str] = if self.strided[1] { &FRAMED } else { &["y"] };
        // The last bits of a sum of k products depend on its order.
        let floor = if self.f32_output { (self.k as f64).sqrt() * 2f64.powi(-22) } else { 0.0 };
        Case::new("linear", name, move |g, dtype| self.record(g, dtype, ""))
            .outputs(outputs)
            .floor(floor)
    }

    fn case(self) -> Case {
        self.named("")
    }
}

/// The results of nodes that may run at the same time.
pub(super) const BESIDE: [&str; 6] = ["0:y", "1:y", "2:y", "3:y", "4:y", "5:y"];

/// Layers that may run at the same time.
fn side_by_side(layers: &[Linear]) -> Case {
    let name = |layer: &Linear| layer.clone().case().name.replacen("linear/", "", 1);
    let names: Vec<_> = layers.iter().map(name).collect();
    let floor = layers.iter().map(|layer| layer.clone().case().floor).fold(0.0, f64::max);
    let (count, layers) = (layers.len(), layers.to_vec());
    Case::new("linear", format!("beside/{}", names.join("|")), move |g, dtype| {
        for (i, layer) in layers.iter().enumerate() {
            layer.record(g, dtype, &format!("{i}:"))?;
        }
        g.side_by_side(count)
    })
    .outputs(&BESIDE[..count])
    .floor(floor)
}

pub(super) fn cases(scale: Scale) -> Vec<Case> {
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
    for text in [97, 140] {
        cases.push(linear(Kind::Store, text, &[1536], 4096).case());
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
