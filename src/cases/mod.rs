//! One definition per op gives its GPU test and its bench.
//!
//! A [`Case`] records a small graph around one op, with seeded inputs and weights. The test
//! `gpu_ops` runs every case on the CPU in f32 (the oracle), on the CPU rounding to bf16
//! (what bf16 must cost) and on the GPU, whose error is held to the second; the bench `ops`
//! times the same definitions at the shapes of the published models.
//!
//! [`cases`] lists them for a [`Scale`]; [`Case::open`] puts one on a backend. A new op, or
//! a new setting of one, needs a case: the tests of this module fail without.

mod attention;
mod compare;
mod data;
mod device;
mod latent;
mod linear;
mod norm;
mod run;
mod tokens;
mod video;

use std::fmt;
use std::sync::Arc;

pub use compare::Comparison;
pub use data::Fill;
pub use device::{Gpu, Variant, gpu};
pub use run::{Data, Input, Output, Running};

use crate::Result;
use crate::graph::{Graph, Node, Role, TensorId};
use crate::tensor::{DType, WeightSource};
use data::CaseWeights;

/// How large the cases are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Tiny shapes of every kind: for memory checkers, which slow a kernel a hundredfold.
    Small,
    /// Every kind, every tail, every structured input.
    Test,
    /// The shapes of the published models at 768p.
    Bench,
}

impl std::str::FromStr for Scale {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "small" => Ok(Scale::Small),
            "test" => Ok(Scale::Test),
            "bench" => Ok(Scale::Bench),
            _ => Err(format!("no scale {name:?}: small, test or bench")),
        }
    }
}

impl fmt::Display for Scale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scale::Small => "small",
            Scale::Test => "test",
            Scale::Bench => "bench",
        })
    }
}

/// All cases of a scale, ops in the order of [`Op::NAMES`]' families.
pub fn cases(scale: Scale) -> Vec<Case> {
    let families =
        [linear::cases, attention::cases, norm::cases, tokens::cases, latent::cases, video::cases];
    families.iter().flat_map(|cases| cases(scale)).collect()
}

type Recorder = Arc<dyn Fn(&mut Graph, DType) -> Result<()> + Send + Sync>;

/// A graph around one op, and what to feed it with.
///
/// Inputs and weights that [`Case::fill`] does not name get values that keep the numbers
/// near one. Every run begins with the inputs written anew.
#[derive(Clone)]
pub struct Case {
    /// Unique: `linear/store/m65-n72-k40`.
    pub name: String,
    /// Name of the op that the case is about.
    pub op: &'static str,
    /// Names of the tensors to compare, of every graph.
    pub outputs: Vec<&'static str>,
    /// Error that is allowed even where rounding to bf16 costs nothing, relative: for
    /// results kept in f32, whose last bits depend on the order of a sum.
    pub floor: f64,
    /// Whether the inputs hold a NaN.
    pub has_nan: bool,
    graphs: Vec<Recorder>,
    fills: Vec<(String, Fill, DType)>,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Case").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Case {
    /// A case of `op` called `op/name`. `record` leaves the result as output `y`.
    pub fn new(
        op: &'static str,
        name: impl fmt::Display,
        record: impl Fn(&mut Graph, DType) -> Result<()> + Send + Sync + 'static,
    ) -> Case {
        Case {
            name: format!("{op}/{name}"),
            op,
            outputs: vec!["y"],
            floor: 0.0,
            has_nan: false,
            graphs: vec![Arc::new(record)],
            fills: Vec::new(),
        }
    }

    /// A further graph, run after the others in the same session.
    pub fn then(
        mut self,
        record: impl Fn(&mut Graph, DType) -> Result<()> + Send + Sync + 'static,
    ) -> Case {
        self.graphs.push(Arc::new(record));
        self
    }

    /// Compares these tensors instead of `y`.
    pub fn outputs(mut self, outputs: &[&'static str]) -> Case {
        self.outputs = outputs.to_vec();
        self
    }

    /// Fills the input or the weight called `name` (a weight is stored as bf16).
    pub fn fill(self, name: &str, fill: Fill) -> Case {
        self.fill_as(name, fill, DType::Bf16)
    }

    /// Fills the weight called `name`, stored as `dtype`.
    pub fn fill_as(mut self, name: &str, fill: Fill, dtype: DType) -> Case {
        self.has_nan |= matches!(fill, Fill::WithNan(..));
        self.fills.push((name.to_string(), fill, dtype));
        self
    }

    /// Allows an error of `floor`.
    pub fn floor(mut self, floor: f64) -> Case {
        self.floor = floor;
        self
    }

    /// The graphs, in the order in which they run.
    ///
    /// # Errors
    /// When the shapes of the case do not fit.
    pub fn record(&self, dtype: DType) -> Result<Vec<Graph>> {
        let record = |recorder: &Recorder| {
            let mut g = Graph::new();
            g.scope(self.name.clone());
            recorder(&mut g, dtype)?;
            Ok(g)
        };
        self.graphs.iter().map(record).collect()
    }

    fn fill_of(&self, name: &str) -> Option<&(String, Fill, DType)> {
        self.fills.iter().rev().find(|(filled, ..)| filled == name)
    }

    /// The weights: the same bf16 values for every backend.
    ///
    /// # Errors
    /// As for [`Case::record`].
    pub fn weights(&self) -> Result<Arc<dyn WeightSource>> {
        let graphs = self.record(DType::F32)?;
        let fill = |name: &str| self.fill_of(name).map(|(_, fill, dtype)| (fill.clone(), *dtype));
        Ok(Arc::new(CaseWeights::of(&graphs, data::seed(&self.name), fill)))
    }

    /// The inputs of every graph. What a bf16 device stores as bf16 is rounded already, so
    /// that every backend starts from the same values.
    ///
    /// # Errors
    /// As for [`Case::record`].
    pub fn inputs(&self) -> Result<Vec<Vec<Input>>> {
        let graphs = self.record(DType::Bf16)?;
        let inputs = |(number, graph): (usize, &Graph)| {
            let roots = graph.tensors().iter().filter(|t| t.role == Role::Input);
            // The views of an input carry another role, so every input is met once.
            roots.map(|t| self.input(number, &t.name, &t.shape, t.dtype)).collect()
        };
        Ok(graphs.iter().enumerate().map(inputs).collect())
    }

    fn input(&self, graph: usize, name: &str, shape: &[usize], dtype: DType) -> Input {
        let standard = Fill::Normal(1.0);
        let fill = self.fill_of(name).map_or(&standard, |(_, fill, _)| fill);
        let seed = data::seed(&self.name) ^ data::seed(&format!("{graph}:{name}"));
        let data = match fill.ids(seed, shape.iter().product()) {
            Some(ids) => Data::Ids(ids),
            None => {
                let mut values = fill.values(seed, shape);
                if dtype == DType::Bf16 {
                    data::round_to_bf16(&mut values);
                }
                Data::Values(values)
            }
        };
        Input { name: name.to_string(), data }
    }

    /// Shapes of inputs and output of the op that the case is about, for people.
    ///
    /// # Errors
    /// As for [`Case::record`].
    pub fn shapes(&self) -> Result<String> {
        let graphs = self.record(DType::F32)?;
        let of = |g: &Graph, node: &Node| {
            let shape = |id: &TensorId| {
                let extents: Vec<_> = g.tensor(*id).shape.iter().map(usize::to_string).collect();
                extents.join("x")
            };
            let inputs: Vec<_> = node.inputs.iter().map(shape).collect();
            format!("{} -> {}", inputs.join(", "), shape(&node.output))
        };
        let found = graphs.iter().flat_map(|g| g.nodes().iter().map(move |n| (g, n)));
        let shapes: Vec<_> =
            found.filter(|(_, n)| n.op.name() == self.op).map(|(g, n)| of(g, n)).collect();
        Ok(shapes.join("; "))
    }

    /// Floating-point operations of all graphs, and bytes that any implementation must move:
    /// what the nodes read and write, once each, with activations of type `dtype`.
    ///
    /// # Errors
    /// As for [`Case::record`].
    pub fn work(&self, dtype: DType) -> Result<(u64, u64)> {
        let graphs = self.record(dtype)?;
        let flops = graphs.iter().map(Graph::flops).sum();
        let bytes = graphs.iter().flat_map(|g| g.nodes().iter().map(|n| n.op.bytes(g, n))).sum();
        Ok((flops, bytes))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::graph::{Activation, Epilogue, Op, Shuffle};

    const SCALES: [Scale; 3] = [Scale::Small, Scale::Test, Scale::Bench];

    /// The op with those of its settings that are branches of a kernel. Both matches are
    /// exhaustive, so that a new setting has to be thought of here.
    fn kind(op: &Op) -> String {
        let activation = |a: &Activation| match a {
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu_tanh",
            Activation::GeluErf => "gelu_erf",
            Activation::QuickGelu => "quick_gelu",
        };
        let settings = match op {
            Op::Linear { epilogue, .. } => match epilogue {
                Epilogue::Store => "store",
                Epilogue::Activate(a) => activation(a),
                Epilogue::Accumulate => "accumulate",
                Epilogue::GatedAccumulate { .. } => "gated",
                Epilogue::NormHeads(_) => "heads",
            },
            Op::Conv3d(spec) => match (spec.shuffle, spec.residual, spec.stride) {
                (Shuffle::Space, ..) => "space",
                (Shuffle::Time { drop_first: true }, ..) => "time, drop",
                (Shuffle::Time { drop_first: false }, ..) => "time",
                (Shuffle::OneOfTime { second: false }, ..) => "first of time",
                (Shuffle::OneOfTime { second: true }, ..) => "second of time",
                (Shuffle::None, true, _) => "residual",
                (Shuffle::None, false, [2, 1, 1]) => "stride in time",
                (Shuffle::None, false, [1, 2, 2]) => "stride in space",
                (Shuffle::None, false, _) if spec.kernel == [1; 3] => "pointwise",
                (Shuffle::None, false, _) if spec.continues => "continues",
                (Shuffle::None, false, _) => "plain",
            },
            Op::Attention(spec) => match (spec.causal, spec.relative_bias) {
                (true, _) => "causal",
                (false, Some(_)) => "relative",
                (false, None) if spec.segments.len() > 1 => "segments",
                (false, None) => "full",
            },
            Op::Activate(a) => activation(a),
            Op::Embedding { positions: Some(_), .. } => "positions",
            Op::Patchify { channels_first: true } => "channels first",
            Op::GroupNorm { silu: true, .. } => "silu",
            Op::NormalNoise { block: true, .. } => "block",
            Op::Embedding { positions: None, .. }
            | Op::Patchify { channels_first: false }
            | Op::GroupNorm { silu: false, .. }
            | Op::LayerNorm { .. }
            | Op::LayerNormModulate { .. }
            | Op::RmsNorm { .. }
            | Op::HeadNormRope { .. }
            | Op::GatedGelu
            | Op::TimestepEmbedding
            | Op::Unpatchify
            | Op::AddPositionTable { .. }
            | Op::GuidedEuler
            | Op::NormalNoise { block: false, .. }
            | Op::HalveBilinear { .. }
            | Op::DoubleRenoise { .. } => "",
        };
        format!("{} {settings}", op.name()).trim_end().to_string()
    }

    #[test]
    fn every_op_has_a_case_at_every_scale() {
        for scale in SCALES {
            let covered: BTreeSet<&str> = cases(scale).iter().map(|c| c.op).collect();
            let missing: Vec<_> = Op::NAMES.iter().filter(|n| !covered.contains(**n)).collect();
            assert!(missing.is_empty(), "no {scale} case for {missing:?}");
        }
    }

    #[test]
    fn every_setting_has_a_case() {
        let kinds = |scale| -> BTreeSet<String> {
            let graphs = cases(scale)
                .into_iter()
                .flat_map(|c| c.record(DType::F32).unwrap_or_else(|e| panic!("{}: {e}", c.name)));
            graphs.flat_map(|g| g.nodes().iter().map(|n| kind(&n.op)).collect::<Vec<_>>()).collect()
        };
        let tested = kinds(Scale::Test);
        for kind in [
            "linear store",
            "linear silu",
            "linear gelu_tanh",
            "linear gelu_erf",
            "linear quick_gelu",
            "linear accumulate",
            "linear gated",
            "linear heads",
            "conv3d space",
            "conv3d time, drop",
            "conv3d time",
            "conv3d first of time",
            "conv3d second of time",
            "conv3d residual",
            "conv3d stride in time",
            "conv3d stride in space",
            "conv3d pointwise",
            "conv3d continues",
            "conv3d plain",
            "attention causal",
            "attention relative",
            "attention segments",
            "attention full",
            "activate silu",
            "activate gelu_tanh",
            "activate gelu_erf",
            "activate quick_gelu",
            "embedding",
            "embedding positions",
            "patchify",
            "patchify channels first",
            "group_norm",
            "group_norm silu",
            "normal_noise",
            "normal_noise block",
        ] {
            assert!(tested.contains(kind), "no test case for {kind}");
        }
        let small = kinds(Scale::Small);
        let missing: Vec<_> = tested.difference(&small).collect();
        assert!(missing.is_empty(), "no small case for {missing:?}");
    }

    #[test]
    fn names_are_used_once_and_cases_are_what_they_say() {
        for scale in SCALES {
            let mut names = BTreeSet::new();
            for case in cases(scale) {
                assert!(names.insert(case.name.clone()), "{} is there twice", case.name);
                assert!(Op::NAMES.contains(&case.op), "{}: no op is called so", case.name);
                let graphs = case.record(DType::Bf16).unwrap_or_else(|e| panic!("{e}"));
                for graph in graphs {
                    let found = graph.nodes().iter().any(|n| n.op.name() == case.op);
                    assert!(found, "{} does not run {}", case.name, case.op);
                    for (name, ..) in &case.fills {
                        let weight = graph.weights().iter().any(|w| w.name == *name);
                        let used = weight || graph.find(name).is_ok();
                        let optional = ["relative", "positions"].contains(&name.as_str());
                        assert!(used || optional, "{} fills {name}, which it has not", case.name);
                    }
                }
            }
        }
    }
}
