//! Matrix products: every epilogue, tails in all three extents, several weights side by
//! side, views of rows and columns on both sides.

mod lists;

use std::sync::Arc;

pub(super) use lists::cases;

use super::Case;
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
